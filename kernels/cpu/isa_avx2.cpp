// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define NPU_REC_ISA avx2
#define NPU_REC_VECTOR 8
#include "dropout_rows.inc"
#include "embedding_rows.inc"
#include "hstu_attention_head.inc"
#include "norm_gate_rows.inc"
#include "random_rows.inc"
#include "rms_norm_rows.inc"
#include "rotary_rows.inc"
#include "sampled_softmax_tokens.inc"
#include "softmax_attention_head.inc"
#include "swiglu_rows.inc"

namespace npu_rec {
Kernels kernels_avx2() {
  using namespace avx2;
  return {{hstu_forward, hstu_backward, hstu_scratch}, {softmax_forward, softmax_backward, softmax_scratch},
          token_losses, token_gradients, norm_gate, dropout, random_integers, rms_norm, swiglu, rotary, row_gradients,
          update_rows, 8};
}
}  // namespace npu_rec
#else
#include "kernels.h"
namespace npu_rec {
Kernels kernels_avx2() { return {}; }
}  // namespace npu_rec
#endif
