"""Training, evaluation, checkpoints and run directories."""

from npu_rec.train.evaluate import EvaluateResult, evaluate
from npu_rec.train.setup import load_run_config
from npu_rec.train.trainer import TrainResult, train

__all__ = ["EvaluateResult", "TrainResult", "evaluate", "load_run_config", "train"]
