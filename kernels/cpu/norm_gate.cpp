// Normalise and gate on the CPU: spreads the rows over threads. Arguments as in npu_rec.ops.norm_gate.
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "ops.h"

namespace npu_rec {
namespace {

OptionalTensor floats(const OptionalTensor& x) {
  return x ? OptionalTensor(x->to(at::kFloat).contiguous()) : OptionalTensor();
}

struct Problem {
  Tensor x, gate;
  OptionalTensor weight, bias, keys;
  GateTask task;
  Kernels kernels;
  int64_t padded, pieces;  // the width rounded up to the vector; parts of the rows, at most one a thread

  Problem(
      const Tensor& values, const Tensor& gates, const OptionalTensor& w, const OptionalTensor& b,
      const OptionalTensor& dropout_keys, double eps, int64_t largest_dropped, double scale, const std::string& isa)
      : x(with_whole_rows(values)), gate(with_whole_rows(gates)), weight(floats(w)), bias(floats(b)), task{},
        kernels(kernels_of(isa)) {
    TORCH_CHECK(gate.scalar_type() == x.scalar_type() && gate.sizes() == x.sizes(), "x and gate do not fit");
    if (dropout_keys) keys = dropout_keys->contiguous();
    task.width = x.size(1);
    task.dtype = dtype_of(x);
    task.x = x.const_data_ptr(), task.gate = gate.const_data_ptr();
    task.stride_x = x.stride(0), task.stride_gate = gate.stride(0);
    if (weight) task.weight = weight->const_data_ptr<float>();
    if (bias) task.bias = bias->const_data_ptr<float>();
    if (keys) task.keys = keys->const_data_ptr<int64_t>();
    task.eps = float(eps);
    task.largest_dropped = int32_t(largest_dropped), task.scale = float(scale);
    padded = (task.width + kernels.vector - 1) / kernels.vector * kernels.vector;
    const int64_t worth = x.numel() / ELEMENTS_FOR_A_THREAD + 1;
    pieces = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), worth));
  }

  template <typename Body>
  void run(const Body& body) const {
    const int64_t total = x.size(0), step = (total + pieces - 1) / pieces;
    at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
      std::unique_ptr<float[]> scratch(new float[2 * padded]);
      for (int64_t piece = first; piece < last; ++piece) {
        GateTask t = task;
        t.begin = std::min(total, piece * step);
        t.end = std::min(total, t.begin + step);
        t.scratch = scratch.get();
        body(t, piece);
        kernels.norm_gate(t);
      }
    });
  }
};

}  // namespace

Tensor norm_gate_forward(
    const Tensor& x, const Tensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& keys, double eps, int64_t largest_dropped, double scale, const std::string& isa) {
  const Problem p(x, gate, weight, bias, keys, eps, largest_dropped, scale, isa);
  Tensor out = at::empty(x.sizes(), x.options());
  void* to = out.mutable_data_ptr();
  p.run([&](GateTask& t, int64_t) { t.out = to; });
  return out;
}

std::vector<Tensor> norm_gate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& keys, double eps, int64_t largest_dropped, double scale, const std::string& isa) {
  const Problem p(x, gate, weight, bias, keys, eps, largest_dropped, scale, isa);
  const Tensor g = with_whole_rows(grad.to(x.scalar_type()));
  TORCH_CHECK(g.sizes() == x.sizes(), "grad and x do not fit");
  Tensor dx = at::empty(x.sizes(), x.options()), d_gate = at::empty_like(dx);
  // each thread adds to sums of its own, which are added at the end: no conflicts, a fixed order
  Tensor d_weight = at::zeros({p.pieces, weight ? p.padded : 0}, at::kFloat);
  Tensor d_bias = at::zeros({p.pieces, bias ? p.padded : 0}, at::kFloat);
  void *to_x = dx.mutable_data_ptr(), *to_gate = d_gate.mutable_data_ptr();
  float *to_weight = d_weight.mutable_data_ptr<float>(), *to_bias = d_bias.mutable_data_ptr<float>();
  p.run([&](GateTask& t, int64_t piece) {
    t.grad = g.const_data_ptr(), t.stride_grad = g.stride(0);
    t.dx = to_x, t.d_gate = to_gate;
    t.d_weight = to_weight + piece * d_weight.size(1), t.d_bias = to_bias + piece * d_bias.size(1);
  });
  const auto total = [&](const Tensor& sums, const OptionalTensor& parameter) {
    return parameter ? sums.sum(0).narrow(0, 0, x.size(1)).to(parameter->scalar_type()).clone() : sums.sum(0);
  };
  return {dx, d_gate, total(d_weight, weight), total(d_bias, bias)};
}

}  // namespace npu_rec
