"""`sampled_softmax_loss` at the size of MovieLens-1M."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from npu_rec.bench.harness import COPIES, Contender, Row, compare, usable
from npu_rec.device import Device
from npu_rec.ops import sampled_softmax_loss
from npu_rec.ops.sampled_softmax_loss_request import SampledSoftmaxRequest


def run(device: Device, repeats: int) -> list[Row]:
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

    copies = [inputs() for _ in range(COPIES)]
    queries, rows, positives, negatives_drawn = copies[0]
    request = SampledSoftmaxRequest(queries, rows, positives, negatives_drawn, None, 0.05, True)
    contenders = [Contender("gathered PyTorch", gathered)]
    contenders += [
        Contender(backend, partial(sampled_softmax_loss, temperature=0.05, backend=backend))
        for backend in usable("sampled_softmax_loss", request)
    ]
    shape = f"T={total} R={negatives} D={dim} U={count}"
    return compare("loss", shape, contenders, copies, device, repeats=repeats)
