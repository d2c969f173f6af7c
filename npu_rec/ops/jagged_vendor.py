"""The conversions of `npu_rec.ops.jagged` by fbgemm-ascend's operators, where that package is loaded.

They are taken for tensors that autograd does not follow (inside operators, for ids and offsets), and not while
torch.compile traces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_rec.device.ascend import vendor_package_problems
from npu_rec.ops.vendor_support import FBGEMM_ASCEND, vendor_operator

CUMSUM = vendor_operator(FBGEMM_ASCEND, "fbgemm::asynchronous_complete_cumsum", t_in="Tensor")
TO_PADDED = vendor_operator(
    FBGEMM_ASCEND,
    "fbgemm::jagged_to_padded_dense",
    values="Tensor",
    offsets="List[Tensor]",
    max_lengths="List[int]",
    padding_value="float",
)
TO_JAGGED = vendor_operator(
    FBGEMM_ASCEND, "fbgemm::dense_to_jagged", dense="Tensor", x_offsets="List[Tensor]", total_L="Optional[int]"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)


def _loaded() -> bool:
    # FBGEMM itself brings the same operators for CPUs and GPUs; they are not meant here
    return not torch.compiler.is_compiling() and FBGEMM_ASCEND not in vendor_package_problems()


def _followed(x: Tensor) -> bool:
    return x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x)


def takes_lengths(lengths: Tensor) -> bool:
    """Whether `lengths_to_offsets` runs here: `[B]`, int64."""
    return _loaded() and lengths.dim() == 1 and lengths.dtype == torch.int64 and CUMSUM.unusable(lengths) is None


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """`lengths [B]` -> `offsets [B + 1]`, int64."""
    offsets: Tensor = CUMSUM(t_in=lengths)
    return offsets


def takes_values(values: Tensor, offsets: Tensor) -> bool:
    """Whether `jagged_to_padded` runs here: at least one sequence, token and channel."""
    return (
        _loaded()
        and values.numel() > 0
        and offsets.numel() > 1
        and values.dtype in DTYPES
        and not _followed(values)
        and TO_PADDED.unusable(values, offsets) is None
    )


def jagged_to_padded(values: Tensor, offsets: Tensor, max_len: int, fill: float) -> Tensor:
    """`values [T, ...]` -> `[B, max_len, ...]`; tokens past `max_len` are cut off, gaps hold `fill`."""
    rows = values.reshape(values.shape[0], -1)
    padded: Tensor = TO_PADDED(values=rows, offsets=[offsets], max_lengths=[max_len], padding_value=float(fill))
    return padded.reshape(offsets.numel() - 1, max_len, *values.shape[1:])


def takes_padded(padded: Tensor, offsets: Tensor) -> bool:
    """Whether `padded_to_jagged` runs here: at least one sequence, place and channel."""
    return (
        _loaded()
        and padded.numel() > 0
        and padded.dtype in DTYPES
        and not _followed(padded)
        and TO_JAGGED.unusable(padded, offsets) is None
    )


def padded_to_jagged(padded: Tensor, offsets: Tensor, total: int) -> Tensor:
    """`padded [B, L, ...]` -> `values [T, ...]`, T = `total`."""
    rows = padded.reshape(*padded.shape[:2], -1)
    values, _ = TO_JAGGED(dense=rows, x_offsets=[offsets], total_L=total)
    return values.reshape(total, *padded.shape[2:])  # type: ignore[no-any-return]
