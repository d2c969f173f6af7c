// The operators as Python calls them (module.cpp). `isa` names an instruction set of `instruction_sets()`.
#pragma once
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace npu_rec {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return Dtype::float32;
  if (x.scalar_type() == at::kBFloat16) return Dtype::bfloat16;
  TORCH_CHECK(x.scalar_type() == at::kHalf, "no kernels for ", x.scalar_type());
  return Dtype::float16;
}

// x [T, C] itself, and a copy only where the elements of a row lie apart.
inline Tensor with_whole_rows(const Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous(); }

constexpr int64_t ELEMENTS_FOR_A_THREAD = 1 << 15;  // fewer are not worth waking one

// body(begin, end) for parts of [0, rows), on several threads where that is worth it.
template <typename Body>
void for_rows(int64_t rows, int64_t width, const Body& body) {
  at::parallel_for(0, rows, ELEMENTS_FOR_A_THREAD / std::max<int64_t>(1, width) + 1, body);
}

// As in npu_rec.ops.hstu_attention (kind "hstu") and softmax_attention ("softmax"), which uses no `divisor`. `ids` and
// `limits`, [Tk], come from npu_rec.ops.masks.token_ids, and are absent where ids count the tokens; `edges` are those of
// npu_rec.ops.time_buckets. Dropout is softmax attention's: with keys [T] a draw up to `largest_dropped` drops a weight,
// the others are multiplied by `keep_scale`.
struct AttentionArguments {
  std::string kind;
  Tensor q, k, v, offsets;
  OptionalTensor query_offsets, ids, limits, position, time, query_time, key_time;
  Tensor edges;
  int64_t max_seq_len;
  double alpha, divisor;
  bool causal;
  int64_t contextual_seq_len, max_attn_len, min_full_attn_seq_len;
  OptionalTensor dropout_keys;
  int64_t largest_dropped;
  double keep_scale;
  std::string isa;
};

Tensor attention_forward(const AttentionArguments& arguments);

// Gradients of q, k, v, position, time; an absent table's is empty.
std::vector<Tensor> attention_backward(const AttentionArguments& arguments, const Tensor& grad);

// Arguments as in npu_rec.ops.sampled_softmax_loss. Returns (loss [T], logsumexp [T]).
std::vector<Tensor> sampled_softmax_forward(
    const Tensor& queries, const Tensor& rows, const Tensor& positives, const Tensor& negatives,
    const OptionalTensor& log_q, double temperature, bool mask_collisions, const std::string& isa);

// Gradients of queries and rows.
std::vector<Tensor> sampled_softmax_backward(
    const Tensor& grad, const Tensor& logsumexp, const Tensor& queries, const Tensor& rows, const Tensor& positives,
    const Tensor& negatives, const OptionalTensor& log_q, double temperature, bool mask_collisions,
    const std::string& isa);

// Arguments as in npu_rec.ops.norm_gate. With keys [T] a draw up to `largest_dropped` drops its channel, the others
// are multiplied by `scale`.
Tensor norm_gate_forward(
    const Tensor& x, const Tensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& keys, double eps, int64_t largest_dropped, double scale, const std::string& isa);

// Gradients of x, gate, weight, bias; an absent parameter's is empty.
std::vector<Tensor> norm_gate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& keys, double eps, int64_t largest_dropped, double scale, const std::string& isa);

// x [T, C] and keys [T] as in npu_rec.ops.dropout; the rest as in norm_gate_forward. Its own gradient: the operator is
// linear.
Tensor dropout_forward(
    const Tensor& x, const Tensor& keys, int64_t largest_dropped, double scale, const std::string& isa);

// `[..., count]` int64 of keys `[...]`, as npu_rec.ops.random.random_integers; `high` is below 2^31.
Tensor random_integers(const Tensor& keys, int64_t count, int64_t high, const std::string& isa);

// Arguments as in npu_rec.ops.rms_norm.
Tensor rms_norm_forward(const Tensor& x, const Tensor& weight, double eps, const std::string& isa);

// Gradients of x and weight.
std::vector<Tensor> rms_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, double eps, const std::string& isa);

// Arguments as in npu_rec.ops.swiglu.
Tensor swiglu_forward(const Tensor& x, const std::string& isa);

// The gradient of x.
Tensor swiglu_backward(const Tensor& grad, const Tensor& x, const std::string& isa);

// Arguments as in npu_rec.ops.rotary. With `back` x is the gradient of a result, and what returns is that of its x.
Tensor rotary_turn(
    const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool back, const std::string& isa);

// Rows [T, D] of table [V, D]; the ids [T] have been checked.
Tensor embedding_forward(const Tensor& table, const Tensor& ids);

// The gradient [V, D] of the table.
Tensor embedding_backward(const Tensor& grad, const Tensor& table, const Tensor& ids, const std::string& isa);

// Changes table, square [V] and momentum [V, D] in place; the constants are those of RowsTask.
void embedding_update(
    const Tensor& grad, const Tensor& table, const Tensor& ids, const OptionalTensor& square,
    const OptionalTensor& momentum, double lr, double beta1, double beta2, double rest2, double correction2, double eps,
    double max_norm, const std::string& isa);

// Reads or writes `records [U, width]`, contiguous, number n at n times the size of a record, in the `order [U]` of
// their numbers [U]. Returns the number of a record that failed and the errno (0: the file ends before it), or nothing.
std::optional<std::pair<int64_t, int64_t>> records_read(
    int64_t file, const Tensor& numbers, const Tensor& order, const Tensor& records);
std::optional<std::pair<int64_t, int64_t>> records_write(
    int64_t file, const Tensor& numbers, const Tensor& order, const Tensor& records);

}  // namespace npu_rec
