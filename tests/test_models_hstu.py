"""HSTU's research model against an oracle written from its equations, by Meta's names; packing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hstu_cases import ITEMS, Histories
from strategies import generator, normal, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.errors import CheckpointError
from npu_rec.models import SequenceEncoder
from npu_rec.models.hstu import HSTU, HSTUOptions, build_research_hstu
from npu_rec.models.meta_weights import load_meta_state_dict, to_meta_state_dict


@dataclass(frozen=True)
class Shape:
    """A small research model. N = 16."""

    width: int = 12
    blocks: int = 2
    heads: int = 2
    value_dim: int = 5
    attention_dim: int = 4
    history: int = 9
    output: int = 7

    def build(self) -> nn.Module:
        return build_research_hstu(
            num_items=ITEMS,
            embedding_dim=self.width,
            num_blocks=self.blocks,
            num_heads=self.heads,
            linear_dim=self.value_dim,
            attention_dim=self.attention_dim,
            max_sequence_len=self.history,
            max_output_len=self.output,
        )

    def meta_state(self, seed: int = 0) -> dict[str, Tensor]:
        """Weights under Meta's names and in Meta's shapes, large enough for every part to matter."""
        g, longest, inner = generator(seed), self.history + self.output, self.heads * self.value_dim
        state = {
            "_embedding_module._item_emb.weight": normal(g, ITEMS + 1, self.width, scale=0.3),
            "_input_features_preproc._pos_emb.weight": normal(g, longest, self.width, scale=0.5),
        }
        for i in range(self.blocks):
            layer = f"_hstu._attention_layers.{i}"
            columns = 2 * inner + 2 * self.heads * self.attention_dim
            state |= {
                f"{layer}._uvqk": normal(g, self.width, columns, scale=0.8),
                f"{layer}._o.weight": normal(g, self.width, inner, scale=0.5),
                f"{layer}._o.bias": normal(g, self.width),
                f"{layer}._rel_attn_bias._ts_w": normal(g, 129),
                f"{layer}._rel_attn_bias._pos_w": normal(g, 2 * longest - 1),
            }
        return state


SMALL = Shape()


def meta_user_vectors(state: dict[str, Tensor], shape: Shape, given: Histories) -> Tensor:
    """Meta's research HSTU (arXiv 2402.17152) in float64: padded [B, N, N], one head after the other."""
    state = {name: value.double() for name, value in state.items()}
    count, longest = len(given.ids), shape.history + shape.output
    ids, times = torch.zeros(count, longest, dtype=torch.int64), torch.zeros(count, longest, dtype=torch.int64)
    for b, (own, seconds) in enumerate(zip(given.ids, given.times, strict=True)):
        ids[b, : len(own)] = torch.tensor(own, dtype=torch.int64)
        times[b, : len(own)] = torch.tensor(seconds, dtype=torch.int64)
        if len(own) < longest:
            times[b, len(own)] = given.requests[b]
    x = state["_embedding_module._item_emb.weight"][ids] * math.sqrt(shape.width)
    x = (x + state["_input_features_preproc._pos_emb.weight"]) * (ids != 0).unsqueeze(2)

    extended = torch.cat([times, times[:, longest - 1 :]], 1)  # the last row has no next event
    gap = extended[:, 1:].unsqueeze(2) - extended[:, :-1].unsqueeze(1)
    bucket = (torch.log(gap.abs().clamp(min=1)) / 0.301).long().clamp(0, 128)
    place = torch.arange(longest)
    mask = (place.unsqueeze(0) <= place.unsqueeze(1)).double()
    inner = shape.heads * shape.value_dim
    for i in range(shape.blocks):
        layer = f"_hstu._attention_layers.{i}"
        z = silu(layer_norm(x, (shape.width,), eps=1e-6) @ state[f"{layer}._uvqk"])
        narrow = shape.heads * shape.attention_dim
        u, v, q, k = z.split([inner, inner, narrow, narrow], 2)
        bias = state[f"{layer}._rel_attn_bias._pos_w"][place.unsqueeze(0) - place.unsqueeze(1) + longest - 1]
        bias = bias + state[f"{layer}._rel_attn_bias._ts_w"][bucket]
        out = []
        for a in range(shape.heads):
            own = slice(a * shape.attention_dim, (a + 1) * shape.attention_dim)
            scores = torch.einsum("bid,bjd->bij", q[..., own], k[..., own]) + bias
            weights = silu(scores) / longest * mask
            out.append(weights @ v[..., a * shape.value_dim : (a + 1) * shape.value_dim])
        gated = u * layer_norm(torch.cat(out, 2), (inner,), eps=1e-6)
        x = gated @ state[f"{layer}._o.weight"].T + state[f"{layer}._o.bias"] + x
    users = [x[b, n] for b, own in enumerate(given.ids) for n in range(len(own))]
    vectors = torch.stack(users) if users else x.new_empty(0, shape.width)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-6)


