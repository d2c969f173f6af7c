"""HSTU's relative attention bias: what an attention operator needs to compute it by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RelativeBias:
    """Position and time bias of one layer, shared by its heads (HSTU, arXiv 2402.17152, section 3.2).

        bias[i, j] = position_weight[N - 1 + id_j - id_i] + time_weight[bucket(query_time_i - key_time_j)]

    Attributes:
        position_weight: `[2N - 1]`.
        time_weight: `[buckets + 1]`, or None for a bias by position alone.
        query_time: `[T]` int64 seconds, one for each query. In research HSTU the time of event i + 1 for event i;
            for the last event and for every target the request time, one per sequence.
        key_time: `[T]` int64 seconds, one for each key, the time of the event itself.
    """

    position_weight: Tensor
    time_weight: Tensor | None = None
    query_time: Tensor | None = None
    key_time: Tensor | None = None

    def check(self, total: int, max_seq_len: int, queries: int | None = None) -> None:
        """Raise ValueError when the parts do not fit together, T = `total` tokens and N = `max_seq_len`.

        `queries` is their number where not every token is one.
        """
        if self.position_weight.shape != (2 * max_seq_len - 1,):
            raise ValueError(
                f"position_weight must be [2 * max_seq_len - 1] = [{2 * max_seq_len - 1}], "
                f"got {list(self.position_weight.shape)}"
            )
        times = {"query_time": self.query_time, "key_time": self.key_time}
        if self.time_weight is None:
            given = [name for name, value in times.items() if value is not None]
            if given:
                raise ValueError(f"{' and '.join(given)} given without time_weight")
            return
        if self.time_weight.dim() != 1 or self.time_weight.shape[0] < 2:
            raise ValueError(f"time_weight must be [buckets + 1], got {list(self.time_weight.shape)}")
        counts = {"query_time": total if queries is None else queries, "key_time": total}
        for name, value in times.items():
            if value is None or value.shape != (counts[name],):
                shape = None if value is None else list(value.shape)
                raise ValueError(f"time_weight needs {name} of shape [T] = [{counts[name]}], got {shape}")
