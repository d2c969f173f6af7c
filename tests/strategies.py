"""Hypothesis strategies and small helpers that the operator tests share.

Tensors are not drawn element by element: a case holds its sizes and a seed, and is turned into
tensors by `make`. Values are drawn in float32, so that they are the same number in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, RelativeBias, hstu_attention, softmax_attention
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.random import random_key


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread in the modules that import this: small tensors on busy cores are up to 50 times slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BLOCK_BORDERS = (63, 64, 65, 128, 129)


def examples(count: int) -> settings:
    """The deterministic profile: `count` examples, the same in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


def backends(operator: str, *, but: str = "", interpreted: bool = True) -> list[str]:
    """The registered backends of an operator, except `but` and, on request, those that an interpreter would run.

    The vendor's operators need their card: without one, stand-ins are tested (test_ops_vendor_*.py). FlashAttention
    knows 16 bits alone (test_ops_softmax_attention_packed.py).
    """
    there = ("flash",) if torch.accelerator.is_available() else ("flash", "vendor")
    found = (b for b in OPERATORS[operator].backends if b.name not in there)
    return [b.name for b in found if b.name != but and (interpreted or not b.by_name_only)]


def known_backends(operator: str) -> str:
    """What an error about an unknown backend lists."""
    return ", ".join(["auto", *(b.name for b in OPERATORS[operator].backends)])


def interpreted(operator: str, backend: str) -> bool:
    """Whether an interpreter runs the backend, a hundred times slower than a device would."""
    return OPERATORS[operator].find(backend).by_name_only


@dataclass(frozen=True)
class Place:
    """Where a backend is tested, and how close to float64 its results must come, relative to the largest entry."""

    device: str
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        return 1e-11 if self.dtype == torch.float64 else 2e-5


def place_of(probe: Callable[[str, torch.dtype], object]) -> Place:
    """The first of CPU and accelerator, float64 before float32, where `probe` runs; skips when it runs nowhere."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    reasons = []
    for dtype in (torch.float64, torch.float32):
        for device in devices:
            try:
                probe(device, dtype)
            except BackendError as error:
                reasons.append(f"{device}, {dtype}: {error}")
            else:
                return Place(device, dtype)
    pytest.skip("; ".join(reasons))


@contextmanager
def unsupported_rejected() -> Iterator[None]:
    """An example that the backend says it cannot run does not count (hypothesis complains when most do not)."""
    try:
        yield
    except BackendError:
        reject()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=seed) * scale


def forward_and_gradients(function: Callable[..., Tensor], leaves: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """`{"out": function(**leaves), name: gradient, ...}` for a random gradient of `out`, float64 on the CPU."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    out = function(**leaves)
    # on a 2^-6 grid, so that it is the same number in every precision
    grad = (normal(generator(seed + 1), *out.shape) * 64).round() / 64
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out))  # raises where a gradient would be None
    return {
        "out": out.detach().cpu().double(),
        **{k: g.cpu().double() for k, g in zip(leaves, grads, strict=True)},
    }