def check_against_meta(shape: Shape, given: Histories) -> None:
    state, model = shape.meta_state(), shape.build()
    load_meta_state_dict(model, state)
    expected = meta_user_vectors(state, shape, given)
    encoded = model.encode(*given.packed())
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.double().encode(*given.packed()), expected, rtol=0, atol=1e-10)


# --- research: parameters


@pytest.mark.parametrize(
    ("name", "width", "heads", "head_dim", "blocks", "longest", "layer", "total"),
    [
        ("ML-1M", 50, 1, 50, 2, 211, 13_100, 26_200),
        ("ML-1M large", 50, 2, 25, 8, 211, 13_100, 104_800),
        ("ML-20M", 256, 4, 64, 4, 211, 328_486, 1_313_944),
        ("ML-20M large", 256, 8, 32, 16, 211, 328_486, 5_255_776),
        ("Books", 64, 4, 16, 4, 61, 20_794, 83_176),
        ("Books large", 64, 8, 8, 16, 61, 20_794, 332_704),
    ],
)
def test_parameters_are_as_many_as_in_meta_s_code(
    name: str, width: int, heads: int, head_dim: int, blocks: int, longest: int, layer: int, total: int
) -> None:
    with torch.device("meta"):
        backbone = HSTU(
            ModelConfig(
                embedding_dim=width,
                num_blocks=blocks,
                num_heads=heads,
                attention_dim=head_dim,
                linear_dim=head_dim,
                max_seq_len=longest - 11,
            ),
            HSTUOptions(),
            OpsConfig(),
        )
    counts = [sum(p.numel() for p in block.parameters()) for block in backbone.layers]
    assert counts == [layer] * blocks
    assert sum(p.numel() for p in backbone.parameters()) == total


def test_the_encoder_adds_an_item_table_and_positions() -> None:
    model = SMALL.build()
    own = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert own == {"items.weight": (ITEMS + 1) * SMALL.width, "positions": 16 * SMALL.width}


def test_initial_values_are_distributed_as_in_meta_s_code() -> None:
    model = build_research_hstu(
        num_items=3000,
        embedding_dim=64,
        num_blocks=1,
        num_heads=2,
        linear_dim=32,
        attention_dim=32,
        max_sequence_len=500,
        max_output_len=11,
    )
    layer = model.requires_grad_(False).backbone.layers[0]
    assert float(layer.uvqk.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(layer.position_weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(layer.time_weight.std()) == pytest.approx(0.02, rel=0.25)
    assert float(layer.output.weight.abs().max()) == pytest.approx(math.sqrt(6 / 128), rel=0.01)
    assert float(model.positions.std()) == pytest.approx(math.sqrt(2 / (511 + 64)), rel=0.03)
    assert float(model.items.weight.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)  # cut at two deviations
    assert float(model.items.weight.abs().max()) < 0.0401


# --- research: the encoder is Meta's


@pytest.mark.parametrize(
    "shape",
    [SMALL, Shape(heads=1), Shape(heads=3, value_dim=2, attention_dim=7), Shape(blocks=3, history=15, output=1)],
)
def test_the_research_encoder_is_meta_s(shape: Shape) -> None:
    check_against_meta(shape, Histories.random(5, 9, 1, 0, 7))


def test_the_last_row_of_a_full_sequence_uses_its_own_time() -> None:
    full = Histories.random(16, 3, 15)
    full.requests[0] = full.times[0][-1]
    check_against_meta(SMALL, full)


def test_tokens_with_id_0_come_in_as_zeros() -> None:
    given = Histories.random(6, 4)
    given.ids[0][2] = given.ids[0][3] = given.ids[1][0] = 0
    check_against_meta(SMALL, given)
    state = SMALL.meta_state()
    state["_embedding_module._item_emb.weight"][0] = 1e3
    before, after = SMALL.build(), SMALL.build()
    load_meta_state_dict(before, SMALL.meta_state())
    load_meta_state_dict(after, state)
    assert torch.equal(before.encode(*given.packed()), after.encode(*given.packed()))


def test_equal_and_far_times_fall_into_the_end_buckets() -> None:
    given = Histories([[1, 2, 3, 4]], [[0, 0, 3, 2**31 - 5]], [2**31 - 2])
    check_against_meta(SMALL, given)


def test_vectors_have_length_one() -> None:
    vectors = SMALL.build().encode(*Histories.random(3, 0, 8).packed())
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(11))


def test_a_prefix_is_encoded_as_in_the_whole_sequence() -> None:
    model, given = SMALL.build().double(), Histories.random(9)
    load_meta_state_dict(model, SMALL.meta_state())
    whole = model.encode(*given.packed())
    prefix = Histories([given.ids[0][:4]], [given.times[0][:4]], [given.times[0][4]])
    torch.testing.assert_close(model.encode(*prefix.packed()), whole[:4], rtol=0, atol=1e-12)


# --- research: weights in and out


def test_the_prefix_and_the_mask_of_meta_s_checkpoints_are_accepted() -> None:
    plain, wrapped = SMALL.build(), SMALL.build()
    state = SMALL.meta_state()
    load_meta_state_dict(plain, state)
    load_meta_state_dict(
        wrapped, {f"module.{name}": value for name, value in (state | {"_attn_mask": torch.ones(16, 16)}).items()}
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[name])


@pytest.mark.parametrize("name", sorted(SMALL.meta_state()))
def test_a_missing_or_misshapen_tensor_is_named(name: str) -> None:
    model = SMALL.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = SMALL.meta_state()
    whole = state.pop(name)
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        load_meta_state_dict(model, state)
    with pytest.raises(CheckpointError, match=rf"{name} has \[[\d, ]+\], the model wants \[[\d, ]+\] as "):
        load_meta_state_dict(model, state | {name: whole[1:]})
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])  # refused as a whole


