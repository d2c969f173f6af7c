// What the kernels of every instruction set are given and how they are reached.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace npu_rec {

// Attention: one head of one sequence.
struct Mask {
  bool causal;
  int64_t contextual_seq_len, max_attn_len, min_full_attn_seq_len;
};

struct HeadTask {
  // Inputs, float32; rows follow each other by the stride. There are n keys. The queries are the tokens from `first`
  // on, so row 0 of what belongs to queries (q, grad, out, dq, query_time) is that of token `first`.
  const float *q, *k, *v, *grad;
  int64_t stride_qk, stride_v;
  int n, first, dim_qk, dim_v;
  float alpha, inverse_divisor;

  // Mask: ids and limit are null and unused when ids simply count the tokens ("plain").
  Mask mask;
  const int64_t* ids;
  int64_t limit;

  // Bias. `position[d]` is the entry for id_key - id_query = d. `sorted`: along the sequence both times never
  // go back and a query's time is not before its key's, so buckets are monotone along rows.
  const float* position;
  const float* time;
  const int64_t *query_time, *key_time;
  const int64_t* edges;  // edges[b] <= |delta| < edges[b + 1]
  bool sorted;

  // Softmax attention alone. Null keys, [n]: no dropout. A draw up to `largest_dropped` drops a weight of this head, the
  // others are multiplied by `keep_scale`.
  const int64_t* dropout_keys;
  int64_t head;
  int32_t largest_dropped;
  float keep_scale;

  // Results. The gradients of the tables are added to; dq, dk, dv and out are written.
  float *out, *dq, *dk, *dv, *d_position, *d_time;
  float* scratch;
};

// Sampled softmax: tokens [begin, end). Rows of `queries` and `rows` are padded with zeros to `width`, a multiple
// of the vector; indices of negatives are [T, count].
struct TokensTask {
  int64_t begin, end;
  const float *queries, *rows;
  int64_t width;
  const int64_t *positives, *negatives;
  int count;
  const float* log_q;
  float inverse_temperature;
  bool mask_collisions;
  float *loss, *logsumexp;       // written by token_losses, logsumexp read by token_gradients
  const float* grad;             // [T]
  float *d_queries, *d_rows;     // d_queries is written, d_rows added to; both of `width`
  float* scratch;                // count + 1 floats, rounded up to the vector
};

enum class Dtype { float32, bfloat16, float16 };

// Normalise and gate: rows [begin, end) of [T, C] = [T, width]. With `grad` the gradients are computed, otherwise
// `out`. Strides in elements; out, dx and d_gate have rows of `width`.
struct GateTask {
  int64_t begin, end, width;
  Dtype dtype;  // of what is void here
  const void *x, *gate, *grad;
  int64_t stride_x, stride_gate, stride_grad;
  const float *weight, *bias;  // null where there are none
  float eps;
  const int64_t* keys;  // null: no dropout
  int32_t largest_dropped;
  float scale;
  void *out, *dx, *d_gate;
  float *d_weight, *d_bias;  // added to; of `width` rounded up to the vector
  float* scratch;            // twice that
};

// Dropout: rows [begin, end) of [T, C] = [T, width]. A draw up to `largest_dropped` drops its channel, the others are
// multiplied by `scale`. Strides in elements here and below.
struct DropoutTask {
  int64_t begin, end, width;
  Dtype dtype;  // of what is void here
  const void* x;
  int64_t stride_x;
  const int64_t* keys;
  int32_t largest_dropped;
  float scale;
  void* out;  // rows of `width`
};

// RMSNorm: rows [begin, end) of [T, C] = [T, width]. With `grad` the gradients are computed.
struct RMSNormTask {
  int64_t begin, end, width;
  Dtype dtype;  // of what is void here
  const void *x, *grad;
  int64_t stride_x, stride_grad;
  const float* weight;
  float eps;
  void* out;        // rows of `width`; with `grad` the gradient of x
  float* d_weight;  // [width], added to
};

// SwiGLU: rows [begin, end) of x [T, 2C], C = width. With `grad`, [T, C], the gradient is computed.
struct SwiGLUTask {
  int64_t begin, end, width;
  Dtype dtype;  // of what is void here
  const void *x, *grad;
  int64_t stride_x, stride_grad;
  void* out;  // rows of `width`; with `grad` the gradient of x, rows of twice that
};

// Rotary positions: rows [begin, end) of [T, H, D] = [T, heads, dim]. `back`: x is a gradient, and so is `out`.
struct RotaryTask {
  int64_t begin, end, heads, dim;
  Dtype dtype;  // of what is void here
  const void* x;
  int64_t stride_row, stride_head;
  const float *cos, *sin;  // [T, D]
  bool interleaved, back;
  void* out;
};

// Row gradients of a lookup: occurrences [first, last), sorted by id, equal ids in the order of their places.
struct Occurrence { int64_t id, place; };

struct RowsTask {
  const Occurrence* occurrences;
  int64_t first, last, width;
  Dtype dtype;  // of what is void here
  const void* grad;  // [T, D] = [T, width]
  int64_t stride_grad;
  float* scratch;  // `width` rounded up to the vector

  void* d_table;  // the gradient [V, D] of the table: the rows of the occurrences are written

  // Or an update: s = beta2 s + rest2 mean(g^2), m = beta1 m + rest1 g, w -= lr m / (sqrt(s / correction2) + eps).
  // Without `square` the divisor is 1, without `momentum` m is g. g is not longer than max_norm.
  void* table;
  float *square, *momentum;  // [V], [V, D]; null where there is none
  float lr, beta1, rest1, beta2, rest2, correction2, eps, max_norm;
};

struct RandomTask {
  const int64_t* keys;
  int64_t* out;  // [T, width], below `high`, which is at most 2^31
  int64_t width;
  uint64_t high;
  int64_t begin, end;
};

struct AttentionKernels {
  void (*forward)(const HeadTask&);
  void (*backward)(const HeadTask&);
  int64_t (*scratch)(int n, int dim_qk, int dim_v);  // floats
};

struct Kernels {
  AttentionKernels hstu, softmax;
  void (*token_losses)(const TokensTask&);
  void (*token_gradients)(const TokensTask&);
  void (*norm_gate)(const GateTask&);
  void (*dropout)(const DropoutTask&);
  void (*random_integers)(const RandomTask&);
  void (*rms_norm)(const RMSNormTask&);
  void (*swiglu)(const SwiGLUTask&);
  void (*rotary)(const RotaryTask&);
  void (*row_gradients)(const RowsTask&);
  void (*update_rows)(const RowsTask&);
  int vector;  // floats
};

Kernels kernels_plain();
Kernels kernels_avx2();
Kernels kernels_avx512();

std::vector<std::string> instruction_sets();    // usable here, the fastest first
Kernels kernels_of(const std::string& isa);     // an error where it is not usable

}  // namespace npu_rec
