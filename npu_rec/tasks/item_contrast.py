"""A self-supervised regulariser of item vectors: two augmented views of an item are nearer than views of two items.

L_self of Yao et al., arXiv 2007.12865, for items that are a row of a table and nothing else: there are no features to
mask and no tower to bring two halves of a row together again, so the views of a row are two dropouts of it. Items are
drawn alike from the catalogue, as there; every position of the batch draws its own, so that nothing depends on what
shares its batch or its rank.
"""

from __future__ import annotations

from torch import Tensor

from npu_rec.models.encoder import unit
from npu_rec.ops import sampled_softmax_loss
from npu_rec.ops.random import derive_keys, dropout, random_integers, random_key


class ItemContrast:
    """`-log(exp(cos(z_i, z'_i) / t) / sum_j exp(cos(z_i, z'_j) / t))`, z and z' the views of an item.

    Args:
        size: C, items of the catalogue.
        items: B, the items j of a position; the first of them is i. Those equal to i count once.
        dropout: probability with which a view loses an element. 0: z = z' is the row itself, and all that is left is
            that rows spread out.
        temperature: t.
        backend: of `sampled_softmax_loss`.
    """

    def __init__(self, seed: int, size: int, items: int, dropout: float, temperature: float, backend: str) -> None:
        self.seed, self.size, self.items = seed, size, items
        self.dropout, self.temperature, self.backend = dropout, temperature, backend

    def draw(self, epoch: int, sequence_ids: Tensor, positions: Tensor) -> Tensor:
        """`[T, B]` int64 columns of the catalogue for the positions `[T]` of sequences `[T]`."""
        return random_integers(random_key(self.seed, "contrast", epoch, sequence_ids, positions), self.items, self.size)

    def loss(self, epoch: int, items: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
        """`[T]`, of `drawn [T, B]`, indices into `rows [C, E]`, the rows of `items [C]`."""
        keys = random_key(self.seed, "views", epoch, items)  # an item has the same views all through an epoch
        first, second = (unit(dropout(rows.float(), self.dropout, derive_keys(keys, view))) for view in (0, 1))
        own, others = drawn[:, 0].contiguous(), drawn[:, 1:].contiguous()
        return sampled_softmax_loss(first[own], second, own, others, temperature=self.temperature, backend=self.backend)
