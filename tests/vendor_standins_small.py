"""Stand-ins for the row-wise, embedding and jagged operators of Ascend's packages; see vendor_standins.py."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from vendor_standins import FLOATS, StandIn, require


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.double()
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def _norm_multiply_dropout(
    x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_ratio: float
) -> list[Tensor]:
    require(x.dim() == 2 and 1 <= x.shape[0] <= 10**6 and x.shape[1] in (512, 1024), "shape")
    require(u.shape == x.shape and weight.shape == bias.shape == x.shape[1:], "shapes")
    require(x.dtype in FLOATS and x.dtype == u.dtype == weight.dtype == bias.dtype, "dtype")
    require(1e-10 <= eps <= 1e-4, "eps")
    require(dropout_ratio == 0.0, "its dropout is random")
    require(x.is_contiguous() and u.is_contiguous(), "contiguous")
    return [(_layer_norm(x, weight, bias, eps) * u.double()).to(x.dtype)]


NORM_MULTIPLY_DROPOUT: list[StandIn] = [
    (
        "mxrec::norm_multiply_dropout(Tensor x, Tensor u, Tensor weight, Tensor bias, float eps, "
        "float dropout_ratio) -> Tensor[]",
        _norm_multiply_dropout,
    )
]


def _ln_mul(x: Tensor, u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    require(x.dim() == 2 and x.numel() > 0 and x.shape[1] <= 2048, "shape")
    require(all(t.dtype == torch.float32 and t.is_contiguous() for t in (x, u, gamma, beta)), "float32, contiguous")
    return (_layer_norm(x, gamma, beta, 1e-5) * u.double()).to(x.dtype)


LN_MUL: list[StandIn] = [("ops_rec::ln_mul(Tensor x, Tensor u, Tensor gamma, Tensor beta) -> Tensor", _ln_mul)]


# --- fbgemm-ascend

_TABLE = (
    "Tensor grad_output, Tensor(a!) dev_weights, Tensor(b!) uvm_weights, Tensor lxu_cache_weights, "
    "Tensor weights_placements, Tensor weights_offsets, Tensor D_offsets, SymInt max_D, Tensor hash_size_cumsum, "
    "int total_hash_size_bits, Tensor indices, Tensor offsets, int pooling_mode, Tensor lxu_cache_locations, "
    "int unused_, int max_segment_length_per_warp, bool stochastic_rounding, int info_B_num_bits, "
    "int info_B_mask_int64, bool use_uniq_cache_locations, bool use_homogeneous_placements"
)
_TAIL = (
    "Tensor[] grad_accumulate, Tensor grad_accumulate_offsets, Tensor hash_indices=None, Tensor unique_ids=None, "
    "Tensor unique_offsets=None, Tensor unique_inverse=None, Tensor offset_per_key=None, "
    "Tensor table_grad_accumulate_offsets=None"
)


def _rows_and_sums(
    grad_output: Tensor, dev_weights: Tensor, weights_offsets: Tensor, D_offsets: Tensor, max_D: int,
    hash_size_cumsum: Tensor, indices: Tensor, offsets: Tensor, pooling_mode: int, offset_per_key: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The checks of a table without pooling: (the table `[V, D]`, its rows with a gradient, their sums)."""
    total = indices.numel()
    require(grad_output.dtype == dev_weights.dtype == torch.float32, "float32")
    require(max_D % 8 == 0 and D_offsets.tolist() == [0, max_D] and D_offsets.dtype == torch.int32, "width")
    require(weights_offsets.tolist() == [0] and weights_offsets.dtype == torch.int64, "one table")
    require(pooling_mode == 2 and grad_output.shape == (total, max_D) and grad_output.is_contiguous(), "no pooling")
    require(indices.dtype == offsets.dtype == torch.int64 and total > 0, "indices")
    require(int(offsets[-1]) == total and offset_per_key.tolist() == [0, total], "offsets")
    rows = int(hash_size_cumsum[-1])
    require(dev_weights.dim() == 1 and dev_weights.numel() == rows * max_D, "the table is flat")
    sums = torch.zeros(rows, max_D).index_add_(0, indices, grad_output)
    return dev_weights.view(rows, max_D), indices.unique(), sums


