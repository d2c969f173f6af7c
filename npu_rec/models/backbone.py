"""What every backbone is: a map of packed tokens to packed tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from npu_rec.config import ModelConfig, OpsConfig
from npu_rec.distributed.context import ContextShard
from npu_rec.ops.jagged import position_of_token
from npu_rec.ops.masks import token_ids
from npu_rec.ops.random import derive_keys


@dataclass(frozen=True)
class Layout:
    """How the tokens `[T]` of a batch hang together, for every layer alike.

    Attributes:
        offsets: `[B + 1]` int64.
        max_seq_len: N, the model's constant.
        times: `[T]` int64 seconds, the time of each event, or None for data without times.
        query_times: `[T]` int64 seconds, the time of the next event (of the request, for the last one).
        num_targets: `[B]` int64 trailing candidates, or None.
        contextual_seq_len: leading tokens of every sequence that see its whole history.
        dropout_keys: `[T]` int64, or None outside training: no dropout.
        context: with context parallel, what the T tokens here are of their sequences; offsets are those of the shard,
            num_targets those of the whole sequences.
    """

    offsets: Tensor
    max_seq_len: int
    times: Tensor | None = None
    query_times: Tensor | None = None
    num_targets: Tensor | None = None
    dropout_keys: Tensor | None = None
    context: ContextShard | None = None
    contextual_seq_len: int = 0

    def positions(self, total: int) -> Tensor:
        """The place of each of the `total` = T tokens inside its sequence, `[T]` int64; candidates share one."""
        if self.context is not None:
            return self.context.positions
        if self.num_targets is None:
            return position_of_token(self.offsets, total)
        return token_ids(self.offsets, total, 0, self.num_targets)[0]

    @property
    def key_times(self) -> Tensor | None:
        """Times of the keys that attention of these tokens reads: theirs, or with `context` those of its keys."""
        return self.times if self.context is None else self.context.key_times

    def keys_for(self, part: int) -> Tensor | None:
        """Dropout keys `[T]` of one place in the model."""
        return None if self.dropout_keys is None else derive_keys(self.dropout_keys, part)


class Backbone(nn.Module, ABC):
    """A sequence model over packed tokens. Register one with `@register("model", name, options=Schema)`.

    Attributes:
        learned_positions: the encoder adds a learned vector for each place to the input; of the class.
        takes_context: it heeds `Layout.context`, so sequences may be spread over ranks.
        needs_targets: it has outputs for candidates behind a history alone; of the class.
    """

    learned_positions: ClassVar[bool] = True
    takes_context: bool = False
    needs_targets: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, config: ModelConfig, options: Any, ops: OpsConfig) -> None:
        """Build from `model:`, its validated `model.options`, and the operator backends of `ops:`."""
        super().__init__()
        self.check(config, options)

    @classmethod
    def check(cls, config: ModelConfig, options: Any) -> None:
        """Raise ConfigError where the two do not fit together; it is also asked before data are read."""
        return

    @staticmethod
    def reset_positions(positions: Tensor, options: Any) -> None:
        """Initial values of the learned places `[N, D]`: Xavier normal, as in Meta's HSTU."""
        nn.init.xavier_normal_(positions)

    @property
    def needs_times(self) -> bool:
        """Whether data without times is a configuration error."""
        return False

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`x [T, D]` -> `[T, D]`."""

    @abstractmethod
    def flops(self, lengths: Tensor) -> float:
        """Floating-point operations of one forward pass over sequences of `lengths [B]`."""
