// RMSNorm on the CPU: spreads the rows over threads. Arguments as in npu_rec.ops.rms_norm.
#include <algorithm>

#include "ops.h"

namespace npu_rec {
namespace {

constexpr int64_t LEAST_ROWS = 256, MOST_BLOCKS = 128;

struct Problem {
  Tensor x, weight;
  RMSNormTask task;
  Kernels kernels;

  Problem(const Tensor& values, const Tensor& w, double eps, const std::string& isa)
      : x(with_whole_rows(values)), weight(w.to(at::kFloat).contiguous()), task{}, kernels(kernels_of(isa)) {
    task.width = x.size(1), task.stride_x = x.stride(0);
    task.dtype = dtype_of(x);
    task.x = x.const_data_ptr(), task.weight = weight.const_data_ptr<float>();
    task.eps = float(eps);
  }
};

}  // namespace

Tensor rms_norm_forward(const Tensor& x, const Tensor& weight, double eps, const std::string& isa) {
  Problem p(x, weight, eps, isa);
  Tensor out = at::empty(x.sizes(), x.options());
  p.task.out = out.mutable_data_ptr();
  for_rows(x.size(0), p.task.width, [&](int64_t begin, int64_t end) {
    RMSNormTask t = p.task;
    t.begin = begin, t.end = end;
    p.kernels.rms_norm(t);
  });
  return out;
}

std::vector<Tensor> rms_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, double eps, const std::string& isa) {
  Problem p(x, weight, eps, isa);
  const Tensor g = with_whole_rows(grad.to(x.scalar_type()));
  TORCH_CHECK(g.sizes() == x.sizes(), "grad and x do not fit");
  Tensor dx = at::empty(x.sizes(), x.options());
  p.task.grad = g.const_data_ptr(), p.task.stride_grad = g.stride(0), p.task.out = dx.mutable_data_ptr();
  // each block of rows adds to sums of its own; blocks depend on T alone, so the bits do not depend on the threads
  const int64_t total = x.size(0), width = p.task.width;
  const int64_t rows = std::max(LEAST_ROWS, (total + MOST_BLOCKS - 1) / MOST_BLOCKS), blocks = (total + rows - 1) / rows;
  Tensor sums = at::zeros({blocks, width}, at::kFloat), d_weight = at::zeros({width}, at::kFloat);
  float *to_block = sums.mutable_data_ptr<float>(), *to_weight = d_weight.mutable_data_ptr<float>();
  for_rows(blocks, rows * width, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      RMSNormTask t = p.task;
      t.begin = block * rows, t.end = std::min(total, t.begin + rows);
      t.d_weight = to_block + block * width;
      p.kernels.rms_norm(t);
    }
  });
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < width; ++i) to_weight[i] += to_block[block * width + i];
  return {dx, d_weight.to(weight.scalar_type())};
}

}  // namespace npu_rec
