"""Context parallel: the tokens of every sequence spread over the ranks, for sequences beyond one card's memory.

A sequence is cut into 2 W chunks for W ranks, and rank r takes chunks r and 2 W - 1 - r, so that causal attention is
about the same work everywhere (Llama 3, arXiv 2407.21783, section 3.3.2). What a layer does to each token by itself
needs nothing else; attention needs the keys and values before a token, which the ranks send each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from npu_rec.distributed.world import ALONE, World
from npu_rec.errors import ConfigError
from npu_rec.ops.jagged import lengths_to_offsets, offsets_to_lengths, sequence_of_token


def context_world(world: World, size: int) -> World:
    """The `size` consecutive ranks that share sequences with this one, in a group of their own; one process is alone.

    Raises:
        ConfigError: the ranks cannot be divided so.
    """
    if size == 1 or world.size == 1:
        return ALONE
    if world.size % size:
        raise ConfigError(f"parallel.context: {world.size} ranks cannot be divided into groups of {size}")
    return world.split([range(first, first + size) for first in range(0, world.size, size)])


@dataclass(frozen=True)
class ContextShard:
    """What this rank has of a batch of B sequences and T tokens: two pieces of each sequence, Tr tokens.

    Every piece has queries, its tokens, and keys, the tokens of the sequence up to its end: K of them over all
    pieces. Pieces and sequences without a token are legal.

    Attributes:
        world: the ranks that share the sequences.
        tokens: `[Tr]` int64, which tokens of the batch are here, ascending.
        positions: `[Tr]` int64, the place of each inside its sequence.
        offsets: `[B + 1]` int64 of the tokens here.
        query_offsets, key_offsets: `[2 B + 1]` int64 of the pieces.
        later: `[2 B]` int64, how many tokens of its sequence come after a piece.
        sends: `[S]` int64, rows of the tokens here that other ranks need, rank after rank.
        send_counts, receive_counts: rows to and from each rank.
        keys: `[K]` int64, rows of what is received.
        key_times: `[K]` int64 seconds, or None.
    """

    world: World
    tokens: Tensor
    positions: Tensor
    offsets: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    later: Tensor
    sends: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    keys: Tensor
    key_times: Tensor | None

    def to(self, device: torch.device) -> ContextShard:
        """The same with its tensors on a device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: x.to(device, non_blocking=True) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **{**values, **moved})

    def local(self, values: Tensor) -> Tensor:
        """`values [T, ...]` of the batch's tokens -> `[Tr, ...]`, those here."""
        return values.index_select(0, self.tokens)

    def targets_of_pieces(self, num_targets: Tensor) -> Tensor:
        """Trailing candidates of each sequence `[B]` -> of the keys of each piece `[2 B]`."""
        return (num_targets.repeat_interleave(2) - self.later).clamp_min(0)

    def gather(self, rows: Tensor, what: str) -> Tensor:
        """`rows [Tr, C]` of every rank -> `[K, C]`, those of the keys of this rank's pieces."""
        sent = rows.index_select(0, self.sends)
        received = self.world.all_to_all(sent, self.send_counts, self.receive_counts, what)
        return received.index_select(0, self.keys)

    def scatter_add(self, rows: Tensor, what: str) -> Tensor:
        """The transpose of `gather`: `[K, C]` of every rank, summed for each token -> `[Tr, C]`.

        Sums are in float32 or wider and in a fixed order, by rank.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        read = rows.new_zeros((sum(self.receive_counts), rows.shape[1]), dtype=wide)
        read.index_add_(0, self.keys, rows.to(wide))  # a token is a key of two pieces at most: no order to keep
        back = self.world.all_to_all(read.to(rows.dtype), self.receive_counts, self.send_counts, what)
        total = rows.new_zeros((self.tokens.shape[0], rows.shape[1]), dtype=wide)
        parts = zip(self.sends.split(self.send_counts), back.split(self.send_counts), strict=True)
        for places, part in parts:
            total.index_add_(0, places, part.to(wide))
        return total.to(rows.dtype)


def context_shard(world: World, offsets: Tensor, times: Tensor | None = None) -> ContextShard:
    """Cut a batch, which all ranks of `world` have, into what each rank takes.

    Nothing is sent. Offsets of an accelerator make the host wait for it once.

    Args:
        offsets: `[B + 1]` int64 of the whole batch.
        times: `[T]` int64 seconds of its events, or None.
    """
    device, offsets = offsets.device, offsets.cpu()
    lengths = offsets_to_lengths(offsets)
    chunks = 2 * world.size
    total = int(offsets[-1])
    sequences = sequence_of_token(offsets, total)
    positions = torch.arange(total) - offsets[sequences]
    # chunk c of n tokens: from floor(c n / chunks) to before floor((c + 1) n / chunks)
    chunk = ((positions + 1) * chunks - 1) // lengths[sequences]
    owner = torch.minimum(chunk, chunks - 1 - chunk)
    tokens = [(owner == rank).nonzero().squeeze(1) for rank in range(world.size)]

    def needed(of: int, by: int) -> Tensor:
        """Rows of the tokens of one rank that another needs: all before the end of its later chunk."""
        end = (chunks - by) * lengths // chunks
        return (positions[tokens[of]] < end[sequences[tokens[of]]]).nonzero().squeeze(1)

    mine = tokens[world.rank]
    sends = [needed(world.rank, rank) for rank in range(world.size)]
    received = [tokens[rank][needed(rank, world.rank)] for rank in range(world.size)]
    row_of_token = torch.zeros(total, dtype=torch.int64)
    row_of_token[torch.cat(received)] = torch.arange(sum(map(len, received)))

    own = (world.rank, chunks - 1 - world.rank)
    starts, ends = (torch.stack([(c + more) * lengths // chunks for c in own], 1).flatten() for more in (0, 1))
    key_lengths = torch.where(ends > starts, ends, 0)  # a piece without queries asks for no keys
    key_offsets = lengths_to_offsets(key_lengths)
    piece = sequence_of_token(key_offsets, int(key_offsets[-1]))
    key_tokens = torch.arange(piece.shape[0]) - key_offsets[piece] + offsets[piece // 2]
    query_offsets = lengths_to_offsets(ends - starts)
    shard = ContextShard(
        world,
        mine,
        positions[mine],
        query_offsets[::2].contiguous(),
        query_offsets,
        key_offsets,
        lengths.repeat_interleave(2) - key_lengths,
        torch.cat(sends),
        [len(rows) for rows in sends],
        [len(rows) for rows in received],
        row_of_token[key_tokens],
        None,
    ).to(device)
    return shard if times is None else replace(shard, key_times=times[key_tokens.to(times.device)])
