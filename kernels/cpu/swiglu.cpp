// SwiGLU on the CPU: spreads the rows over threads. Arguments as in npu_rec.ops.swiglu.
#include "ops.h"

namespace npu_rec {
namespace {

void run(const Tensor& values, const OptionalTensor& grad, const Tensor& out, const std::string& isa) {
  const Kernels kernels = kernels_of(isa);
  const Tensor x = with_whole_rows(values);
  SwiGLUTask task{};
  task.width = x.size(1) / 2, task.stride_x = x.stride(0);
  task.dtype = dtype_of(x);
  task.x = x.const_data_ptr(), task.out = out.mutable_data_ptr();
  if (grad) task.grad = grad->const_data_ptr(), task.stride_grad = grad->stride(0);
  for_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
    SwiGLUTask t = task;
    t.begin = begin, t.end = end;
    kernels.swiglu(t);
  });
}

}  // namespace

Tensor swiglu_forward(const Tensor& x, const std::string& isa) {
  Tensor out = at::empty({x.size(0), x.size(1) / 2}, x.options());
  run(x, {}, out, isa);
  return out;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& x, const std::string& isa) {
  const Tensor g = with_whole_rows(grad.to(x.scalar_type()));
  TORCH_CHECK(g.size(0) == x.size(0) && 2 * g.size(1) == x.size(1), "grad and x do not fit");
  Tensor dx = at::empty(x.sizes(), x.options());
  run(x, g, dx, isa);
  return dx;
}

}  // namespace npu_rec
