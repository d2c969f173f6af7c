"""One call of `softmax_attention`, as its backends receive it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_rec.ops.jagged import offsets_to_lengths
from npu_rec.ops.masks import MaskRule


@dataclass(frozen=True)
class SoftmaxAttentionRequest:
    """Arguments of `softmax_attention` (shapes there)."""

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    num_targets: Tensor | None
    position_weight: Tensor | None
    time_weight: Tensor | None
    query_time: Tensor | None
    key_time: Tensor | None
    dropout_keys: Tensor | None
    max_seq_len: int
    scale: float
    dropout: float
    rule: MaskRule

    @staticmethod
    def sample(device: torch.device) -> SoftmaxAttentionRequest:
        """A small request without a bias: 2 sequences, N = 8, one head of width 16."""
        q, k, v = torch.zeros(3, 8, 1, 16, device=device)
        offsets = torch.tensor([0, 3, 8], device=device)
        return SoftmaxAttentionRequest(
            q, k, v, offsets, None, None, None, None, None, None, 8, 0.25, 0.0, MaskRule()
        )  # fmt: skip

    def check(self) -> None:
        """Raise ValueError when the offsets do not describe the tokens; on an accelerator they are trusted."""
        if self.offsets.device.type != "cpu":
            return
        lengths, total = offsets_to_lengths(self.offsets), self.q.shape[0]
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != total or bool((lengths < 0).any()):
            raise ValueError(f"offsets must rise from 0 to T = {total}")
        longest = int(lengths.max()) if lengths.numel() else 0
        if longest > self.max_seq_len:
            raise ValueError(f"a sequence has {longest} tokens, max_seq_len is {self.max_seq_len}")
        if self.num_targets is not None and bool(((self.num_targets < 0) | (self.num_targets > lengths)).any()):
            raise ValueError("num_targets must be between 0 and the length of each sequence")

    def beyond_packed_attention(self) -> str | None:
        """What of the request the fused packed attention of PyTorch and of torch_npu lacks, or None."""
        rule = self.rule
        if self.position_weight is not None:
            return "takes no bias for packed sequences"
        if self.drops:
            return "its dropout is not drawn from keys"
        if self.num_targets is not None or rule.contextual_seq_len > 0:
            return "has no mask of targets and contextual tokens"
        if rule.max_attn_len > 0 and (not rule.causal or rule.min_full_attn_seq_len > 0):
            return "a local window is causal and the same for all rows"
        return None

    @property
    def alpha(self) -> float:
        """The scale, by the name it has in HSTU's attention."""
        return self.scale

    @property
    def offsets_of_queries(self) -> Tensor:
        """`[B + 1]`: every token is a query."""
        return self.offsets

    @property
    def tokens_of_queries(self) -> Tensor:
        """`[T]` int64."""
        return torch.arange(self.q.shape[0], device=self.q.device)

    @property
    def drops(self) -> bool:
        """Whether there is dropout at all."""
        return self.dropout > 0.0 and self.dropout_keys is not None

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32
