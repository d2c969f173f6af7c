"""Conversion between checkpoints of npu-rec, .safetensors files and Meta's research checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from npu_rec.config import Config
from npu_rec.distributed.world import ALONE
from npu_rec.errors import CheckpointError
from npu_rec.models.meta_weights import load_meta_state_dict, to_meta_state_dict
from npu_rec.tasks import Retrieval, Task, build_task
from npu_rec.train import checkpoint as ckpt
from npu_rec.train.setup import open_data
from npu_rec.train.state import load_weights, weight_parts
from npu_rec.train.weights import open_weights

_META = (".pt", ".pth", ".ckpt", "")


def convert(source: Path, target: Path, config: Config) -> Path:
    """Convert weights; what a path is follows from it.

    A folder, or a path without suffix as the target, is a checkpoint; `.safetensors` a plain file of
    weights; `.pt`, `.pth`, `.ckpt` (or a source file without suffix) Meta's research checkpoint, read with
    `weights_only=True`.

    Args:
        config: gives the model's shape and, for a checkpoint as the target, the data set whose item map it carries.

    Raises:
        CheckpointError: the source cannot be read or does not fit the model, or the target exists.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists already; choose another target or remove it")
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or checkpoint")
    data = open_data(config)
    task = build_task(config, data.facts)
    if source.is_file() and source.suffix in _META:
        load_meta_state_dict(_encoder(task, source), _read_meta(source))
    else:
        if source.is_dir():
            ckpt.open_checkpoint(source).check_items(data.path / "items.arrow")
        load_weights(task, open_weights(source, ALONE), str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in task.state_dict().items()}, target)
    elif target.suffix in _META and target.suffix:
        torch.save(to_meta_state_dict(_encoder(task, target)), target)
    else:
        tensors = {f"model.{name}": part for name, part in weight_parts(task).items()}
        items = data.path / "items.arrow"
        ckpt.save_snapshot(
            target,
            ckpt.checkpoint_snapshot(tensors=tensors, config=config, facts=data.facts, items=items, state={"step": 0}),
        )
    return target


def _encoder(task: Task, path: Path) -> torch.nn.Module:
    if not isinstance(task, Retrieval):
        raise CheckpointError(
            f"{path}: Meta's research checkpoints hold retrieval models; the task is {type(task).__name__}"
        )
    return task.encoder


def _read_meta(path: Path) -> Mapping[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of a file that is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a checkpoint that torch.load(weights_only=True) reads: {reason}") from None
    for key in ("model_state_dict", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: holds no state dict of tensors")
    return loaded
