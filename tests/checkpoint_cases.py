"""Documents and rows of checkpoints, for the tests of them."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from npu_rec.train.checkpoint import Keyed


def documents(step: int) -> dict[str, str]:
    state = {"format": 1, "step": step, "position": {"epoch": 1, "batch": 7}}
    return {"state.json": json.dumps(state), "config.yaml": "name: x\n"}


def rows_of(keys: Tensor) -> Keyed:
    """Rows that are a function of their keys; columns are parts of one record, as tiers have them."""
    records = keys.double().unsqueeze(1).float() * torch.tensor([1.0, 2.0, 3.0, 0.5])
    return Keyed(keys, {"weight": records[:, :3], "square": records[:, 3], "last_step": keys % 5})


def assert_rows(pieces: list[Keyed], keys: Tensor) -> None:
    found = torch.cat([piece.keys for piece in pieces]) if pieces else torch.empty(0, dtype=torch.int64)
    assert torch.equal(found.sort().values, keys.sort().values)
    for piece in pieces:
        for name, values in rows_of(piece.keys).columns.items():
            assert torch.equal(piece.columns[name], values)