def assert_all_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, floor: float = 1e-3
) -> None:
    """Every tensor within `tolerance` times its largest entry, or times `floor` where that is more."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        scale = float(want.abs().max()) if want.numel() else 0.0
        allowed = tolerance * max(scale, floor)
        torch.testing.assert_close(
            actual[name], want, rtol=0.0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


def max_error(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((actual[name] - want).abs().max()) for name, want in exact.items()}


def opcheck(name: str, backend: str, arguments: tuple[Any, ...]) -> None:
    """`torch.library.opcheck` of `npu_rec::name`.

    A reference whose backward pass uses `torch.func.vjp` cannot run inside the modes with which opcheck
    watches an operator's kernel: of its backward, mutation, aliasing and the fake kernel are checked by hand.
    """
    checked = getattr(torch.ops.npu_rec, name).default
    uses_vjp = backend == "reference" and name in (
        "hstu_attention_backward",
        "softmax_attention_backward",
        "sampled_softmax_loss_backward",
    )
    if not uses_vjp:
        torch.library.opcheck(checked, arguments)
        return
    torch.library.opcheck(checked, arguments, test_utils="test_autograd_registration")
    given = [x for x in arguments if isinstance(x, Tensor)]
    before = [x.clone() for x in given]
    results = checked(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True)), "an argument was changed"
    places = [x.untyped_storage().data_ptr() for x in results if x.numel()]
    assert not set(places) & {x.untyped_storage().data_ptr() for x in given}, "a result shares an argument's memory"
    assert len(set(places)) == len(places), "two results share memory"
    with FakeTensorMode() as mode:
        fakes = checked(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    for fake, result in zip(fakes, results, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest storage any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@dataclass(frozen=True)
class AttentionCase:
    """Everything that a call of `hstu_attention` is made of, except the numbers."""

    lengths: tuple[int, ...]
    num_targets: tuple[int, ...] | None = None
    max_seq_len: int = 129
    heads: int = 2
    qk_dim: int = 3
    v_dim: int = 5
    alpha: float = 1.0
    divisor: float | None = None
    causal: bool = True
    contextual_seq_len: int = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0
    bias: str = "none"  # none, position, time (that is: position and time)
    times: str = "sorted"  # sorted, tied, unsorted
    buckets: int = 128
    seed: int = 0

    def leaves(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors with a gradient: q, k, v and the weights of the bias."""
        seed, total = generator(self.seed), sum(self.lengths)
        leaves = {
            "q": normal(seed, total, self.heads, self.qk_dim),
            "k": normal(seed, total, self.heads, self.qk_dim),
            "v": normal(seed, total, self.heads, self.v_dim),
        }
        if self.bias != "none":
            leaves["position_weight"] = normal(seed, 2 * self.max_seq_len - 1)
        if self.bias == "time":
            leaves["time_weight"] = normal(seed, self.buckets + 1)
        return {name: leaf.to(device, dtype) for name, leaf in leaves.items()}

    def query_and_key_times(self) -> tuple[Tensor, Tensor]:
        """`[T]` int64 seconds each; differences fit int32. Unsorted: no relation at all between the two."""
        seed, total = generator(self.seed + 2), sum(self.lengths)
        start = 1_500_000_000
        if self.times == "unsorted":
            spread = torch.randint(-(10**9), 10**9, (2, total), generator=seed)
            near = torch.randint(-60, 60, (2, total), generator=seed)
            query, key = start + torch.where(torch.rand(total, generator=seed) < 0.5, spread, near)
            return query, key
        gaps = (torch.rand(total, generator=seed) * 14).exp().to(torch.int64)  # seconds to two weeks
        if self.times == "tied":
            gaps[torch.rand(total, generator=seed) < 0.6] = 0
        key = start + gaps.cumsum(0)
        return torch.cat([key[1:], key[-1:]]), key  # a query's time is that of the next event

    def call(self, backend: str, device: str = "cpu") -> Callable[..., Tensor]:
        """`hstu_attention` as a function of the leaves."""
        query_time, key_time = (time.to(device) for time in self.query_and_key_times())
        offsets = lengths_to_offsets(torch.tensor(self.lengths, dtype=torch.int64)).to(device)
        targets = None
        if self.num_targets is not None:
            targets = torch.tensor(self.num_targets, dtype=torch.int64, device=device)

        def run(
            q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor | None = None, time_weight: Tensor | None = None
        ) -> Tensor:
            bias = None
            if position_weight is not None:
                times = (None, None) if time_weight is None else (query_time, key_time)
                bias = RelativeBias(position_weight, time_weight, *times)
            return hstu_attention(
                q,
                k,
                v,
                offsets,
                max_seq_len=self.max_seq_len,
                alpha=self.alpha,
                divisor=self.divisor,
                causal=self.causal,
                num_targets=targets,
                contextual_seq_len=self.contextual_seq_len,
                max_attn_len=self.max_attn_len,
                min_full_attn_seq_len=self.min_full_attn_seq_len,
                bias=bias,
                backend=backend,
            )

        return run

    def softmax(self, backend: str, dropout: float = 0.0, device: str = "cpu") -> Callable[..., Tensor]:
        """`softmax_attention` as a function of the leaves; alpha is the scale."""
        query_time, key_time = (time.to(device) for time in self.query_and_key_times())
        targets = None if self.num_targets is None else torch.tensor(self.num_targets, dtype=torch.int64, device=device)
        keys, offsets = (
            self.dropout_keys().to(device),
            lengths_to_offsets(torch.tensor(self.lengths, dtype=torch.int64)),
        )

        def run(
            q: Tensor, k: Tensor, v: Tensor, position_weight: Tensor | None = None, time_weight: Tensor | None = None
        ) -> Tensor:
            times = (None, None) if time_weight is None else (query_time, key_time)
            return softmax_attention(
                q,
                k,
                v,
                offsets.to(device),
                max_seq_len=self.max_seq_len,
                scale=self.alpha,
                causal=self.causal,
                num_targets=targets,
                contextual_seq_len=self.contextual_seq_len,
                max_attn_len=self.max_attn_len,
                min_full_attn_seq_len=self.min_full_attn_seq_len,
                bias=None if position_weight is None else RelativeBias(position_weight, time_weight, *times),
                dropout=dropout,
                dropout_keys=keys,
                backend=backend,
            )

        return run

    def dropout_keys(self) -> Tensor:
        """`[T]` int64."""
        return random_key(self.seed, "dropout", torch.arange(sum(self.lengths)))

    def run_softmax(self, backend: str, place: Place, dropout: float = 0.0) -> dict[str, Tensor]:
        """`run` for `softmax_attention`."""
        leaves = self.leaves(place.dtype, place.device)
        return forward_and_gradients(self.softmax(backend, dropout, place.device), leaves, self.seed)

    def run(self, backend: str, place: Place) -> dict[str, Tensor]:
        """Output and gradients in float64, computed by `backend` in `place`."""
        leaves = self.leaves(place.dtype, place.device)
        return forward_and_gradients(self.call(backend, place.device), leaves, self.seed)


