"""Operators: one public function a file, a plain PyTorch reference beside every faster backend."""

from npu_rec.ops.dropout import dropout
from npu_rec.ops.embedding_lookup import embedding_lookup
from npu_rec.ops.hstu_attention import hstu_attention
from npu_rec.ops.linear_silu import linear_silu
from npu_rec.ops.norm_gate import norm_gate
from npu_rec.ops.registry import OPERATORS, Backend, Operator
from npu_rec.ops.relative_bias import RelativeBias
from npu_rec.ops.rms_norm import rms_norm
from npu_rec.ops.rotary import rotary
from npu_rec.ops.row_optimizer import RowOptimizer
from npu_rec.ops.sampled_softmax_loss import sampled_softmax_loss
from npu_rec.ops.softmax_attention import softmax_attention
from npu_rec.ops.swiglu import swiglu

__all__ = [
    "OPERATORS",
    "Backend",
    "Operator",
    "RelativeBias",
    "RowOptimizer",
    "dropout",
    "embedding_lookup",
    "hstu_attention",
    "linear_silu",
    "norm_gate",
    "rms_norm",
    "rotary",
    "sampled_softmax_loss",
    "softmax_attention",
    "swiglu",
]
