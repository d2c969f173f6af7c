"""`softmax_attention` by the FlashAttention that PyTorch has for CUDA, over packed tokens.

It takes neither a bias nor a mask but causal, with a window or without, and draws its dropout in its own way, so
requests with those go to the next backend. Offsets go in as int32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from npu_rec.device.cuda import compute_capability
from npu_rec.ops.registry import Backend
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest
from npu_rec.ops.vendor_support import dtype_refused, outside

WIDEST = 256


def card_refused(tensor: Tensor) -> str | None:
    """None when the card of the tensor has FlashAttention, or the reason why not."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device.type}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without FlashAttention"
    if compute_capability(tensor.device.index or 0) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    return None


def supports(request: SoftmaxAttentionRequest) -> str | None:
    """float16 and bfloat16; causal, with a window or without, or no mask at all."""
    return (
        card_refused(request.q)
        or request.beyond_packed_attention()
        or dtype_refused((torch.float16, torch.bfloat16), request.q)
        or outside("the batch", request.offsets.shape[0] - 1, 1, 2**31 - 1)
        or outside("T", request.q.shape[0], 1, 2**31 - 1)
        or outside("the head width", max(request.q.shape[2], request.v.shape[2]), 1, WIDEST)
    )


def _widened(x: Tensor, request: SoftmaxAttentionRequest) -> Tensor:
    """Zeros appended to a common width, a multiple of 8; neither q k^T nor the first channels of the result change."""
    width = -(-max(request.q.shape[2], request.v.shape[2]) // 8) * 8
    return pad(x, (0, width - x.shape[2])).contiguous()


def _packed(request: SoftmaxAttentionRequest) -> dict[str, Any]:
    ends = request.offsets.to(torch.int32)
    longest = request.max_seq_len  # of the model, known without asking the card
    return {"cum_seq_q": ends, "cum_seq_k": ends, "max_q": longest, "max_k": longest, "dropout_p": 0.0}


def _mask(request: SoftmaxAttentionRequest) -> dict[str, Any]:
    window = request.rule.max_attn_len
    return {
        "is_causal": request.rule.causal,
        "scale": request.scale,
        "window_size_left": window if window > 0 else None,
        "window_size_right": 0 if window > 0 else None,
    }


def _attend(request: SoftmaxAttentionRequest) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """q, k, v as they went in, and what came out: the result, log of the sums, random state."""
    inputs = [_widened(x, request) for x in (request.q, request.k, request.v)]
    results = torch.ops.aten._flash_attention_forward(
        *inputs, **_packed(request), return_debug_mask=False, **_mask(request)
    )
    return inputs, results


def forward(request: SoftmaxAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    out: Tensor = _attend(request)[1][0]
    return out[..., : request.v.shape[2]].contiguous()


def backward(request: SoftmaxAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v; the forward pass runs again, nothing but q, k and v is kept. There is no bias."""
    inputs, (out, sums, state, unused, _) = _attend(request)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        _widened(grad.to(request.v.dtype), request),
        *inputs,
        out,
        sums,
        rng_state=state,
        unused=unused,
        **_packed(request),
        **_mask(request),
    )
    qk, v = request.q.shape[2], request.v.shape[2]
    return dq[..., :qk].contiguous(), dk[..., :qk].contiguous(), dv[..., :v].contiguous(), None, None


BACKEND = Backend("flash", forward, backward, supports)
