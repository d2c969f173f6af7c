"""All operators in one function: compiled without a graph break, exported, and watched by PyTorch's modes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from strategies import (
    assert_all_close,
    forward_and_gradients,
    generator,
    normal,
    one_thread,  # noqa: F401
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from npu_rec.ops import RelativeBias, embedding_lookup, hstu_attention, norm_gate, sampled_softmax_loss
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.random import random_integers, random_key

ITEMS, WIDTH, HEADS = 30, 8, 2


def leaves() -> dict[str, Tensor]:
    """Parameters in float64."""
    seed = generator(0)
    return {
        "table": normal(seed, ITEMS, WIDTH).double(),
        "weight": normal(seed, WIDTH, scale=0.3).double(),
        "position_weight": normal(seed, 2 * 16 - 1).double(),
        "time_weight": normal(seed, 65).double(),
    }


def small_model(ids: Tensor, offsets: Tensor, num_targets: Tensor | None, times: Tensor) -> Callable[..., Tensor]:
    """Lookup, attention with bias, gate with dropout and loss: a function of the parameters."""

    def run(table: Tensor, weight: Tensor, position_weight: Tensor, time_weight: Tensor) -> Tensor:
        x = embedding_lookup(table, ids)
        heads = x.view(-1, HEADS, WIDTH // HEADS)
        attended = hstu_attention(
            heads,
            heads,
            heads * 0.5,
            offsets,
            max_seq_len=16,
            num_targets=num_targets,
            contextual_seq_len=1,
            max_attn_len=4,
            bias=RelativeBias(position_weight, time_weight, times + 60, times),
        )
        keys = random_key(3, "dropout", 1, ids, torch.arange(ids.shape[0]))
        y = norm_gate(attended.flatten(1), x, weight, dropout=0.25, dropout_keys=keys)
        rows = torch.nn.functional.normalize(table, dim=1)
        queries = torch.nn.functional.normalize(x + y, dim=1)
        negatives = random_integers(random_key(3, "negatives", 1, ids), 6, ITEMS)
        return sampled_softmax_loss(queries, rows, ids, negatives, temperature=0.1)

    return run


def batch(*lengths: int, targets: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    total = sum(lengths)
    offsets = lengths_to_offsets(torch.tensor(lengths))
    ids = torch.randint(ITEMS, (total,), generator=generator(total))
    num_targets = torch.tensor([min(n, 2) for n in lengths]) if targets else None
    return ids, offsets, num_targets, torch.arange(total) * 1000


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break_gives_the_same_outputs_and_gradients(dynamic: bool) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(
        given: dict[str, Tensor], ids: Tensor, offsets: Tensor, targets: Tensor | None, times: Tensor
    ) -> Tensor:
        return small_model(ids, offsets, targets, times)(**given)

    for case in (batch(5, 0, 9), batch(5, 0, 9, targets=False), batch(3, 16, 1, 7)):
        expected = forward_and_gradients(small_model(*case), leaves(), 0)
        actual = forward_and_gradients(lambda case=case, **given: compiled(given, *case), leaves(), 0)
        assert_all_close(actual, expected, 1e-12)


def test_dynamic_compilation_serves_other_lengths_without_compiling_again() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(given: dict[str, Tensor], ids: Tensor, offsets: Tensor, targets: Tensor, times: Tensor) -> Tensor:
        return small_model(ids, offsets, targets, times)(**given)

    counts = []
    for lengths in ((5, 4, 9), (3, 16, 2, 7), (2, 2), (11, 6, 5)):
        case = batch(*lengths)
        torch.testing.assert_close(compiled(leaves(), *case), small_model(*case)(**leaves()))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


def test_exported_program_gives_the_same_losses_for_other_lengths() -> None:
    class Model(torch.nn.Module):
        def forward(
            self, given: dict[str, Tensor], ids: Tensor, offsets: Tensor, targets: Tensor, times: Tensor
        ) -> Tensor:
            return small_model(ids, offsets, targets, times)(**given)

    total, sequences = torch.export.Dim("total", min=2), torch.export.Dim("sequences", min=2)
    shapes = {
        "given": dict.fromkeys(leaves(), None),
        "ids": {0: total},
        "offsets": {0: sequences + 1},
        "targets": {0: sequences},
        "times": {0: total},
    }
    program = torch.export.export(Model(), (leaves(), *batch(5, 4, 9)), dynamic_shapes=shapes)
    case = batch(3, 16, 2, 7)
    torch.testing.assert_close(program.module()(leaves(), *case), small_model(*case)(**leaves()))


def test_a_training_step_runs_inside_a_torch_dispatch_mode() -> None:
    case = batch(5, 0, 9)
    expected = forward_and_gradients(small_model(*case), leaves(), 0)
    with FlopCounterMode(display=False):
        actual = forward_and_gradients(small_model(*case), leaves(), 0)
    assert_all_close(actual, expected, 1e-12)


def test_two_threads_give_what_one_gives() -> None:
    case = batch(16, 0, 9, 16, 16, 3)
    expected = forward_and_gradients(small_model(*case), leaves(), 0)
    torch.set_num_threads(2)
    try:
        actual = forward_and_gradients(small_model(*case), leaves(), 0)
    finally:
        torch.set_num_threads(1)
    assert_all_close(actual, expected, 1e-11)


def test_a_whole_batch_is_the_sum_of_its_sequences() -> None:
    ids, offsets, _, times = batch(7, 0, 4, 16)

    def losses(first: int, last: int) -> Tensor:
        """Of the sequences first..last-1, on their own; without dropout and draws, which go by place here."""
        tokens = slice(int(offsets[first]), int(offsets[last]))
        part = offsets[first : last + 1] - offsets[first]
        given = leaves()
        x = embedding_lookup(given["table"], ids[tokens])
        heads = x.view(-1, HEADS, WIDTH // HEADS)
        bias = RelativeBias(given["position_weight"], given["time_weight"], times[tokens] + 60, times[tokens])
        attended = hstu_attention(heads, heads, heads, part, max_seq_len=16, bias=bias)
        y = norm_gate(attended.flatten(1), x, given["weight"])
        negatives = random_integers(random_key(0, "negatives", ids[tokens]), 5, ITEMS)
        return sampled_softmax_loss(y, given["table"], ids[tokens], negatives, temperature=1.0)

    apart = torch.cat([losses(b, b + 1) for b in range(4)])
    torch.testing.assert_close(losses(0, 4), apart, rtol=1e-12, atol=1e-12)
