"""One call of `hstu_attention`, as its backends receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.ops.masks import MaskRule


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
        total = self.q.shape[0]
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != total or bool((lengths < 0).any()):
            raise ValueError(f"offsets must rise from 0 to T = {total}")
        longest = int(lengths.max()) if lengths.numel() else 0
        if longest > self.max_seq_len:
            raise ValueError(f"a sequence has {longest} tokens, max_seq_len is {self.max_seq_len}")
        if self.num_targets is not None and bool(((self.num_targets < 0) | (self.num_targets > lengths)).any()):
            raise ValueError("num_targets must be between 0 and the length of each sequence")

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32
