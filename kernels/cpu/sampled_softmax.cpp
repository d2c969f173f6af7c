// Sampled softmax on the CPU: spreads the tokens over threads. Arguments as in npu_rec.ops.sampled_softmax_loss.
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "ops.h"

namespace npu_rec {
namespace {

int64_t threads() { return std::max(1, at::get_num_threads()); }

struct Problem {
  Tensor queries, rows, positives, negatives;
  OptionalTensor log_q;
  TokensTask task;
  Kernels kernels;

  Problem(
      const Tensor& q, const Tensor& r, const Tensor& p, const Tensor& n, const OptionalTensor& log, double temperature,
      bool mask_collisions, const std::string& isa)
      : positives(p.contiguous()), negatives(n.contiguous()), task{}, kernels(kernels_of(isa)) {
    const int64_t width = (q.size(1) + kernels.vector - 1) / kernels.vector * kernels.vector;
    queries = padded(q, width);
    rows = padded(r, width);
    if (log) log_q = log->to(at::kFloat).contiguous();
    task.queries = queries.const_data_ptr<float>();
    task.rows = rows.const_data_ptr<float>();
    task.width = width;
    task.positives = positives.const_data_ptr<int64_t>();
    task.negatives = negatives.const_data_ptr<int64_t>();
    task.count = int(negatives.size(1));
    task.log_q = log_q ? log_q->const_data_ptr<float>() : nullptr;
    task.inverse_temperature = float(1.0 / temperature);
    task.mask_collisions = mask_collisions;
  }

  static Tensor padded(const Tensor& x, int64_t width) {
    const Tensor y = x.to(at::kFloat);
    return y.size(1) == width ? y.contiguous() : at::constant_pad_nd(y, {0, width - y.size(1)});
  }

  // Each thread takes one contiguous piece of the tokens, so that the bits depend on their number alone.
  template <typename Body>
  void run(const Body& body) const {
    const int64_t total = queries.size(0), pieces = threads(), step = (total + pieces - 1) / pieces;
    at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
      std::unique_ptr<float[]> scratch(new float[task.count + kernels.vector]);
      for (int64_t piece = first; piece < last; ++piece) {
        TokensTask t = task;
        t.begin = std::min(total, piece * step);
        t.end = std::min(total, t.begin + step);
        t.scratch = scratch.get();
        body(t, piece);
      }
    });
  }
};

}  // namespace

std::vector<Tensor> sampled_softmax_forward(
    const Tensor& queries, const Tensor& rows, const Tensor& positives, const Tensor& negatives,
    const OptionalTensor& log_q, double temperature, bool mask_collisions, const std::string& isa) {
  const Problem p(queries, rows, positives, negatives, log_q, temperature, mask_collisions, isa);
  Tensor loss = at::empty({queries.size(0)}, at::kFloat), logsumexp = at::empty_like(loss);
  float *to_loss = loss.mutable_data_ptr<float>(), *to_logsumexp = logsumexp.mutable_data_ptr<float>();
  p.run([&](TokensTask& t, int64_t) {
    t.loss = to_loss, t.logsumexp = to_logsumexp;
    p.kernels.token_losses(t);
  });
  return {loss, logsumexp};
}

std::vector<Tensor> sampled_softmax_backward(
    const Tensor& grad, const Tensor& logsumexp, const Tensor& queries, const Tensor& rows, const Tensor& positives,
    const Tensor& negatives, const OptionalTensor& log_q, double temperature, bool mask_collisions,
    const std::string& isa) {
  const Problem p(queries, rows, positives, negatives, log_q, temperature, mask_collisions, isa);
  const Tensor g = grad.to(at::kFloat).contiguous(), saved = logsumexp.contiguous();
  // each thread adds to rows of its own, which are summed at the end: no conflicts, a fixed order
  Tensor d_queries = at::empty_like(p.queries), d_rows = at::zeros({threads(), rows.size(0), p.task.width}, at::kFloat);
  float *to_queries = d_queries.mutable_data_ptr<float>(), *to_rows = d_rows.mutable_data_ptr<float>();
  p.run([&](TokensTask& t, int64_t piece) {
    t.grad = g.const_data_ptr<float>();
    t.logsumexp = const_cast<float*>(saved.const_data_ptr<float>());
    t.d_queries = to_queries;
    t.d_rows = to_rows + piece * rows.size(0) * t.width;
    p.kernels.token_gradients(t);
  });
  const int64_t dim = queries.size(1);
  return {
      d_queries.narrow(1, 0, dim).to(queries.scalar_type()).clone(at::MemoryFormat::Contiguous),
      d_rows.sum(0).narrow(1, 0, dim).to(rows.scalar_type()).clone(at::MemoryFormat::Contiguous)};
}

}  // namespace npu_rec
