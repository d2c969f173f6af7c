"""Deltas: the rows touched since a mark, for whoever keeps a copy of the model up to date."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from npu_rec.distributed.world import ALONE, World
from npu_rec.errors import CheckpointError
from npu_rec.train.checkpoint import disk
from npu_rec.train.checkpoint.contents import Keyed, Shard, Snapshot
from npu_rec.train.checkpoint.read import Stored, verify


class Delta(Stored):
    """A verified delta on disk."""

    @property
    def mark_step(self) -> int:
        """Rows touched by later steps are in it."""
        return int(self.state["mark_step"])

    @property
    def step(self) -> int:
        """The rows are those after this step."""
        return int(self.state["step"])


def delta_snapshot(
    *,
    keyed: Mapping[str, Keyed | Iterable[Keyed]],
    tensors: Mapping[str, Tensor | Shard] | None = None,
    mark_step: int,
    step: int,
) -> Snapshot:
    """What changed after step `mark_step`, as it is after `step`.

    Args:
        keyed: `model.<table>` -> this rank's touched rows, by row number or key, column `weight`.
        tensors: `model.*`: small ones that change in every step, whole.
    """
    state = {"format": disk.FORMAT, "mark_step": mark_step, "step": step}
    return Snapshot(tensors=tensors or {}, keyed=keyed, documents={"state.json": json.dumps(state, indent=1)})


def open_delta(path: Path, world: World = ALONE) -> Delta:
    """Verify a delta.

    Raises:
        CheckpointError: as of `open_checkpoint`.
    """
    state = verify(path, world)
    if "mark_step" not in state:
        raise CheckpointError(f"{path}: a checkpoint, not a delta; open it as one")
    return Delta(path, state)


def drop_later_deltas(folder: Path, step: int) -> None:
    """Delete deltas `step-<mark>-<end>` that end after `step`, and what a killed export left: a run goes on there."""
    disk.remove_partial(folder)
    for delta in folder.glob("step-*-*"):
        end = delta.name.rpartition("-")[2]
        if end.isdigit() and int(end) > step:
            shutil.rmtree(delta)


def apply_delta(weights: Mapping[str, Tensor], step: int, delta: Delta) -> list[str]:
    """Bring `weights`, as `Checkpoint.tensors("model")` gives them, from `step` to `delta.step`, in place.

    Args:
        weights: by name; a static table `<table>` is the tensor `<table>.weight [V, D]`.

    Returns:
        Names of the tables in the delta that are no tensor of `weights`: dynamic ones. `delta.keyed(name)` has their
        rows.

    Raises:
        CheckpointError: the delta does not lead on from `step`, or does not fit the weights.
    """
    if not delta.mark_step <= step <= delta.step:
        raise CheckpointError(
            f"{delta.path}: leads from step {delta.mark_step} to {delta.step}, the weights are of step {step}; "
            "apply the deltas in their order"
        )
    values = delta.tensors("model")
    unknown = [name for name, value in values.items() if name not in weights or weights[name].shape != value.shape]
    if unknown:
        raise CheckpointError(f"{delta.path}: does not fit the model: {', '.join(unknown[:4])}")
    others = []
    for name in delta.keyed_names:
        target = weights.get(f"{name.removeprefix('model.')}.weight")
        if target is None:
            others.append(name)
            continue
        for piece in delta.keyed(name):
            _put_rows(target, piece, f"{delta.path}: {name}")
    for name, value in values.items():
        weights[name].copy_(value)
    return others


def _put_rows(table: Tensor, piece: Keyed, where: str) -> None:
    rows = piece.columns.get("weight")
    if rows is None or rows.shape[1:] != table.shape[1:]:
        width = None if rows is None else list(rows.shape[1:])
        raise CheckpointError(f"{where}: rows of weights are {width}, the table has {list(table.shape[1:])}")
    if len(piece.keys) and not (int(piece.keys.min()) >= 0 and int(piece.keys.max()) < len(table)):
        raise CheckpointError(f"{where}: row {int(piece.keys.max())} is beyond the {len(table)} rows of the table")
    table.index_copy_(0, piece.keys.to(table.device), rows.to(table))
