// The kernels for x86-64 with AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#define NPU_REC_ISA avx512
#define NPU_REC_VECTOR 16
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
Kernels kernels_avx512() {
  using namespace avx512;
  return {{hstu_forward, hstu_backward, hstu_scratch}, {softmax_forward, softmax_backward, softmax_scratch},
          token_losses, token_gradients, norm_gate, dropout, random_integers, rms_norm, swiglu, rotary, row_gradients,
          update_rows, 16};
}
}  // namespace npu_rec
#else
#include "kernels.h"
namespace npu_rec {
Kernels kernels_avx512() { return {}; }
}  // namespace npu_rec
#endif
