// The kernels for any processor.
#define NPU_REC_ISA plain
#define NPU_REC_VECTOR 4
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
Kernels kernels_plain() {
  using namespace plain;
  return {{hstu_forward, hstu_backward, hstu_scratch}, {softmax_forward, softmax_backward, softmax_scratch},
          token_losses, token_gradients, norm_gate, dropout, random_integers, rms_norm, swiglu, rotary, row_gradients,
          update_rows, 4};
}
}  // namespace npu_rec
