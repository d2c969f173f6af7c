"""Operators: one public function a file, a plain PyTorch reference beside every faster backend."""

from npu_rec.ops.embedding_lookup import embedding_lookup
from npu_rec.ops.hstu_attention import hstu_attention
from npu_rec.ops.norm_gate import norm_gate
from npu_rec.ops.registry import OPERATORS, Backend, Operator
from npu_rec.ops.relative_bias import RelativeBias
from npu_rec.ops.row_optimizer import RowOptimizer
from npu_rec.ops.sampled_softmax_loss import sampled_softmax_loss

__all__ = [
    "OPERATORS",
    "Backend",
    "Operator",
    "RelativeBias",
    "RowOptimizer",
    "embedding_lookup",
    "hstu_attention",
    "norm_gate",
    "sampled_softmax_loss",
]
