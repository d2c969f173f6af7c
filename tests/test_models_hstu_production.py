"""HSTU's production layers against an oracle written from their equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hstu_cases import PRODUCTION, randomise
from strategies import generator, normal, one_thread  # noqa: F401
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

from npu_rec.config import OpsConfig
from npu_rec.models import Layout
from npu_rec.models.hstu import HSTU, HSTUOptions
from npu_rec.ops.jagged import lengths_to_offsets


def production(seed: int = 0, **options: Any) -> HSTU:
    """A production stack in float64 with every weight random."""
    model = HSTU(PRODUCTION, HSTUOptions(variant="production", **options), OpsConfig()).double()
    randomise(model, seed, 0.5)
    return model


def production_oracle(
    model: HSTU, x: Tensor, lengths: list[int], targets: list[int], since: Tensor | None, longest: int
) -> Tensor:
    """The layers of DLRM-HSTU one sequence at a time; `since [T]`: seconds between event and request."""
    weight, rows, first = dict(model.named_parameters()), [], 0
    for n, t in zip(lengths, targets, strict=True):
        y = x[first : first + n]
        if since is not None and n:
            bucket = [min(int(math.sqrt(max(s, 1e-6) / 60)), 2048) for s in since[first : first + n].tolist()]
            y = y + weight["input_times.weight"][bucket]
        history = n - t  # a target sees the history and itself
        mask = torch.tensor([[i == j or (j < i and j < history) for j in range(n)] for i in range(n)]).view(n, n)
        for i in range(PRODUCTION.num_blocks):
            own = {k.removeprefix(f"layers.{i}."): p for k, p in weight.items() if k.startswith(f"layers.{i}.")}
            normed = layer_norm(y, (10,), own["input_norm.weight"], own["input_norm.bias"], 1e-6)
            u, v, q, k = linear(normed, own["uvqk.weight"], own["uvqk.bias"]).split([10, 10, 8, 8], 1)
            u, heads = silu(u), []
            for a in range(2):
                scores = q[:, 4 * a : 4 * a + 4] @ k[:, 4 * a : 4 * a + 4].T / math.sqrt(4)
                heads.append((silu(scores) / longest * mask) @ v[:, 5 * a : 5 * a + 5])
            attended = layer_norm(torch.cat(heads, 1), (10,), own["output_norm.weight"], own["output_norm.bias"], 1e-6)
            assert "output.bias" not in own
            y = linear(torch.cat([u, attended, u * attended], 1), own["output.weight"]) + y
        rows.append(y)
        first += n
    return torch.cat(rows)


@pytest.mark.parametrize("targets", [None, [2, 0, 0, 1, 5]])
@pytest.mark.parametrize("timed", [True, False])
def test_the_production_stack_is_dlrm_hstu(targets: list[int] | None, timed: bool) -> None:
    model, lengths = production(), [7, 0, 1, 12, 5]
    x = normal(generator(3), 25, 10).double()
    since = (torch.rand(25, generator=generator(4)) * 21).exp().long() if timed else None  # to beyond the last row
    times = torch.randint(0, 10**6, (25,), generator=generator(5)) if timed else None
    layout = Layout(
        lengths_to_offsets(torch.tensor(lengths)),
        23,
        times,
        times + since if times is not None and since is not None else None,
        None if targets is None else torch.tensor(targets),
    )
    expected = production_oracle(model, x, lengths, targets or [0] * 5, since, 23)
    torch.testing.assert_close(model(x, layout), expected, rtol=0, atol=1e-10)


def test_production_has_no_bias_in_attention_and_research_has_both_unless_told() -> None:
    def biases(**options: Any) -> tuple[bool, bool, bool]:
        model = HSTU(PRODUCTION, HSTUOptions(**options), OpsConfig())
        layer = model.layers[0]
        return layer.position_weight is not None, layer.time_weight is not None, model.needs_times

    assert biases() == (True, True, True)
    assert biases(variant="production") == (False, False, False)
    assert biases(bias="position") == (True, False, False)
    assert biases(bias="none") == (False, False, False)
    assert biases(variant="production", bias="position_time") == (True, True, True)
