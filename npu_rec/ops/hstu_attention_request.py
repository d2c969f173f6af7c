"""One call of `hstu_attention`, as its backends receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.ops.masks import MaskRule, token_of_query


@dataclass(frozen=True)
class HSTUAttentionRequest:
    """Arguments of `hstu_attention` (shapes there)."""

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    num_targets: Tensor | None
    position_weight: Tensor | None
    time_weight: Tensor | None
    query_time: Tensor | None
    key_time: Tensor | None
    max_seq_len: int
    alpha: float
    divisor: float
    rule: MaskRule
    query_offsets: Tensor | None = None

    @staticmethod
    def sample(device: torch.device) -> HSTUAttentionRequest:
        """A small request with both biases: 2 sequences, N = 8, one head of width 16."""
        q, k, v = torch.zeros(3, 8, 1, 16, device=device)
        times = torch.zeros(8, dtype=torch.int64, device=device)
        position, time = torch.zeros(15, device=device), torch.zeros(129, device=device)
        offsets = torch.tensor([0, 3, 8], device=device)
        return HSTUAttentionRequest(q, k, v, offsets, None, position, time, times, times, 8, 1.0, 8.0, MaskRule())

    def check(self) -> None:
        """Raise ValueError when the offsets do not describe the tokens; on an accelerator they are trusted.

        (To look at them, the host would have to wait for the device in every layer.)
        """
        if self.offsets.device.type != "cpu":
            return
        lengths = offsets_to_lengths(self.offsets)
        _check_offsets("offsets", self.offsets, self.k.shape[0])
        longest = int(lengths.max()) if lengths.numel() else 0
        if longest > self.max_seq_len:
            raise ValueError(f"a sequence has {longest} tokens, max_seq_len is {self.max_seq_len}")
        if self.num_targets is not None and bool(((self.num_targets < 0) | (self.num_targets > lengths)).any()):
            raise ValueError("num_targets must be between 0 and the length of each sequence")
        if self.query_offsets is not None:
            _check_offsets("query_offsets", self.query_offsets, self.q.shape[0])
            if bool((offsets_to_lengths(self.query_offsets) > lengths).any()):
                raise ValueError("query_offsets gives a sequence more queries than offsets gives it keys")

    @property
    def offsets_of_queries(self) -> Tensor:
        """`[B + 1]`: which queries are of which sequence."""
        return self.offsets if self.query_offsets is None else self.query_offsets

    @property
    def tokens_of_queries(self) -> Tensor:
        """`[Tq]` int64: the key that is the same token."""
        return token_of_query(self.offsets, self.offsets_of_queries, self.q.shape[0])

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def _check_offsets(name: str, offsets: Tensor, total: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets_to_lengths(offsets) < 0).any()):
        raise ValueError(f"{name} must rise from 0 to T = {total}")


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, query_offsets: Tensor | None, num_targets: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of `hstu_attention` that are no constants fit each other."""
    same_tokens = query_offsets is not None or k.shape[0] == q.shape[0]
    if q.dim() != 3 or k.shape[1:] != q.shape[1:] or not same_tokens or v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q, k, v must be [T, H, Dqk], [T, H, Dqk], [T, H, Dv]; got {[list(x.shape) for x in (q, k, v)]}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[1] < 1 or q.shape[2] < 1 or v.shape[2] < 1:
        raise ValueError(f"heads and their widths must be 1 or more, got {[list(x.shape) for x in (q, k, v)]}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [B + 1], got {list(offsets.shape)}")
    if query_offsets is not None and query_offsets.shape != offsets.shape:
        raise ValueError(f"query_offsets must be [B + 1] = [{offsets.shape[0]}], got {list(query_offsets.shape)}")
    if num_targets is not None and num_targets.shape != (offsets.shape[0] - 1,):
        raise ValueError(f"num_targets must be [B] = [{offsets.shape[0] - 1}], got {list(num_targets.shape)}")
