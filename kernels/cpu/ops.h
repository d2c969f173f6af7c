// The operators as Python calls them (module.cpp). `isa` names an instruction set of `instruction_sets()`.
#pragma once
#include <torch/extension.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace npu_rec {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Arguments as in npu_rec.ops.hstu_attention. `ids` and `limits`, [T], come from npu_rec.ops.masks.token_ids, and
// are absent where ids count the tokens; `edges` are those of npu_rec.ops.time_buckets.
Tensor hstu_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets, const OptionalTensor& ids,
    const OptionalTensor& limits, const OptionalTensor& position, const OptionalTensor& time,
    const OptionalTensor& query_time, const OptionalTensor& key_time, const Tensor& edges, int64_t max_seq_len,
    double alpha, double divisor, bool causal, int64_t contextual_seq_len, int64_t max_attn_len,
    int64_t min_full_attn_seq_len, const std::string& isa);

// Gradients of q, k, v, position, time; an absent table's is empty.
std::vector<Tensor> hstu_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets, const OptionalTensor& ids,
    const OptionalTensor& limits, const OptionalTensor& position, const OptionalTensor& time,
    const OptionalTensor& query_time, const OptionalTensor& key_time, const Tensor& edges, int64_t max_seq_len,
    double alpha, double divisor, bool causal, int64_t contextual_seq_len, int64_t max_attn_len,
    int64_t min_full_attn_seq_len, const std::string& isa);

// Arguments as in npu_rec.ops.sampled_softmax_loss. Returns (loss [T], logsumexp [T]).
std::vector<Tensor> sampled_softmax_forward(
    const Tensor& queries, const Tensor& rows, const Tensor& positives, const Tensor& negatives,
    const OptionalTensor& log_q, double temperature, bool mask_collisions, const std::string& isa);

// Gradients of queries and rows.
std::vector<Tensor> sampled_softmax_backward(
    const Tensor& grad, const Tensor& logsumexp, const Tensor& queries, const Tensor& rows, const Tensor& positives,
    const Tensor& negatives, const OptionalTensor& log_q, double temperature, bool mask_collisions,
    const std::string& isa);

}  // namespace npu_rec
