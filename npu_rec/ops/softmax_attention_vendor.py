"""`softmax_attention` by `torch_npu.npu_fusion_attention`, in its layout TND: packed tokens and ends of sequences.

    softmax(scale * q k^T, where not masked) @ v

A mask is a pattern in a compressed matrix: causal is its sparse mode 3, a causal band its mode 4. Ends of sequences go
in as Python integers, so the host waits for the device once a batch. The backward pass runs the forward again: the
statistics it wants have a layout that differs between releases, and nothing but q, k and v is kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from npu_rec.ops.registry import Backend
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest
from npu_rec.ops.vendor_support import TORCH_NPU, dtype_refused, outside, vendor_operator

_COMMON = {
    "query": "Tensor",
    "key": "Tensor",
    "value": "Tensor",
    "head_num": "int",
    "input_layout": "str",
    "atten_mask": "Optional[Tensor]",
    "pre_tockens": "int",
    "next_tockens": "int",
    "actual_seq_qlen": "Optional[List[int]]",
    "actual_seq_kvlen": "Optional[List[int]]",
    "sparse_mode": "int",
}
FORWARD = vendor_operator(TORCH_NPU, "npu::npu_fusion_attention", scale="float", **_COMMON)
BACKWARD = vendor_operator(
    TORCH_NPU,
    "npu::npu_fusion_attention_grad",
    dy="Tensor",
    softmax_max="Optional[Tensor]",
    softmax_sum="Optional[Tensor]",
    softmax_in="Optional[Tensor]",
    attention_in="Optional[Tensor]",
    scale_value="float",
    seed="int",
    offset="int",
    numels="int",
    **_COMMON,
)

MOST_SEQUENCES = 1024
MOST_TOKENS = 2**20
WIDEST = 768
EVERYTHING, CAUSAL, BAND = 0, 3, 4  # sparse_mode
UNLIMITED = 2**31 - 1
COMPRESSED = 2048  # rows and columns of the matrix that a pattern is given as


def supports(request: SoftmaxAttentionRequest) -> str | None:
    """float32, float16 and bfloat16; causal, with a window or without, or no mask at all."""
    return (
        FORWARD.unusable(request.q)
        or BACKWARD.unusable(request.q)
        or request.beyond_packed_attention()
        or dtype_refused((torch.float32, torch.float16, torch.bfloat16), request.q)
        or outside("the batch", request.offsets.shape[0] - 1, 1, MOST_SEQUENCES)
        or outside("T", request.q.shape[0], 1, MOST_TOKENS)
        or outside("the number of heads", request.q.shape[1], 1, 256)
        or outside("the head width", max(request.q.shape[2], request.v.shape[2]), 1, WIDEST)
    )


@cache
def _later(device: torch.device) -> Tensor:
    """True where a column comes after the row: what the patterns hide."""
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu_(1)


_ends = WeakTensorKeyDictionary()  # offsets -> their ends


def _ends_of(offsets: Tensor) -> list[int]:
    ends: list[int] | None = _ends.get(offsets)
    if ends is None:
        ends = _ends[offsets] = offsets[1:].tolist()
    return ends


def _widened(x: Tensor, request: SoftmaxAttentionRequest) -> Tensor:
    """Zeros appended up to one width for q, k and v; neither q k^T nor the first channels of the result change."""
    return pad(x, (0, max(request.q.shape[2], request.v.shape[2]) - x.shape[2])).contiguous()


def _arguments(request: SoftmaxAttentionRequest) -> dict[str, Any]:
    rule, ends = request.rule, _ends_of(request.offsets)
    window = rule.max_attn_len
    return {
        "query": _widened(request.q, request),
        "key": _widened(request.k, request),
        "value": _widened(request.v, request),
        "head_num": request.q.shape[1],
        "input_layout": "TND",
        "atten_mask": _later(request.q.device) if rule.causal else None,
        "pre_tockens": window if window > 0 else UNLIMITED,
        "next_tockens": 0 if rule.causal else UNLIMITED,
        "actual_seq_qlen": ends,
        "actual_seq_kvlen": ends,
        "sparse_mode": EVERYTHING if not rule.causal else BAND if window > 0 else CAUSAL,
    }


def forward(request: SoftmaxAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    out: Tensor = FORWARD(scale=request.scale, **_arguments(request))[0]
    return out[..., : request.v.shape[2]].contiguous()


def backward(request: SoftmaxAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v; there is no bias."""
    arguments = _arguments(request)
    out, softmax_max, softmax_sum, softmax_in, seed, offset, numels = FORWARD(scale=request.scale, **arguments)
    dq, dk, dv, *_ = BACKWARD(
        dy=_widened(grad.to(request.v.dtype), request),
        softmax_max=softmax_max,
        softmax_sum=softmax_sum,
        softmax_in=softmax_in,
        attention_in=out,
        scale_value=request.scale,
        seed=seed,
        offset=offset,
        numels=numels,
        **arguments,
    )
    qk, v = request.q.shape[2], request.v.shape[2]
    return dq[..., :qk].contiguous(), dk[..., :qk].contiguous(), dv[..., :v].contiguous(), None, None


BACKEND = Backend("vendor", forward, backward, supports)
