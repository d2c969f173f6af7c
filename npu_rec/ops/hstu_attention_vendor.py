"""`hstu_attention` by RecSDK's fused operators for Ascend (`torch.ops.mxrec`), for calls without a relative bias.

They take a bias only as a dense [B, H, N, N] tensor, which is what the relative bias exists to avoid. Three forms, the
first that takes a call runs it: `hstu_jagged` (all of Atlas A2, A3 and 950), `hstu_forward_v2` (950), `hstu_dense`
(padded). Their formula, and how ours is said in it:

    silu((q k^T + attn_bias) * alpha) * silu_scale * mask @ v        silu_scale = 1 / divisor
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from npu_rec.ops import hstu_attention_vendor_dense as dense
from npu_rec.ops import hstu_attention_vendor_jagged as jagged
from npu_rec.ops import hstu_attention_vendor_v2 as v2
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.vendor_support import VendorOperator


@dataclass(frozen=True)
class Form:
    """One of the operators with its backward pass."""

    operators: tuple[VendorOperator, VendorOperator]
    limits: Callable[[HSTUAttentionRequest], str | None]
    forward: Callable[[HSTUAttentionRequest], Tensor]
    backward: Callable[[HSTUAttentionRequest, Tensor], tuple[Tensor, Tensor, Tensor]]

    def refuses(self, request: HSTUAttentionRequest) -> str | None:
        """None when the form takes the call, or the reason why not."""
        for operator in self.operators:
            reason = operator.unusable(request.q, request.offsets)
            if reason is not None:
                return reason
        return self.limits(request)


FORMS = {
    "jagged": Form((jagged.FORWARD, jagged.BACKWARD), jagged.limits, jagged.forward, jagged.backward),
    "v2": Form((v2.FORWARD, v2.BACKWARD), v2.limits, v2.forward, v2.backward),
    "dense": Form((dense.FORWARD, dense.BACKWARD), dense.limits, dense.forward, dense.backward),
}


def supports(request: HSTUAttentionRequest) -> str | None:
    """The reason names every form that is there and refused."""
    there = {name: form for name, form in FORMS.items() if form.operators[0].registered}
    if not there:
        return jagged.FORWARD.unusable()
    if request.position_weight is not None:
        return "takes a bias only as a dense [B, H, N, N] tensor"
    if request.query_offsets is not None:
        return "takes as many queries as keys, no query_offsets"
    if request.rule.max_attn_len > 0:
        return "has no local window"
    reasons = []
    for name, form in there.items():
        reason = form.refuses(request)
        if reason is None:
            return None
        reasons.append(f"{name}: {reason}")
    return "; ".join(reasons)


def _form(request: HSTUAttentionRequest) -> Form:
    return next(form for form in FORMS.values() if form.refuses(request) is None)


def forward(request: HSTUAttentionRequest) -> Tensor:
    """`[T, H, Dv]`."""
    return _form(request).forward(request)


def backward(request: HSTUAttentionRequest, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v; there is no bias."""
    return *_form(request).backward(request, grad.to(request.v.dtype)), None, None


BACKEND = Backend("vendor", forward, backward, supports)
