"""Fused kernels: `cpu` (C++, built as `npu_rec._C`) and `triton`. `npu_rec.ops` and `npu_rec.bench` import them."""
