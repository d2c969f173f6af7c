// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define NPU_REC_ISA avx2
#define NPU_REC_VECTOR 8
#include "hstu_attention_head.inc"
#include "sampled_softmax_tokens.inc"

namespace npu_rec {
Kernels kernels_avx2() {
  return {avx2::forward, avx2::backward, avx2::scratch_floats, avx2::token_losses, avx2::token_gradients, 8};
}
}  // namespace npu_rec
#else
#include "kernels.h"
namespace npu_rec {
Kernels kernels_avx2() { return {}; }
}  // namespace npu_rec
#endif
