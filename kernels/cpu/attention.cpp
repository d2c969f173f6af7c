// Attention on the CPU: cuts a batch into (sequence, head) tasks, spreads them over threads, picks the instruction set.
// Arguments as in npu_rec.ops.hstu_attention and softmax_attention.
#include "ops.h"

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace npu_rec {
namespace {

constexpr int64_t MARGIN = 64;  // vector loads may reach a tile past either end of the position table

struct Problem {
  Tensor q, k, v, offsets, query_offsets;
  OptionalTensor ids, limits, position, time, query_time, key_time, dropout_keys;
  Tensor edges, table;  // table: the position table with margins
  int64_t max_seq_len;
  double alpha, divisor;
  Mask mask;
  int64_t largest_dropped;
  double keep_scale;
  AttentionKernels kernels;

  int64_t sequences() const { return offsets.numel() - 1; }
  int64_t heads() const { return q.size(1); }
  int64_t keys(int64_t sequence) const { return count(offsets, sequence); }
  int64_t queries(int64_t sequence) const { return count(query_offsets, sequence); }

  static int64_t count(const Tensor& offsets, int64_t sequence) {
    const int64_t* at = offsets.const_data_ptr<int64_t>() + sequence;
    return at[1] - at[0];
  }

  // Where the results of a (sequence, head) task begin in [Tq, H, Dv].
  int64_t output(int64_t index) const {
    const int64_t row = query_offsets.const_data_ptr<int64_t>()[index / heads()];
    return (row * heads() + index % heads()) * v.size(2);
  }

  HeadTask task(int64_t sequence, int64_t head) const {
    const int64_t start = offsets.const_data_ptr<int64_t>()[sequence], n = keys(sequence);
    const int64_t query_start = query_offsets.const_data_ptr<int64_t>()[sequence], first = n - queries(sequence);
    HeadTask t{};
    t.stride_qk = q.size(1) * q.size(2);
    t.stride_v = v.size(1) * v.size(2);
    t.n = int(n), t.first = int(first), t.dim_qk = int(q.size(2)), t.dim_v = int(v.size(2));
    t.q = q.const_data_ptr<float>() + query_start * t.stride_qk + head * t.dim_qk;
    t.k = k.const_data_ptr<float>() + start * t.stride_qk + head * t.dim_qk;
    t.v = v.const_data_ptr<float>() + start * t.stride_v + head * t.dim_v;
    t.alpha = float(alpha), t.inverse_divisor = float(1.0 / divisor);
    t.mask = mask;
    if (ids) t.ids = ids->const_data_ptr<int64_t>() + start;
    t.limit = limits ? limits->const_data_ptr<int64_t>()[start] : n;
    if (position) t.position = table.const_data_ptr<float>() + MARGIN + max_seq_len - 1;
    if (time) {
      t.time = time->const_data_ptr<float>();
      t.query_time = query_time->const_data_ptr<int64_t>() + query_start;
      t.key_time = key_time->const_data_ptr<int64_t>() + start;
      t.edges = edges.const_data_ptr<int64_t>();
      const auto not_after = [](int64_t a, int64_t b) { return a <= b; };
      t.sorted = std::is_sorted(t.key_time, t.key_time + n) && std::is_sorted(t.query_time, t.query_time + n - first) &&
                 std::equal(t.key_time + first, t.key_time + n, t.query_time, not_after);
    }
    if (dropout_keys) t.dropout_keys = dropout_keys->const_data_ptr<int64_t>() + start;
    t.head = head, t.largest_dropped = int32_t(largest_dropped), t.keep_scale = float(keep_scale);
    return t;
  }

  // (sequence, head) tasks for each thread, about equally costly: the most keys first, each to the least loaded.
  // The result depends on the number of threads alone, and so do the bits of the tables' gradients.
  std::vector<std::vector<int64_t>> spread() const {
    std::vector<int64_t> order(sequences() * heads());
    std::iota(order.begin(), order.end(), 0);
    auto length = [&](int64_t task) { return keys(task / heads()); };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    std::vector<std::vector<int64_t>> threads(std::max(1, at::get_num_threads()));
    std::vector<double> load(threads.size(), 0.0);
    for (int64_t task : order) {
      if (length(task) == 0) continue;
      const auto least = std::min_element(load.begin(), load.end()) - load.begin();
      threads[least].push_back(task);
      const int64_t rows = queries(task / heads());
      load[least] += double(rows) * double(2 * length(task) - rows + 64);
    }
    return threads;
  }

  template <typename Body>
  void run(const Body& body) const {
    const auto threads = spread();
    at::parallel_for(0, int64_t(threads.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        if (threads[thread].empty()) continue;
        const auto longest = task(threads[thread].front() / heads(), 0);
        const auto floats = kernels.scratch(longest.n, longest.dim_qk, longest.dim_v);
        std::unique_ptr<float[]> scratch(new float[floats]);
        for (int64_t index : threads[thread]) {
          HeadTask t = task(index / heads(), index % heads());
          t.scratch = scratch.get();
          body(t, index, thread);
        }
      }
    });
  }
};

OptionalTensor floats(const OptionalTensor& x) {
  return x ? OptionalTensor(x->to(at::kFloat).contiguous()) : OptionalTensor();
}

OptionalTensor whole(const OptionalTensor& x) {
  return x ? OptionalTensor(x->contiguous()) : OptionalTensor();
}

Problem make_problem(const AttentionArguments& a) {
  TORCH_CHECK(a.kind == "hstu" || a.kind == "softmax", "no attention of kind ", a.kind);
  const Kernels kernels = kernels_of(a.isa);
  Problem p{
      a.q.to(at::kFloat).contiguous(), a.k.to(at::kFloat).contiguous(), a.v.to(at::kFloat).contiguous(),
      a.offsets.contiguous(), (a.query_offsets ? *a.query_offsets : a.offsets).contiguous(), whole(a.ids),
      whole(a.limits), floats(a.position), floats(a.time), whole(a.query_time), whole(a.key_time),
      whole(a.dropout_keys), a.edges.contiguous(), Tensor(), a.max_seq_len, a.alpha, a.divisor,
      {a.causal, a.contextual_seq_len, a.max_attn_len, a.min_full_attn_seq_len}, a.largest_dropped, a.keep_scale,
      a.kind == "softmax" ? kernels.softmax : kernels.hstu};
  if (a.position) p.table = at::constant_pad_nd(*p.position, {MARGIN, MARGIN});
  return p;
}

}  // namespace

