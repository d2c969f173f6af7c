"""`hstu_attention` by `mxrec::hstu_jagged.equal` of RecSDK.

Its mask: a row among the first `num_context` sees all columns before the targets; another row sees itself and what is
before it, but a target (in groups of 1) no other target. That is ours (`npu_rec.ops.masks`) wherever the contextual
tokens are all there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import hstu_attention_vendor_limits as shared
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.vendor_support import REC_OPS, outside, vendor_operator

_ARGUMENTS = {
    "q": "Tensor",
    "k": "Tensor",
    "v": "Tensor",
    "mask_type": "int",
    "max_seq_len": "int",
    "silu_scale": "float",
    "seq_offset": "Tensor",
    "num_context": "Optional[Tensor]",
    "num_target": "Optional[Tensor]",
    "target_group_size": "Optional[int]",
    "alpha": "Optional[float]",
}
FORWARD = vendor_operator(REC_OPS, "mxrec::hstu_jagged.equal", **_ARGUMENTS)
BACKWARD = vendor_operator(REC_OPS, "mxrec::hstu_jagged_backward.equal", grad="Tensor", **_ARGUMENTS)

WIDEST = 512
MOST_CONTEXT = 128  # of the backward pass; the forward pass takes 256
MOST_TARGETS = 512
CAUSAL, NO_MASK = 0, 2  # mask_type


def limits(request: HSTUAttentionRequest) -> str | None:
    """None when the call is within the documented limits and the masks are the same, or the reason."""
    reason = shared.limits(request, WIDEST, (torch.float32, torch.float16, torch.bfloat16))
    if reason is not None:
        return reason
    context, targets = request.rule.contextual_seq_len, request.num_targets
    if not request.rule.causal and (context > 0 or targets is not None):
        return "contextual tokens and targets need causal attention"
    batch = shared.extremes(request)
    reason = outside("contextual_seq_len", context, 0, MOST_CONTEXT) or outside(
        "the largest num_targets", batch.most_targets, 0, MOST_TARGETS
    )
    if reason is not None:
        return reason
    if (context or batch.most_targets) and context + batch.most_targets >= request.max_seq_len:
        return "contextual tokens and targets fill max_seq_len"
    if batch.least_before_targets < context:
        return f"a sequence has fewer than contextual_seq_len = {context} tokens before its targets"
    return None


def _arguments(request: HSTUAttentionRequest) -> dict[str, object]:
    q, k, v = shared.widened(request)
    context, targets = request.rule.contextual_seq_len, request.num_targets
    arguments: dict[str, object] = {
        "q": q,
        "k": k,
        "v": v,
        "mask_type": CAUSAL if request.rule.causal else NO_MASK,
        "max_seq_len": request.max_seq_len,
        "silu_scale": 1.0 / request.divisor,
        "seq_offset": request.offsets,
        "alpha": request.alpha,
    }
    if context > 0 or targets is not None:  # both or neither
        batch = request.offsets.shape[0] - 1
        arguments["num_context"] = request.offsets.new_full((batch,), context)
        arguments["num_target"] = request.offsets.new_zeros(batch) if targets is None else targets
        arguments["target_group_size"] = 1
    return arguments


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    out: Tensor = FORWARD(**_arguments(request))
    return out[..., : request.v.shape[2]].contiguous()


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    arguments = _arguments(request)
    dq, dk, dv, _ = BACKWARD(grad=shared.widen(grad, request), **arguments)
    return shared.narrowed(request, dq, dk, dv)
