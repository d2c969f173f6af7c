"""`hstu_attention` by `mxrec::hstu_dense` of RecSDK: padded to max_seq_len, without targets and contextual tokens.

The operator knows no alpha, so q is multiplied by it. Padded rows and columns are zeros: silu(0) = 0 adds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import hstu_attention_vendor_limits as shared
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.jagged import jagged_to_padded, padded_to_jagged
from npu_rec.ops.vendor_support import REC_OPS, vendor_operator

_ARGUMENTS = {
    "q": "Tensor",
    "k": "Tensor",
    "v": "Tensor",
    "mask": "Optional[Tensor]",
    "attn_bias": "Optional[Tensor]",
    "mask_type": "int",
    "max_seq_len": "int",
    "silu_scale": "float",
}
FORWARD = vendor_operator(REC_OPS, "mxrec::hstu_dense", **_ARGUMENTS)
BACKWARD = vendor_operator(REC_OPS, "mxrec::hstu_dense_backward", grad="Tensor", **_ARGUMENTS)

WIDEST = 512
MOST_SPACE = 256 * 2**20  # bytes
CAUSAL, NO_MASK = 0, 2  # mask_type


def limits(request: HSTUAttentionRequest) -> str | None:
    """None when the call is within the documented limits, or the reason."""
    if request.rule.contextual_seq_len > 0 or request.num_targets is not None:
        return "takes no contextual tokens and no targets"
    reason = shared.limits(request, WIDEST, (torch.float32, torch.float16, torch.bfloat16))
    if reason is not None:
        return reason
    # its backward pass allocates a gradient of the bias whether there is one or not, N rounded up to 256
    length = request.max_seq_len + -request.max_seq_len % 256
    space = (request.offsets.shape[0] - 1) * request.q.shape[1] * length**2 * request.q.element_size()
    if space > MOST_SPACE:
        return f"its backward pass would allocate {space / 2**20:.0f} MiB for [B, H, N, N]; up to 256"
    return None


def _arguments(request: HSTUAttentionRequest) -> dict[str, object]:
    q, k, v = (jagged_to_padded(x, request.offsets, request.max_seq_len) for x in shared.widened(request))
    return {
        "q": q * request.alpha,
        "k": k,
        "v": v,
        "mask": None,
        "attn_bias": None,
        "mask_type": CAUSAL if request.rule.causal else NO_MASK,
        "max_seq_len": request.max_seq_len,
        "silu_scale": 1.0 / request.divisor,
    }


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    out: Tensor = FORWARD(**_arguments(request))
    return padded_to_jagged(out, request.offsets)[..., : request.v.shape[2]].contiguous()


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    padded = jagged_to_padded(shared.widen(grad, request), request.offsets, request.max_seq_len)
    grads = BACKWARD(grad=padded, **_arguments(request))
    dq, dk, dv = (padded_to_jagged(g, request.offsets) for g in grads[:3])
    return shared.narrowed(request, dq * request.alpha, dk, dv)
