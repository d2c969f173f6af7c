"""`hstu_attention` by `mxrec::hstu_forward_v2` of RecSDK, for Ascend 950: attention without a mask alone.

In the releases read, the forward pass does not hand `mask_type` on and is tested without a mask only, and the first
backward passes refuse every mask. So causal attention is left to `hstu_jagged`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import hstu_attention_vendor_limits as shared
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.vendor_support import REC_OPS, vendor_operator

FORWARD = vendor_operator(
    REC_OPS,
    "mxrec::hstu_forward_v2",
    q="Tensor",
    k="Tensor",
    v="Tensor",
    mask="Optional[Tensor]",
    rab="Optional[Tensor]",
    mask_type="int",
    max_seq_len="int",
    max_seq_len_k="Optional[int]",
    silu_scale="Optional[float]",
    seq_offset="Tensor",
    seq_offset_k="Optional[Tensor]",
    num_context="Optional[Tensor]",
    num_target="Optional[Tensor]",
    target_group_size="Optional[int]",
    alpha="Optional[float]",
)
BACKWARD = vendor_operator(
    REC_OPS,
    "mxrec::hstu_backward_v2",
    grad="Tensor",
    q="Tensor",
    k="Tensor",
    v="Tensor",
    max_seqlen_q="int",
    max_seqlen_k="int",
    seq_offset_q="Tensor",
    seq_offset_k="Tensor",
    scale="Optional[float]",
    alpha="Optional[float]",
)

WIDEST = 256
NO_MASK = 2  # mask_type


def limits(request: HSTUAttentionRequest) -> str | None:
    """None when the call is within the documented limits, or the reason."""
    if request.rule.causal:
        return "has no causal mask"
    if request.rule.contextual_seq_len > 0 or request.num_targets is not None:
        return "takes no contextual tokens and no targets"
    return shared.limits(request, WIDEST, (torch.float16, torch.bfloat16))


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    q, k, v = shared.widened(request)
    offsets = request.offsets.to(torch.int32)
    out: Tensor = FORWARD(
        q=q,
        k=k,
        v=v,
        mask=None,
        rab=None,
        mask_type=NO_MASK,
        max_seq_len=request.max_seq_len,
        max_seq_len_k=request.max_seq_len,
        silu_scale=1.0 / request.divisor,
        seq_offset=offsets,
        seq_offset_k=offsets,
        num_context=None,
        num_target=None,
        target_group_size=None,
        alpha=request.alpha,
    )
    return out[..., : request.v.shape[2]].contiguous()


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    q, k, v = shared.widened(request)
    offsets = request.offsets.to(torch.int32)
    dq, dk, dv, _ = BACKWARD(
        grad=shared.widen(grad, request),
        q=q,
        k=k,
        v=v,
        max_seqlen_q=request.max_seq_len,
        max_seqlen_k=request.max_seq_len,
        seq_offset_q=offsets,
        seq_offset_k=offsets,
        scale=1.0 / request.divisor,
        alpha=request.alpha,
    )
    return shared.narrowed(request, dq, dk, dv)
