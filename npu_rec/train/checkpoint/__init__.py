"""Checkpoints: folders of safetensors and JSON with a manifest of hashes; nothing is ever unpickled.

    step-120/
      model-*.safetensors, model.safetensors.index.json   tensors and blocks of tensors, of all ranks
      keyed/*.safetensors, keyed/index.json               rows by key, where there are such tables
      state.json      step, position in the data, counters
      config.yaml     the resolved configuration
      items.arrow     item id, raw id, title: what `recommend` needs
      manifest.json   SHA-256 and size of every other file

A checkpoint is written beside its place and renamed, so a kill at any moment leaves the last good one.
"""

from npu_rec.train.checkpoint.agreement import together
from npu_rec.train.checkpoint.background import AsyncSaver
from npu_rec.train.checkpoint.contents import Keyed, Shard, Snapshot, checkpoint_snapshot
from npu_rec.train.checkpoint.delta import Delta, apply_delta, delta_snapshot, drop_later_deltas, open_delta
from npu_rec.train.checkpoint.disk import MANIFEST, drop_later, list_steps, prune, remove_partial
from npu_rec.train.checkpoint.read import Checkpoint, open_checkpoint, read_items
from npu_rec.train.checkpoint.save import save_snapshot

__all__ = [
    "MANIFEST",
    "AsyncSaver",
    "Checkpoint",
    "Delta",
    "Keyed",
    "Shard",
    "Snapshot",
    "apply_delta",
    "checkpoint_snapshot",
    "delta_snapshot",
    "drop_later",
    "drop_later_deltas",
    "list_steps",
    "open_checkpoint",
    "open_delta",
    "prune",
    "read_items",
    "remove_partial",
    "save_snapshot",
    "together",
]