@pytest.mark.parametrize("name", ["_hstu._attention_layers.2._uvqk", "_output_postproc._layer_norm.weight", "epoch"])
def test_an_unknown_tensor_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"unknown {name}"):
        load_meta_state_dict(SMALL.build(), SMALL.meta_state() | {name: torch.zeros(3)})


def test_many_problems_are_counted() -> None:
    with pytest.raises(CheckpointError, match="and 7 more"):
        load_meta_state_dict(SMALL.build(), {})


@pytest.mark.parametrize("options", [{"variant": "production"}, {"bias": "position"}, {"bias": "none"}])
def test_another_model_than_meta_s_research_one_is_refused(options: dict[str, Any]) -> None:
    config = ModelConfig(embedding_dim=12, num_heads=2, attention_dim=4, linear_dim=5, max_seq_len=9, max_output_len=7)
    model = SequenceEncoder(config, HSTUOptions(**options), OpsConfig(), num_items=ITEMS, seed=0)
    with pytest.raises(CheckpointError, match="not Meta's research HSTU"):
        load_meta_state_dict(model, SMALL.meta_state())
    with pytest.raises(CheckpointError, match="not a research HSTU: "):
        to_meta_state_dict(model)


def test_weights_come_out_as_they_went_in() -> None:
    state, model = SMALL.meta_state(), SMALL.build()
    load_meta_state_dict(model, state)
    out = to_meta_state_dict(model)
    assert out.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(out[name], value), name
        assert out[name].is_contiguous()


# --- packing


def test_a_sequence_is_encoded_the_same_alone_and_in_any_batch() -> None:
    model, given = SMALL.build().double(), Histories.random(5, 0, 9, 1, 3, 0)
    load_meta_state_dict(model, SMALL.meta_state())
    alone = {row: model.encode(*given.part(row).packed()) for row in range(6)}
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 3], [4, 2, 2, 1], [1, 5]):
        together = model.encode(*given.part(*order).packed())
        expected = torch.cat([alone[row] for row in order])
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)


def test_vectors_looked_up_elsewhere_are_encoded_alike() -> None:
    model, given = SMALL.build().double(), Histories.random(5, 0, 9)
    load_meta_state_dict(model, SMALL.meta_state())
    ids, *others = given.packed()
    plan = model.tables.plan({"items": torch.cat([ids, torch.tensor([1, 2])])})
    rows = model.tables.lookup(plan)["items"]
    found = model(ids, *others, vectors=rows[: len(ids)])
    assert torch.equal(found, model(ids, *others))
    found.square().sum().backward()
    planned = model.items.weight.grad.clone()
    model.zero_grad()
    model(ids, *others).square().sum().backward()
    torch.testing.assert_close(planned, model.items.weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["research", "production"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_nothing_to_encode_gives_nothing_and_zero_gradients(variant: str, lengths: tuple[int, ...]) -> None:
    config = ModelConfig(embedding_dim=12, num_heads=2, attention_dim=4, linear_dim=5, max_seq_len=9)
    model = SequenceEncoder(config, HSTUOptions(variant=variant), OpsConfig(), num_items=ITEMS, seed=0)
    encoded = model.encode(*Histories.random(*lengths).packed())
    assert encoded.shape == (0, 12)
    encoded.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
