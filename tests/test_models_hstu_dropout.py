"""Dropout, recomputation and compilation of HSTU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hstu_cases import ITEMS, PRODUCTION, Histories, randomise
from strategies import one_thread  # noqa: F401
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from npu_rec.config import OpsConfig
from npu_rec.models import SequenceEncoder, encoder, hstu_layer
from npu_rec.models.hstu import HSTUOptions
from npu_rec.ops.jagged import position_of_token, sequence_of_token
from npu_rec.ops.random import random_key


def dropping(variant: str = "research", blocks: int = 2) -> SequenceEncoder:
    """A training model with dropout everywhere, large enough weights, float64."""
    config = PRODUCTION.model_copy(update={"dropout": 0.4, "input_dropout": 0.3, "num_blocks": blocks})
    model = SequenceEncoder(config, HSTUOptions(variant=variant), OpsConfig(), num_items=ITEMS, seed=0).double()
    randomise(model, 1, 0.3)
    return model.train()


def dropout_keys(given: Histories, rows: list[int]) -> Tensor:
    """Keys of the tokens from sequence id and place, as a task makes them."""
    ids, offsets, *_ = given.packed()
    sequences = torch.tensor(rows)[sequence_of_token(offsets, ids.shape[0])]
    return random_key(7, "dropout", 3, sequences, position_of_token(offsets, ids.shape[0]))


def outputs_and_gradients(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    out = call()
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("variant", ["research", "production"])
def test_recomputation_changes_neither_outputs_nor_gradients(variant: str) -> None:
    model, given = dropping(variant), Histories.random(5, 0, 9, 1)
    keys, calls = dropout_keys(given, [0, 1, 2, 3]), []
    for layer in model.backbone.layers:
        layer.input_norm.register_forward_hook(lambda *_: calls.append(1))
    plain = outputs_and_gradients(model, lambda: model(*given.packed(), keys))
    assert len(calls) == 2
    model.backbone.recompute = True
    again = outputs_and_gradients(model, lambda: model(*given.packed(), keys))
    assert len(calls) == 2 + 4  # each layer ran again in the backward pass
    assert len(plain) == len(again) == 1 + len(list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["research", "production"])
def test_dropout_of_a_sequence_does_not_depend_on_its_batch(variant: str) -> None:
    model, given = dropping(variant), Histories.random(5, 0, 9, 4)
    whole = model(*given.packed(), dropout_keys(given, [0, 1, 2, 3]))
    starts = [0, 5, 5, 14, 18]
    for rows in ([2], [3, 0], [3, 2, 1, 0]):
        part = given.part(*rows)
        expected = torch.cat([whole[starts[row] : starts[row + 1]] for row in rows])
        torch.testing.assert_close(model(*part.packed(), dropout_keys(part, rows)), expected, rtol=0, atol=1e-12)


def test_dropout_is_on_in_every_place_and_only_with_keys() -> None:
    model, given = dropping(), Histories.random(5, 9)
    keys = dropout_keys(given, [0, 1])
    without = model(*given.packed())
    assert torch.equal(without, model.eval()(*given.packed()))
    dropped = model.train()(*given.packed(), keys)
    assert not torch.allclose(dropped, without)
    assert not torch.allclose(dropped, model(*given.packed(), keys + 1))
    for place in ("input_dropout", "dropout"):
        other = dropping()
        other.input_dropout = 0.0
        for layer in other.backbone.layers:
            layer.dropout = 0.0
        assert torch.equal(other(*given.packed(), keys), without)
        for part in [other] if place == "input_dropout" else other.backbone.layers:
            setattr(part, place, 0.4)
        assert not torch.allclose(other(*given.packed(), keys), without)


def test_the_input_and_every_layer_drop_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, dropout_keys: Tensor | None = None, **keywords: Any) -> Tensor:
            seen.append(arguments[-1] if dropout_keys is None else dropout_keys)
            return real(*arguments, **keywords)

        return call

    monkeypatch.setattr(hstu_layer, "norm_gate", record(hstu_layer.norm_gate))
    monkeypatch.setattr(encoder, "dropout", record(encoder.dropout))
    monkeypatch.setattr(hstu_layer, "dropout", record(hstu_layer.dropout))
    given = Histories.random(5, 9)
    for variant in ("research", "production"):
        seen.clear()
        dropping(variant, blocks=3)(*given.packed(), dropout_keys(given, [0, 1]))
        assert [keys.shape for keys in seen] == [(14,)] * 4
        assert torch.cat(seen).unique().shape == (4 * 14,)


# --- torch.compile


def test_the_compiled_research_encoder_is_the_eager_one() -> None:
    """Inductor, without a graph break; a second shape makes it compile for every shape."""
    torch._dynamo.reset()
    model = dropping(blocks=1).float()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in ((5, 9), (4, 1, 12), (3, 0, 8, 2, 7)):
        given = Histories.random(*lengths)
        keys = dropout_keys(given, list(range(len(lengths))))
        eager = outputs_and_gradients(model, lambda given=given, keys=keys: model(*given.packed(), keys))
        fast = outputs_and_gradients(model, lambda given=given, keys=keys: compiled(*given.packed(), keys))
        assert len(eager) == len(fast) == 1 + len(list(model.parameters()))
        for want, got in zip(eager, fast, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert counter.frame_count <= 2

    exact = outputs_and_gradients(model, lambda: model(*given.packed()))
    with torch.autocast("cpu", torch.bfloat16):
        eager = outputs_and_gradients(model, lambda: model(*given.packed()))
        fast = outputs_and_gradients(model, lambda: compiled(*given.packed()))
    for want, plain, got in zip(exact, eager, fast, strict=True):
        assert float((got - want).norm()) <= 2 * float((plain - want).norm()) + 1e-3 * float(want.norm())
