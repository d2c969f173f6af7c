"""Llama, GPT, SASRec and HSTU's ablations: padded oracles in plain PyTorch, causality, packing, initial values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from backbone_cases import (
    CASES,
    CONFIG,
    ITEMS,
    ORACLES,
    Batch,
)
from strategies import generator, one_thread  # noqa: F401
from torch import Tensor, nn

from npu_rec.config import Config, ModelConfig, OpsConfig, load_config
from npu_rec.errors import BackendError, CheckpointError, ConfigError
from npu_rec.models import Layout, SequenceEncoder
from npu_rec.models.meta_weights import to_meta_state_dict
from npu_rec.ops.jagged import padded_to_jagged
from npu_rec.ops.random import random_key
from npu_rec.registry import lookup


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("targets", [None, (0, 0, 3, 1, 9)])
def test_jagged_is_what_the_padded_model_gives(name: str, targets: tuple[int, ...] | None) -> None:
    batch, model = Batch.random(7, 0, 17, 1, 12, targets=targets), CASES[name].build()
    expected = ORACLES[CASES[name].backbone](model, CASES[name].schema, batch.pad(batch.x), batch)
    torch.testing.assert_close(
        model(batch.x, batch.layout()), padded_to_jagged(expected, batch.offsets), rtol=0, atol=1e-10
    )


# --- what a token sees


@pytest.mark.parametrize("name", CASES)
def test_later_events_never_change_an_earlier_output(name: str) -> None:
    """The time of the next event is known to HSTU's time bias and input times; no other time and no id after it is."""
    model, g = CASES[name].encoder(), generator(0)
    ids, offsets = torch.randint(1, ITEMS + 1, (17,), generator=g), torch.tensor([0, 17])
    times = (torch.rand(18, generator=g) * 14).exp().long().cumsum(0)
    before = model(ids, offsets, times[:-1], times[1:])
    for place in (0, 1, 9, 15):
        other_ids, other_times = ids.clone(), times.clone()
        other_ids[place + 1 :] = other_ids[place + 1 :] % ITEMS + 1
        other_times[place + 2 :] = other_times[place + 2 :].flip(0) + 10**6
        after = model(other_ids, offsets, other_times[:-1], other_times[1:])
        torch.testing.assert_close(after[: place + 1], before[: place + 1], rtol=0, atol=1e-12)
        assert not torch.isclose(after[place + 1 :], before[place + 1 :]).all(1).any()
        earlier = ids.clone()
        earlier[0] = earlier[0] % ITEMS + 1
        assert not torch.isclose(model(earlier, offsets, times[:-1], times[1:]), before).all(1).any()


@pytest.mark.parametrize("name", CASES)
def test_the_output_of_a_candidate_does_not_depend_on_its_slot(name: str) -> None:
    model, batch = CASES[name].build(), Batch.random(12, targets=(4,))
    query_times = batch.query_times.clone()
    query_times[8:] = batch.times[-1]  # that of the request
    order = torch.tensor([*range(8), 10, 8, 11, 9])
    straight = replace(batch, query_times=query_times)
    turned = replace(straight, x=batch.x[order], times=batch.times[order], query_times=query_times[order])
    expected = model(straight.x, straight.layout())[order]
    torch.testing.assert_close(model(turned.x, turned.layout()), expected, rtol=0, atol=1e-12)


# --- packing, dropout, recomputation


def keys_of(batch: Batch, rows: list[int]) -> Tensor:
    """Dropout keys of tokens by sequence and place, as a task makes them."""
    own = [random_key(7, "dropout", 3, row, torch.arange(n)) for row, n in zip(rows, batch.lengths, strict=True)]
    return torch.cat(own)


