"""Order of work: one item a block of rows of a sequence, the longest sequences first."""

import torch
from torch import Tensor


def work_items(offsets: Tensor, total: int, block: int, *, last_first: bool) -> Tensor:
    """`[W, 2]` int32 of (sequence, block of `block` rows); block -1 where there is nothing to do.

    W = T // block + B bounds the number of blocks from sizes that the host knows, so nothing waits for the device.
    `last_first`: the last block of a sequence, that with most keys before it, comes first.
    """
    sequences = offsets.shape[0] - 1
    blocks = (offsets.diff() + block - 1) // block
    order = torch.argsort(blocks, descending=True, stable=True)
    blocks = blocks[order]
    ends = blocks.cumsum(0)
    item = torch.arange(total // block + sequences, device=offsets.device)
    place = torch.searchsorted(ends, item, right=True).clamp_max(sequences - 1)
    index = item - (ends - blocks)[place]
    inside = index < blocks[place]
    index = blocks[place] - 1 - index if last_first else index
    return torch.stack([order[place], torch.where(inside, index, -1)], 1).to(torch.int32)
