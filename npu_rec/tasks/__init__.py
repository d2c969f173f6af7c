"""Tasks: model, loss and scores together."""

from npu_rec.tasks.ranking import Ranking
from npu_rec.tasks.retrieval import Retrieval
from npu_rec.tasks.task import DataFacts, Prepared, Task, build_task

__all__ = ["DataFacts", "Prepared", "Ranking", "Retrieval", "Task", "build_task"]
