"""What is benchmarked, at which shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from npu_rec.bench.harness import Contender, Row, compare
from npu_rec.config import Config, OpsConfig
from npu_rec.data.batch import JaggedBatch
from npu_rec.device import Device
from npu_rec.ops import OPERATORS, RelativeBias, hstu_attention, hstu_attention_reference, sampled_softmax_loss
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import lengths_to_offsets
from npu_rec.ops.masks import MaskRule
from npu_rec.registry import resolve
from npu_rec.tasks import DataFacts, Task, build_task
from npu_rec.train.throughput import matmul_flops

_COPIES = 2
_BUCKETS = 128


def run_suite(name: str, device: Device, *, repeats: int = 5) -> list[Row]:
    """Run one of `SUITES`; the first contender of each case is the one the others are measured against."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SUITES[name](device, repeats, matmul_flops(device, torch.float32))


def _attention(device: Device, repeats: int, gemm: float) -> list[Row]:
    cases = [
        (1024, 4, 64, [1024, 1000, 860, 640, 520, 410, 250, 130]),
        (4096, 4, 64, [2200, 1320]),
        (211, 2, 25, [int(n) for n in torch.linspace(10, 211, 32)]),
    ]
    rows = []
    for n, heads, dim, lengths in cases:
        shape = f"B={len(lengths)} N={n} H={heads} D={dim} T={sum(lengths)}"
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        flops = 3.5 * 4 * heads * dim * pairs  # two products forward, five backward, the causal half
        copies = [_attention_inputs(device, n, heads, dim, lengths) for _ in range(_COPIES)]
        contenders = [Contender("padded PyTorch", partial(_padded_attention, n))]
        request = _request(n, *copies[0])
        contenders += [
            Contender(backend, partial(_fused_attention, n, backend)) for backend in _usable("hstu_attention", request)
        ]
        rows += compare("attention", shape, contenders, copies, device, repeats=repeats, flops=flops, gemm_flops=gemm)
    return rows


def _attention_inputs(device: Device, n: int, heads: int, dim: int, lengths: list[int]) -> tuple[Tensor, ...]:
    at = device.torch_device
    q, k, v = torch.randn(3, sum(lengths), heads, dim, device=at).unbind()
    position, time = torch.randn(2 * n - 1, device=at), torch.randn(_BUCKETS + 1, device=at)
    # gaps between events from a second to some weeks, as in logs
    keys = [(torch.rand(length) * 14).exp().long().cumsum(0) for length in lengths]
    queries = [torch.cat([key[1:], key[-1:]]) for key in keys]
    offsets = lengths_to_offsets(torch.tensor(lengths))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, position, time)]
    return (*leaves, *(x.to(at) for x in (torch.cat(queries), torch.cat(keys), offsets)))


def _request(
    n: int, q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor, *rest: Tensor
) -> HSTUAttentionRequest:
    query_time, key_time, offsets = rest
    return HSTUAttentionRequest(
        q, k, v, offsets, None, position, time, query_time, key_time, n, 1.0, float(n), MaskRule()
    )


def _padded_attention(n: int, *inputs: Tensor) -> Tensor:
    """What one writes without an operator, as Meta's research code: padded to N, bias and buckets included."""
    return hstu_attention_reference.attention(_request(n, *inputs), *inputs[:5], pad_to=n)


def _fused_attention(n: int, backend: str, *inputs: Tensor) -> Tensor:
    q, k, v, position, time, query_time, key_time, offsets = inputs
    bias = RelativeBias(position, time, query_time, key_time)
    return hstu_attention(q, k, v, offsets, max_seq_len=n, bias=bias, backend=backend)


def _loss(device: Device, repeats: int, gemm: float) -> list[Row]:
    total, negatives, dim, count = 19_000, 128, 50, 3_416
    at = device.torch_device

    def inputs() -> tuple[Tensor, ...]:
        queries = normalize(torch.randn(total, dim, device=at)).requires_grad_()
        rows = normalize(torch.randn(count, dim, device=at)).requires_grad_()
        drawn = torch.randint(count, (total, negatives + 1), device=at)
        return queries, rows, drawn[:, 0].contiguous(), drawn[:, 1:].contiguous()

    def gathered(queries: Tensor, rows: Tensor, positives: Tensor, drawn: Tensor) -> Tensor:
        logits = torch.einsum("td,trd->tr", queries, rows[drawn]) / 0.05
        logits = logits.masked_fill(drawn == positives.unsqueeze(1), float("-inf"))
        own = (queries * rows[positives]).sum(1, keepdim=True) / 0.05
        return -torch.cat([own, logits], 1).log_softmax(1)[:, 0]

    operator = OPERATORS["sampled_softmax_loss"]
    contenders = [Contender("gathered PyTorch", gathered)]
    contenders += [
        Contender(b.name, partial(sampled_softmax_loss, temperature=0.05, backend=b.name))
        for b in operator.backends
        if b.name != "reference" and b.supports(operator.sample(at)) is None
    ]
    shape = f"T={total} R={negatives} D={dim} U={count}"
    copies = [inputs() for _ in range(_COPIES)]
    return compare("loss", shape, contenders, copies, device, repeats=repeats, flops=None, gemm_flops=gemm)


def _train_step(device: Device, repeats: int, gemm: float) -> list[Row]:
    """Loss and gradients of research HSTU as on MovieLens-1M: 2 layers, 128 sequences of up to 200 events."""
    count, at = 3_416, device.torch_device
    facts = DataFacts(count, torch.arange(1, count + 1), torch.ones(count + 1, dtype=torch.int64), True)
    tasks = []
    for backend in ("reference", "auto"):
        ops = OpsConfig(hstu_attention=backend, sampled_softmax_loss=backend)
        tasks.append(build_task(resolve(Config(ops=ops)), facts).to(at))
    lengths = torch.cat([torch.arange(20, 200, 3), torch.full((68,), 200)])
    offsets, total = lengths_to_offsets(lengths), int(lengths.sum())

    def batch() -> JaggedBatch:
        times = torch.randint(10**8, (total,)).sort().values
        ids = torch.randint(1, count + 1, (2, total))
        return JaggedBatch(torch.arange(len(lengths)), offsets, ids[0], ids[1], times, times + 60).to(at)

    def mean_loss(task: Task, batch: JaggedBatch, *parameters: Tensor) -> Tensor:
        losses, weights = task.loss(batch, 0)
        return losses / weights

    # the parameters stand among the inputs because the gradients of inputs are what is timed
    batches = [batch() for _ in range(_COPIES)]
    contenders = [
        Contender(name, partial(mean_loss, task), tuple(task.parameters()))
        for name, task in zip(("references", "auto"), tasks, strict=True)
    ]
    shape = f"2 layers B={len(lengths)} T={total} D=50"
    flops = 3.0 * tasks[1].flops(lengths)
    copies = [(batch,) for batch in batches]
    return compare("train-step", shape, contenders, copies, device, repeats=repeats, flops=flops, gemm_flops=gemm)


def _usable(operator: str, request: object) -> list[str]:
    backends = OPERATORS[operator].backends
    return [b.name for b in backends if b.name != "reference" and b.supports(request) is None]


SUITES: dict[str, Callable[[Device, int, float], list[Row]]] = {
    "attention": _attention,
    "loss": _loss,
    "train-step": _train_step,
}