def outputs_and_gradients(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    out = call()
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_is_encoded_alone_as_in_a_batch_dropout_included(name: str) -> None:
    model, batch = CASES[name].build().train(), Batch.random(5, 0, 9, 4)
    whole = model(batch.x, batch.layout(keys_of(batch, [0, 1, 2, 3])))
    assert not torch.allclose(whole, model(batch.x, batch.layout()))
    for row in range(4):
        own = batch.part(row)
        alone = model(own.x, own.layout(keys_of(own, [row])))
        expected = whole[int(batch.offsets[row]) : int(batch.offsets[row + 1])]
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_recomputation_changes_neither_outputs_nor_gradients(name: str) -> None:
    model, batch = CASES[name].build().train(), Batch.random(5, 0, 9, 1)
    keys, calls = keys_of(batch, [0, 1, 2, 3]), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = outputs_and_gradients(model, lambda: model(batch.x, batch.layout(keys)))
    assert len(calls) == 2
    model.recompute = True
    again = outputs_and_gradients(model, lambda: model(batch.x, batch.layout(keys)))
    assert len(calls) == 2 + 4
    assert len(plain) == len(again) == 1 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert model.eval()(batch.x, batch.layout()).shape == (15, 12)
    assert len(calls) == 2 + 4 + 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_nothing_to_encode_gives_nothing_and_zero_gradients(name: str, lengths: tuple[int, ...]) -> None:
    model, batch = CASES[name].build(), Batch.random(*lengths)
    out = model(batch.x, batch.layout())
    assert out.shape == (0, 12)
    out.sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert not parameter.grad.any(), parameter_name


@pytest.mark.parametrize("backbone", ["llama", "gpt", "sasrec"])
def test_every_place_drops_differently(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def noted(layout: Layout, part: int, real: Callable[..., Any] = Layout.keys_for) -> Any:
        keys = real(layout, part)
        seen.append(keys)
        return keys

    monkeypatch.setattr(Layout, "keys_for", noted)
    batch = Batch.random(5, 9)
    CASES[backbone].build()(batch.x, batch.layout(keys_of(batch, [0, 1])))
    assert len(seen) == 2 * 3  # attention weights and two more, in two layers
    assert torch.cat(seen).unique().shape == (2 * 3 * 14,)


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_results_are_near_and_weights_stay(name: str) -> None:
    exact, batch = CASES[name].build().float(), Batch.random(5, 0, 9)
    small = replace(batch, x=batch.x.float())
    expected = outputs_and_gradients(exact, lambda: exact(small.x, small.layout()))
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(exact, lambda: exact(small.x, small.layout()))
    assert {x.dtype for x in found} == {torch.float32}
    ours, theirs = (torch.cat([x.flatten() for x in results]) for results in (found, expected))
    assert float((ours - theirs).norm()) <= 0.1 * float(theirs.norm())


@pytest.mark.parametrize("name", ["llama", "gpt position_time 30", "sasrec original", "hstu softmax"])
def test_they_compile_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    model, batch = CASES[name].build(), Batch.random(5, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch.x, batch.layout()), model(batch.x, batch.layout()), rtol=0, atol=1e-10)


# --- sizes and initial values


@pytest.mark.parametrize(
    ("backbone", "options", "expected"),
    [
        ("llama", {}, 2 * (3 * 2500 + 2500 + 3 * 160 * 50 + 2 * 50) + 50),
        ("llama", {"hidden_dim": 133}, 2 * (4 * 2500 + 3 * 133 * 50 + 2 * 50) + 50),
        ("gpt", {}, 2 * (4 * 2500 + 4 * 50 + 8 * 2500 + 250 + 4 * 50) + 100),
        ("gpt", {"bias": "position_time"}, 2 * (12 * 2500 + 650 + 421 + 129) + 100),
        ("sasrec", {}, 2 * (6 * 2500 + 6 * 50)),
        ("sasrec", {"variant": "original"}, 2 * (6 * 2500 + 6 * 50 + 4 * 50) + 100),
        ("hstu", {"bias": "position"}, 2 * (13_100 - 129)),
        ("hstu", {"gate": False}, 2 * (13_100 - 2500)),
        ("hstu", {"norm": "rms", "residual": "post", "scores": "softmax"}, 2 * 13_100),
    ],
)
def test_parameters_and_operations_are_as_many_as_the_equations_say(
    backbone: str, options: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        model = lookup("model", backbone).target(
            ModelConfig(), lookup("model", backbone).options(**options), OpsConfig()
        )
    assert sum(p.numel() for p in model.parameters()) == expected
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    one = model.flops(torch.tensor([1]))
    assert one == 2 * matrices + 2 * 2 * (50 + 50)  # two layers' products of one query with one key and one value
    assert model.flops(torch.tensor([3, 0])) == 3 * 2 * matrices + 6 * 2 * 2 * (50 + 50)


def fresh(backbone: str, **options: Any) -> SequenceEncoder:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone,
        embedding_dim=128,
        num_blocks=2,
        num_heads=2,
        attention_dim=64,
        linear_dim=64,
        max_seq_len=389,
    )
    return SequenceEncoder(
        config, lookup("model", backbone).options(**options), OpsConfig(), num_items=5, seed=0
    ).requires_grad_(False)


def std(x: Tensor) -> float:
    return float(x.std())


def test_initial_values_are_as_published() -> None:
    about = lambda value: pytest.approx(value, rel=0.04)  # noqa: E731
    llama = fresh("llama", bias="position_time")
    assert llama.positions is None
    for layer in llama.backbone.layers:
        for weight in (layer.attention.qkv, layer.attention.output, layer.inner, layer.outer):
            assert std(weight.weight) == about(0.02)
            assert weight.bias is None
        assert torch.equal(layer.attention_norm.weight, torch.ones(128))
        assert std(layer.attention.position_weight) == pytest.approx(0.02, rel=0.15)
        assert std(layer.attention.time_weight) == pytest.approx(0.02, rel=0.25)

    gpt = fresh("gpt")
    assert std(gpt.positions) == about(0.02)
    for layer in gpt.backbone.layers:
        for matrix, size in ((layer.attention.qkv, 0.02), (layer.inner, 0.02), (layer.outer, 0.01)):
            assert std(matrix.weight) == about(size)
            assert not matrix.bias.any()
        assert std(layer.attention.output.weight) == about(0.01)  # 0.02 / sqrt(2 * 2)

    meta, original = fresh("sasrec"), fresh("sasrec", variant="original")
    assert std(meta.positions) == about(128**-0.5 * 0.8796)  # cut at two deviations
    assert float(meta.positions.abs().max()) <= 2 * 128**-0.5
    assert std(original.positions) == about((2 / (400 + 128)) ** 0.5)
    for model in (meta, original):
        for layer in model.backbone.layers:
            assert std(layer.attention.qkv.weight) == about((2 / (128 + 3 * 128)) ** 0.5)
            for matrix in (layer.attention.output, layer.inner, layer.outer):
                assert std(matrix.weight) == about((2 / 256) ** 0.5)
            assert not layer.attention.qkv.bias.any()
            assert not layer.attention.output.bias.any()


# --- by configuration


def test_configurations_of_ml_1m_differ_in_the_backbone_alone() -> None:
    def settings(name: str) -> dict[str, Any]:
        dumped = load_config(f"ml-1m/{name}.yaml").model_dump()
        assert dumped.pop("name") == f"ml-1m-{name}"
        assert dumped["model"].pop("backbone") == name
        return dumped

    expected = settings("hstu")
    for name in ("llama", "gpt", "sasrec"):
        assert settings(name) == expected


@pytest.mark.parametrize("name", CASES)
def test_who_needs_times_and_who_shares_sequences(name: str) -> None:
    options = dict(CASES[name].options)
    model = CASES[name].build()
    research = CASES[name].backbone == "hstu" and options.get("variant") != "production" and "bias" not in options
    assert model.needs_times == (options.get("bias") == "position_time" or research)
    shares = CASES[name].backbone == "hstu" and options.get("bias") != "rope" and options.get("scores") != "softmax"
    assert model.takes_context == shares


def test_rotary_positions_turn_pairs() -> None:
    odd = CONFIG.model_copy(update={"attention_dim": 5})
    for name in ("llama", "hstu rope"):
        with pytest.raises(
            ConfigError, match=r"model.attention_dim: rotary positions turn pairs of channels, 5 is odd"
        ):
            CASES[name].build(config=odd)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hstu softmax", "model.options.scores"),
        ("hstu False", "model.options.gate"),
        ("hstu rms", "model.options.norm"),
        ("hstu post", "model.options.residual"),
        ("hstu rope", "time_weight"),
        ("llama", "backbone"),
    ],
)
def test_other_models_have_no_weights_of_meta_s(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"not a research HSTU: .*{reason}"):
        to_meta_state_dict(CASES[name].encoder())


def test_operators_take_the_backend_of_the_configuration() -> None:
    config = Config.model_validate({"ops": {"softmax_attention": "nothing", "rms_norm": "nothing"}})
    batch = Batch.random(3)
    for name in ("llama", "gpt", "hstu softmax"):
        target = lookup("model", CASES[name].backbone).target
        model = target(CONFIG, CASES[name].schema, config.ops).double()
        with pytest.raises(BackendError, match="no backend 'nothing'"):
            model(batch.x, batch.layout())
