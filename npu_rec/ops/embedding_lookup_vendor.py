"""Updates of `embedding_lookup` by fbgemm-ascend's split embedding (`torch.ops.fbgemm`); the lookup is PyTorch's own.

The operators are those behind FBGEMM's table-batched embeddings, given one table and one bag for each id. Equal ids are
summed first, by atomic additions, so the last bits of an update may differ from run to run. The lookup is registered
under autograd alone and cannot be reached from inside an operator of ours.

    sgd               w -= lr g
    rowwise_adagrad   s += mean(g^2);  w -= lr g / (sqrt(s) + eps)      s handed over as [V, 16], in column 0

Its Adam keeps a square for each element, which is not our rowwise_adam. Rows with a gradient that is not finite are
left alone by clearing their gradients; one whose finite gradients overflow in g^2 is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.ops import embedding_lookup_reference
from npu_rec.ops.embedding_lookup_request import EmbeddingLookupRequest
from npu_rec.ops.registry import Backend
from npu_rec.ops.row_optimizer import RowUpdate
from npu_rec.ops.vendor_support import FBGEMM_ASCEND, VendorOperator, dtype_refused, outside, vendor_operator

_TABLE = {
    "grad_output": "Tensor",
    "dev_weights": "Tensor",
    "uvm_weights": "Tensor",
    "lxu_cache_weights": "Tensor",
    "weights_placements": "Tensor",
    "weights_offsets": "Tensor",
    "D_offsets": "Tensor",
    "max_D": "int",
    "hash_size_cumsum": "Tensor",
    "total_hash_size_bits": "int",
    "indices": "Tensor",
    "offsets": "Tensor",
    "pooling_mode": "int",
    "lxu_cache_locations": "Tensor",
    "unused_": "int",
    "max_segment_length_per_warp": "int",
    "stochastic_rounding": "bool",
    "info_B_num_bits": "int",
    "info_B_mask_int64": "int",
    "use_uniq_cache_locations": "bool",
    "use_homogeneous_placements": "bool",
    "grad_accumulate": "List[Tensor]",
    "grad_accumulate_offsets": "Tensor",
    "offset_per_key": "Tensor",
    "learning_rate": "float",
}
_MOMENTUM = dict.fromkeys(("momentum1_dev", "momentum1_uvm", "momentum1_placements", "momentum1_offsets"), "Tensor")


def _update_operator(optimizer: str, **more: str) -> VendorOperator:
    name = f"fbgemm::split_embedding_backward_codegen_{optimizer}_unweighted_exact_cuda"
    return vendor_operator(FBGEMM_ASCEND, name, **_TABLE, **more)


OPERATORS_OF = {
    "sgd": _update_operator("sgd"),
    "rowwise_adagrad": _update_operator("rowwise_adagrad", eps="float", **_MOMENTUM),
}

MOST_SPACE = 2**30  # bytes of scratch, as much as the table, which an update allocates
NO_POOLING = 2
PADDED = 16  # columns of the row-wise state


def supports(request: EmbeddingLookupRequest) -> str | None:
    """float32 tables of a width that is a multiple of 8."""
    table, update = request.table, request.update
    if update is not None and update.name not in OPERATORS_OF:
        return f"has no {update.name}"
    operators = OPERATORS_OF.values() if update is None else (OPERATORS_OF[update.name],)
    for operator in operators:
        reason = operator.unusable(table)
        if reason is not None:
            return reason
    reason = dtype_refused((torch.float32,), table) or outside("D", table.shape[1], 8, 2**31 - 8, multiple=8)
    if reason is not None:
        return reason
    if request.ids.dtype != torch.int64:
        return f"ids are {request.ids.dtype}; int64"
    if not table.is_contiguous():
        return "the table is not contiguous"
    return None if update is None else _update_refused(table, update)


def _update_refused(table: Tensor, update: RowUpdate) -> str | None:
    if table.numel() * table.element_size() > MOST_SPACE:
        return f"it allocates as much as the table: {table.numel() * 4 / 2**20:.0f} MiB; up to 1024"
    if update.max_norm is not None:
        return "has no max_norm of rows"
    if update.square is not None and update.square.dtype != torch.float32:
        return f"the state is {update.square.dtype}; float32"
    if update.name == "rowwise_adagrad" and update.eps <= 0.0:
        return "eps is 0"
    return None


def backward(request: EmbeddingLookupRequest, grad: Tensor) -> tuple[Tensor | None]:
    """The gradient of the table, as the reference has it; with an update, (None,)."""
    if request.update is None:
        return embedding_lookup_reference.backward(request, grad)
    if request.ids.numel() > 0:
        _update(request, request.update, grad)
    return (None,)


def _finite_rows_only(request: EmbeddingLookupRequest, grad: Tensor) -> Tensor:
    """`grad [T, D]`, zero in all rows of an id that has a row which is not finite."""
    spoiled = (~grad.isfinite().all(1)).to(torch.float32)
    rows = spoiled.new_zeros(request.table.shape[0]).index_add_(0, request.ids, spoiled)
    return torch.where((rows[request.ids] > 0.0).unsqueeze(1), 0.0, grad)


def _update(request: EmbeddingLookupRequest, update: RowUpdate, grad: Tensor) -> None:
    table, ids = request.table, request.ids
    (rows, width), total = table.shape, ids.shape[0]

    def numbers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=table.device)

    nothing = table.new_empty(0)
    arguments: dict[str, object] = {
        "grad_output": _finite_rows_only(request, grad.to(torch.float32)).contiguous(),
        "dev_weights": table.view(-1),
        "uvm_weights": nothing,
        "lxu_cache_weights": nothing,
        "weights_placements": numbers(0, dtype=torch.int32),
        "weights_offsets": numbers(0),
        "D_offsets": numbers(0, width, dtype=torch.int32),
        "max_D": width,
        "hash_size_cumsum": numbers(0, rows),
        "total_hash_size_bits": max(rows - 1, 1).bit_length(),
        "indices": ids.contiguous(),
        "offsets": torch.arange(total + 1, device=table.device),
        "pooling_mode": NO_POOLING,
        "lxu_cache_locations": numbers(dtype=torch.int32),
        "unused_": 32,
        "max_segment_length_per_warp": 32,
        "stochastic_rounding": False,
        "info_B_num_bits": total,
        "info_B_mask_int64": 1,
        "use_uniq_cache_locations": False,
        "use_homogeneous_placements": True,
        "grad_accumulate": [],
        "grad_accumulate_offsets": numbers(),
        "offset_per_key": numbers(0, total),
        "learning_rate": update.lr,
    }
    if update.name == "sgd":
        OPERATORS_OF["sgd"](**arguments)
        return
    assert update.square is not None
    state = table.new_zeros(rows, PADDED)
    state[:, 0] = update.square
    OPERATORS_OF["rowwise_adagrad"](
        **arguments,
        momentum1_dev=state,
        momentum1_uvm=nothing,
        momentum1_placements=numbers(0, dtype=torch.int32),
        momentum1_offsets=numbers(0),
        eps=update.eps,
    )
    update.square.copy_(state[:, 0])


BACKEND = Backend("vendor", embedding_lookup_reference.forward, backward, supports)