def lengths(largest: int, most: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Lengths of up to `most` sequences: empty and single ones, block borders, anything up to `largest`."""
    special = [n for n in (0, 1, *BLOCK_BORDERS) if n <= largest]
    return st.lists(st.sampled_from(special) | st.integers(0, largest), max_size=most).map(tuple)


@st.composite
def attention_cases(draw: st.DrawFn, largest: int = 129, widest: int = 20) -> AttentionCase:
    """Any mix of jagged lengths, masks, bias and times."""
    drawn = draw(lengths(largest))
    longest = max(drawn, default=0)
    targets = None
    if draw(st.booleans()):
        targets = tuple(draw(st.sampled_from([0, n]) | st.integers(0, min(n, 9))) for n in drawn)
    return AttentionCase(
        lengths=drawn,
        num_targets=targets,
        max_seq_len=max(1, longest + draw(st.sampled_from([0, 0, 1, 7]))),
        heads=draw(st.integers(1, 3)),
        qk_dim=draw(st.integers(1, widest)),
        v_dim=draw(st.integers(1, widest)),
        alpha=draw(st.sampled_from([1.0, 0.25, -0.7])),
        divisor=draw(st.sampled_from([None, 1.0, 7.5])),
        causal=draw(st.booleans()),
        contextual_seq_len=draw(st.sampled_from([0, 0, 1, 3]) | st.integers(0, largest)),
        max_attn_len=draw(st.sampled_from([0, 0, 1, 64]) | st.integers(0, largest)),
        min_full_attn_seq_len=draw(st.sampled_from([0, 0, 2]) | st.integers(0, largest)),
        bias=draw(st.sampled_from(["none", "position", "time"])),
        times=draw(st.sampled_from(["sorted", "tied", "unsorted"])),
        buckets=draw(st.sampled_from([128, 1, 40])),
        seed=draw(st.integers(0, 2**16)),
    )
