"""Tasks: model, loss and scores together."""

from npu_rec.tasks.retrieval import Retrieval
from npu_rec.tasks.task import DataFacts, Task, build_task

__all__ = ["DataFacts", "Retrieval", "Task", "build_task"]
