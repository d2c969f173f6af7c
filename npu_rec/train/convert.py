"""Conversion between checkpoints of npu-rec, .safetensors files and Meta's research checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from npu_rec.config import Config
from npu_rec.distributed.world import ALONE
from npu_rec.embedding import SlotTable
from npu_rec.errors import CheckpointError
from npu_rec.models.meta_weights import load_meta_state_dict, to_meta_state_dict
from npu_rec.tasks import Retrieval, Task, build_task
from npu_rec.train import checkpoint as ckpt
from npu_rec.train.setup import open_data
from npu_rec.train.state import keyed_rows, load_weights, tables_of, weight_parts
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
    if target.suffix == ".safetensors":
        weights = _whole_weights(task, target)
        _write(target, lambda path: save_file(weights, path))
    elif target.suffix in _META and target.suffix:
        weights = to_meta_state_dict(_encoder(task, target))
        _write(target, lambda path: torch.save(weights, path))
    else:
        snapshot = ckpt.checkpoint_snapshot(
            tensors={f"model.{name}": part for name, part in weight_parts(task).items()},
            keyed={name: rows for name, rows in keyed_rows(task).items() if name.startswith("model.")},
            config=config,
            facts=data.facts,
            items=data.path / "items.arrow",
            state={"step": 0},
        )
        ckpt.save_snapshot(target, snapshot)
    return target


def _whole_weights(task: Task, path: Path) -> dict[str, Tensor]:
    by_id = [name for name, table in tables_of(task) if isinstance(table, SlotTable)]
    if by_id:
        raise CheckpointError(
            f"{path}: {', '.join(by_id)} keeps rows by id, which only a checkpoint holds; give a folder as the target"
        )
    return {name: part.local.detach().contiguous() for name, part in weight_parts(task).items()}


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors wrap what the disk says
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


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
