"""Weights from a checkpoint or a .safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from npu_rec.distributed import World
from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint import MANIFEST, Checkpoint, open_checkpoint


def open_weights(path: Path, world: World) -> Checkpoint | dict[str, Tensor]:
    """A checkpoint, or the weights of a file by name, in host memory.

    Raises:
        CheckpointError: neither a checkpoint folder nor a readable .safetensors file.
    """
    if path.is_dir():
        return open_checkpoint(path, world)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint or file")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a checkpoint folder or a .safetensors file (see `npu-rec convert`)")
    if (path.parent / MANIFEST).is_file():
        raise CheckpointError(f"{path}: a part of a checkpoint, under other names; give its folder {path.parent}")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from None
