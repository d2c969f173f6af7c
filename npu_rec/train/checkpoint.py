"""Checkpoints: a folder of safetensors and JSON with a manifest of hashes; nothing is ever unpickled.

    step-120/
      model-*.safetensors, model.safetensors.index.json   tensors (torch.distributed.checkpoint)
      state.json      step, position in the data, counters
      config.yaml     the resolved configuration
      items.arrow     item id, raw id, title: what `recommend` needs
      manifest.json   SHA-256 and size of every other file

A checkpoint is written beside its place and renamed, so a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from npu_rec.config import Config, dump_config
from npu_rec.embedding import EmbeddingTable
from npu_rec.errors import CheckpointError
from npu_rec.ops import RowOptimizer
from npu_rec.tasks import DataFacts

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def items_path(self) -> Path:
        return self.path / "items.arrow"

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix.`, without it, in host memory."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that there is one process
            try:
                stored = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
                wanted = {
                    name: torch.empty(entry.size, dtype=entry.properties.dtype)
                    for name, entry in stored.items()
                    if name.startswith(f"{prefix}.") and isinstance(entry, TensorStorageMetadata)
                }
                if wanted:
                    load_state(wanted, storage_reader=HuggingFaceStorageReader(str(self.path)), no_dist=True)
            except (SafetensorError, CheckpointException, OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error}") from None
        return {name.removeprefix(f"{prefix}."): value for name, value in wanted.items()}

    def check_items(self, items: Path) -> None:
        """Raise CheckpointError unless the items of a prepared data set have the ids they had in training."""
        trained, given = (
            dict(zip(*(table.column(c).to_pylist() for c in ("raw_id", "item_id")), strict=True))
            for table in (read_items(self.items_path), read_items(items))
        )
        if trained == given:
            return
        raw = next((x for x in trained if trained[x] != given.get(x)), None) or next(
            x for x in given if x not in trained
        )
        here, there = trained.get(raw, "unknown"), given.get(raw, "unknown")
        raise CheckpointError(
            f"{self.path}: was trained with other item ids: item {raw!r} is {here} there and {there} in this data set; "
            "use the data it was trained on"
        )

    def facts(self) -> DataFacts:
        """What the model knows of its data set."""
        tensors = self.tensors("facts")
        return DataFacts(
            self.state["num_items"], tensors["catalogue"], tensors["item_counts"], bool(self.state["has_times"])
        )


def read_items(path: Path) -> pa.Table:
    """The item table of a prepared data set or a checkpoint."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def save(
    path: Path,
    *,
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    facts: DataFacts,
    items: Path,
    state: Mapping[str, Any],
    random_states: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint at `path` so that it is there whole or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"random.{name}": value for name, value in random_states.items()}
    tensors |= {"facts.catalogue": facts.catalogue, "facts.item_counts": facts.item_counts}
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(model, optimizer).items()}
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, tensors, config, facts, items, state)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{path}: cannot be written: {error}; earlier checkpoints are untouched") from error
    aside = path.parent / f".{path.name}.partial-replaced"
    if path.exists():
        path.rename(aside)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write(
    folder: Path,
    tensors: dict[str, Tensor],
    config: Config,
    facts: DataFacts,
    items: Path,
    state: Mapping[str, Any],
) -> None:
    host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process
        save_state(host, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)
    full = {"format": FORMAT, "num_items": facts.num_items, "has_times": facts.has_times, **state}
    (folder / "state.json").write_text(json.dumps(full, indent=1))
    (folder / "config.yaml").write_text(dump_config(config))
    shutil.copyfile(items, folder / "items.arrow")
    files = {file.name: {"sha256": _hash(file), "bytes": file.stat().st_size} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: not a checkpoint, or a file is missing, truncated or altered; the file is named.
    """
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not manifest_path.is_file():
        steps = list_steps(path / "checkpoints")
        hint = f"; did you mean {path / 'checkpoints' / f'step-{steps[-1]}'}?" if steps else ""
        raise CheckpointError(f"{path}: not a checkpoint (no {MANIFEST}){hint}")
    try:
        manifest = json.loads(manifest_path.read_text())
        files = {str(name): (str(e["sha256"]), int(e["bytes"])) for name, e in manifest["files"].items()}
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise CheckpointError(f"{manifest_path}: damaged; use another checkpoint") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, this version reads {FORMAT}")
    for name, (digest, size) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; use another checkpoint")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes instead of {size}: truncated or altered")
        if _hash(file) != digest:
            raise CheckpointError(f"{file}: its SHA-256 is not that of the manifest: damaged or altered")
    return Checkpoint(path, json.loads((path / "state.json").read_text()))


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    names = (p.name for p in folder.iterdir() if p.is_dir())
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())


def remove_partial(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for partial in folder.glob(".step-*.partial-*") if folder.is_dir() else ():
        shutil.rmtree(partial, ignore_errors=True)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    for step in list_steps(folder)[:-keep]:
        if step != best:
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)


def drop_later(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`: a run taken up there leaves them behind."""
    for later in list_steps(folder):
        if later > step:
            shutil.rmtree(folder / f"step-{later}")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimisers by parameter name: `<parameter>/<state>` -> tensor."""
    tensors = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    for name, rows in _row_optimizers(model):
        state = {"square": rows.square, "momentum": rows.momentum, "step": torch.tensor(rows.step)}
        tensors |= {f"{name}/{key}": value for key, value in state.items() if value is not None}
    return tensors


def _row_optimizers(model: nn.Module) -> list[tuple[str, RowOptimizer]]:
    """Optimisers of tables that update themselves, by the name of the table's weight."""
    tables = ((name, module) for name, module in model.named_modules() if isinstance(module, EmbeddingTable))
    return [(f"{name}.weight", table.optimizer) for name, table in tables if table.optimizer is not None]


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    for name, rows in _row_optimizers(model):
        device = model.get_parameter(name).device
        square, momentum = (tensors.get(f"{name}/{key}") for key in ("square", "momentum"))
        rows.square = None if square is None else square.to(device)
        rows.momentum = None if momentum is None else momentum.to(device)
        rows.step = int(tensors[f"{name}/step"])
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter not in trained:
            continue
        state = {}
        for full_name, value in tensors.items():
            owner, _, key = full_name.rpartition("/")
            if owner == name:
                state[key] = value if key == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights by name.

    Raises:
        CheckpointError: names or shapes differ; they are named.
    """
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)}, the model wants {list(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{source}: does not fit the model: {'; '.join(problems[:4])}{more}")
    model.load_state_dict(dict(weights))


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