def _sgd(
    grad_output: Tensor, dev_weights: Tensor, uvm_weights: Tensor, lxu_cache_weights: Tensor,
    weights_placements: Tensor, weights_offsets: Tensor, D_offsets: Tensor, max_D: int, hash_size_cumsum: Tensor,
    total_hash_size_bits: int, indices: Tensor, offsets: Tensor, pooling_mode: int, lxu_cache_locations: Tensor,
    unused_: int, max_segment_length_per_warp: int, stochastic_rounding: bool, info_B_num_bits: int,
    info_B_mask_int64: int, use_uniq_cache_locations: bool, use_homogeneous_placements: bool,
    grad_accumulate: list[Tensor], grad_accumulate_offsets: Tensor, hash_indices: object = None,
    unique_ids: object = None, unique_offsets: object = None, unique_inverse: object = None,
    offset_per_key: object = None, table_grad_accumulate_offsets: object = None, learning_rate: float = 0.0,
    use_optimize: bool = True,
) -> Tensor:  # fmt: skip
    assert isinstance(offset_per_key, Tensor)
    table, rows, sums = _rows_and_sums(
        grad_output, dev_weights, weights_offsets, D_offsets, max_D, hash_size_cumsum, indices, offsets,
        pooling_mode, offset_per_key,
    )  # fmt: skip
    table[rows] -= learning_rate * sums[rows]
    return torch.empty(0)


def _rowwise_adagrad(
    grad_output: Tensor, dev_weights: Tensor, uvm_weights: Tensor, lxu_cache_weights: Tensor,
    weights_placements: Tensor, weights_offsets: Tensor, D_offsets: Tensor, max_D: int, hash_size_cumsum: Tensor,
    total_hash_size_bits: int, indices: Tensor, offsets: Tensor, pooling_mode: int, lxu_cache_locations: Tensor,
    unused_: int, max_segment_length_per_warp: int, stochastic_rounding: bool, info_B_num_bits: int,
    info_B_mask_int64: int, use_uniq_cache_locations: bool, use_homogeneous_placements: bool,
    momentum1_dev: Tensor, momentum1_uvm: Tensor, momentum1_placements: Tensor, momentum1_offsets: Tensor,
    grad_accumulate: list[Tensor], grad_accumulate_offsets: Tensor, hash_indices: object = None,
    unique_ids: object = None, unique_offsets: object = None, unique_inverse: object = None,
    offset_per_key: object = None, table_grad_accumulate_offsets: object = None, eps: float = 0.0,
    learning_rate: float = 0.0, use_optimize: bool = True,
) -> Tensor:  # fmt: skip
    assert isinstance(offset_per_key, Tensor)
    table, rows, sums = _rows_and_sums(
        grad_output, dev_weights, weights_offsets, D_offsets, max_D, hash_size_cumsum, indices, offsets,
        pooling_mode, offset_per_key,
    )  # fmt: skip
    require(momentum1_dev.shape == (table.shape[0], 16) and momentum1_dev.dtype == torch.float32, "padded state")
    g = sums[rows]
    momentum1_dev[rows, 0] += g.square().mean(1)
    table[rows] -= learning_rate * g / (momentum1_dev[rows, 0].sqrt() + eps).unsqueeze(1)
    return torch.empty(0)


_NAME = "fbgemm::split_embedding_backward_codegen_{}_unweighted_exact_cuda"
_MOMENTUM = "Tensor momentum1_dev, Tensor momentum1_uvm, Tensor momentum1_placements, Tensor momentum1_offsets"
ROW_UPDATES: list[StandIn] = [
    (f"{_NAME.format('sgd')}({_TABLE}, {_TAIL}, float learning_rate=0, bool use_optimize=True) -> Tensor", _sgd),
    (
        f"{_NAME.format('rowwise_adagrad')}({_TABLE}, {_MOMENTUM}, {_TAIL}, float eps=0, float learning_rate=0, "
        "bool use_optimize=True) -> Tensor",
        _rowwise_adagrad,
    ),
]


def _cumsum(t_in: Tensor) -> Tensor:
    require(t_in.dim() == 1, "1D")
    out = torch.zeros(t_in.numel() + 1, dtype=t_in.dtype)
    for i, length in enumerate(t_in.tolist()):
        out[i + 1] = out[i] + length
    return out