Tensor attention_forward(const AttentionArguments& arguments) {
  const Problem p = make_problem(arguments);
  Tensor out = at::empty({p.q.size(0), p.v.size(1), p.v.size(2)}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  p.run([&](HeadTask& t, int64_t index, int64_t) {
    t.out = to + p.output(index);
    p.kernels.forward(t);
  });
  return out.to(arguments.v.scalar_type());
}

std::vector<Tensor> attention_backward(const AttentionArguments& arguments, const Tensor& grad) {
  const Problem p = make_problem(arguments);
  const Tensor d_out = grad.to(at::kFloat).contiguous();
  Tensor dq = at::empty_like(p.q), dk = at::empty_like(p.k), dv = at::empty_like(p.v);
  // each thread adds to tables of its own, which are summed at the end: no conflicts, a fixed order
  const int64_t threads = std::max(1, at::get_num_threads()), N = p.max_seq_len;
  Tensor d_position = at::zeros({threads, p.position ? p.table.numel() : 0}, at::kFloat);
  Tensor d_time = at::zeros({threads, p.time ? p.time->numel() : 0}, at::kFloat);
  float *to_q = dq.mutable_data_ptr<float>(), *to_k = dk.mutable_data_ptr<float>(), *to_v = dv.mutable_data_ptr<float>();
  float *to_position = d_position.mutable_data_ptr<float>(), *to_time = d_time.mutable_data_ptr<float>();
  p.run([&](HeadTask& t, int64_t index, int64_t thread) {
    t.grad = d_out.const_data_ptr<float>() + p.output(index);
    t.dq = to_q + (t.q - p.q.const_data_ptr<float>());
    t.dk = to_k + (t.k - p.k.const_data_ptr<float>());
    t.dv = to_v + (t.v - p.v.const_data_ptr<float>());
    if (p.position) t.d_position = to_position + thread * d_position.size(1) + MARGIN + N - 1;
    if (p.time) t.d_time = to_time + thread * d_time.size(1);
    p.kernels.backward(t);
  });
  Tensor of_position = at::empty({0}, at::kFloat), of_time = at::empty({0}, at::kFloat);
  if (p.position)
    of_position = d_position.sum(0).narrow(0, MARGIN, 2 * N - 1).to(arguments.position->scalar_type()).clone();
  if (p.time) of_time = d_time.sum(0).to(arguments.time->scalar_type());
  return {
      dq.to(arguments.q.scalar_type()), dk.to(arguments.k.scalar_type()), dv.to(arguments.v.scalar_type()), of_position,
      of_time};
}

}  // namespace npu_rec
