// The kernels for any processor.
#define NPU_REC_ISA plain
#define NPU_REC_VECTOR 4
#include "hstu_attention_head.inc"
#include "sampled_softmax_tokens.inc"

namespace npu_rec {
Kernels kernels_plain() {
  return {plain::forward, plain::backward, plain::scratch_floats, plain::token_losses, plain::token_gradients, 4};
}
}  // namespace npu_rec
