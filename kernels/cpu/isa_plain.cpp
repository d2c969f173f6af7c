// The kernels for any processor.
#define NPU_REC_ISA plain
#define NPU_REC_VECTOR 4
#include "embedding_rows.inc"
#include "hstu_attention_head.inc"
#include "norm_gate_rows.inc"
#include "sampled_softmax_tokens.inc"

namespace npu_rec {
Kernels kernels_plain() {
  using namespace plain;
  return {forward, backward, scratch_floats, token_losses, token_gradients, norm_gate, row_gradients, update_rows, 4};
}
}  // namespace npu_rec