JAGGED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)


def _to_padded(values: Tensor, offsets: list[Tensor], max_lengths: list[int], padding_value: float = 0.0) -> Tensor:
    require(values.dim() == 2 and values.dtype in JAGGED_DTYPES, "values")
    require(len(offsets) == len(max_lengths) == 1 and offsets[0].numel() > 1 and max_lengths[0] > 0, "offsets")
    bounds, longest = offsets[0].tolist(), max_lengths[0]
    padded = values.new_full((len(bounds) - 1, longest, values.shape[1]), padding_value)
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        padded[i, : min(end - start, longest)] = values[start : min(end, start + longest)]
    return padded


def _to_jagged(dense: Tensor, x_offsets: list[Tensor], total_L: int | None = None) -> tuple[Tensor, list[Tensor]]:
    require(dense.dim() == 3 and dense.dtype in JAGGED_DTYPES, "dense")
    bounds = x_offsets[0].tolist()
    require(len(x_offsets) == 1 and total_L == bounds[-1], "total_L")
    rows = [dense[i, : end - start] for i, (start, end) in enumerate(itertools.pairwise(bounds))]
    return torch.cat(rows), [x.clone() for x in x_offsets]


JAGGED: list[StandIn] = [
    ("fbgemm::asynchronous_complete_cumsum(Tensor t_in) -> Tensor", _cumsum),
    (
        "fbgemm::jagged_to_padded_dense(Tensor values, Tensor[] offsets, SymInt[] max_lengths, "
        "float padding_value=0) -> Tensor",
        _to_padded,
    ),
    (
        "fbgemm::dense_to_jagged(Tensor dense, Tensor[] x_offsets, SymInt? total_L=None) -> (Tensor, Tensor[])",
        _to_jagged,
    ),
]


# --- RecSDK's projection


def _check_linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None, splits: list[int]) -> None:
    rows, width = weight.shape
    require(x.dtype == weight.dtype and x.dtype in FLOATS[1:], "dtype")
    require(x.shape[0] >= 1 and x.shape[1] == width and 16 <= width <= 8192 and width % 16 == 0, "x")
    require(len(splits) == 4 and all(16 <= n <= 8192 and n % 16 == 0 for n in splits), "parts")
    require(sum(splits) == rows and rows % (4 * width) == 0, "weight")
    require(bias is None or (bias.dtype == torch.float32 and bias.shape == (rows,)), "bias")


def _linear_silu(x: Tensor, weight: Tensor, bias: Tensor, attr_dict: list[int]) -> list[Tensor]:
    _check_linear_silu(x, weight, bias, attr_dict)
    product = (x.double() @ weight.double().t() + bias.double()).to(x.dtype)
    parts = (product.double() * torch.sigmoid(product.double())).to(x.dtype).split(attr_dict, 1)
    return [*(part.clone() for part in parts), product]


def _linear_silu_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, user_grad: Tensor, value_grad: Tensor, query_grad: Tensor,
    key_grad: Tensor, linear_output: Tensor, attr_dict: list[int],
) -> list[Tensor]:  # fmt: skip
    _check_linear_silu(x, weight, bias, attr_dict)
    grads = [user_grad, value_grad, query_grad, key_grad]
    require(all(g.shape == (x.shape[0], n) and g.dtype == x.dtype for g, n in zip(grads, attr_dict, strict=True)), "g")
    product = linear_output.double()
    gate = torch.sigmoid(product)
    slope = torch.cat(grads, 1).double() * gate * (1.0 + product * (1.0 - gate))
    return [(slope @ weight.double()).float(), (slope.t() @ x.double()).float(), slope.sum(0).float(), torch.empty(0)]


LINEAR_SILU: list[StandIn] = [
    (
        "mxrec::distance_in_linear_silu(Tensor x, Tensor weight, Tensor bias, int[] attr_dict) -> Tensor[]",
        _linear_silu,
    ),
    (
        "mxrec::in_linear_silu_backward(Tensor x, Tensor weight, Tensor? bias, Tensor user_grad, Tensor value_grad, "
        "Tensor query_grad, Tensor key_grad, Tensor linear_output, int[] attr_dict) -> Tensor[]",
        _linear_silu_backward,
    ),
]
