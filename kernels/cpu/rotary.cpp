// Rotary positions on the CPU: spreads the rows over threads. Arguments as in npu_rec.ops.rotary.
#include "ops.h"

namespace npu_rec {

Tensor rotary_turn(
    const Tensor& values, const Tensor& cosines, const Tensor& sines, bool interleaved, bool back,
    const std::string& isa) {
  const Kernels kernels = kernels_of(isa);
  const Tensor x = values.stride(2) == 1 ? values : values.contiguous();
  const Tensor cos = cosines.to(at::kFloat).contiguous(), sin = sines.to(at::kFloat).contiguous();
  TORCH_CHECK(cos.size(0) == x.size(0) && cos.size(1) == x.size(2) && sin.sizes() == cos.sizes(), "angles do not fit");
  Tensor out = at::empty(x.sizes(), x.options());
  RotaryTask task{};
  task.heads = x.size(1), task.dim = x.size(2);
  task.dtype = dtype_of(x);
  task.x = x.const_data_ptr(), task.out = out.mutable_data_ptr();
  task.stride_row = x.stride(0), task.stride_head = x.stride(1);
  task.cos = cos.const_data_ptr<float>(), task.sin = sin.const_data_ptr<float>();
  task.interleaved = interleaved, task.back = back;
  for_rows(x.size(0), task.heads * task.dim, [&](int64_t begin, int64_t end) {
    RotaryTask t = task;
    t.begin = begin, t.end = end;
    kernels.rotary(t);
  });
  return out;
}

}  // namespace npu_rec
