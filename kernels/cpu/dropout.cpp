// Dropout on the CPU: spreads the rows over threads. Arguments as in npu_rec.ops.dropout.
#include "ops.h"

namespace npu_rec {

Tensor dropout_forward(
    const Tensor& values, const Tensor& dropout_keys, int64_t largest_dropped, double scale, const std::string& isa) {
  const Kernels kernels = kernels_of(isa);
  const Tensor x = with_whole_rows(values), keys = dropout_keys.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  DropoutTask task{};
  task.width = x.size(1), task.stride_x = x.stride(0);
  task.dtype = dtype_of(x);
  task.x = x.const_data_ptr(), task.out = out.mutable_data_ptr();
  task.keys = keys.const_data_ptr<int64_t>();
  task.largest_dropped = int32_t(largest_dropped), task.scale = float(scale);
  for_rows(x.size(0), task.width, [&](int64_t begin, int64_t end) {
    DropoutTask t = task;
    t.begin = begin, t.end = end;
    kernels.dropout(t);
  });
  return out;
}

}  // namespace npu_rec
