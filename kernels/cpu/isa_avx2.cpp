// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define NPU_REC_ISA avx2
#define NPU_REC_VECTOR 8
#include "embedding_rows.inc"
#include "hstu_attention_head.inc"
#include "norm_gate_rows.inc"
#include "sampled_softmax_tokens.inc"

namespace npu_rec {
Kernels kernels_avx2() {
  using namespace avx2;
  return {forward, backward, scratch_floats, token_losses, token_gradients, norm_gate, row_gradients, update_rows, 8};
}
}  // namespace npu_rec
#else
#include "kernels.h"
namespace npu_rec {
Kernels kernels_avx2() { return {}; }
}  // namespace npu_rec
#endif
