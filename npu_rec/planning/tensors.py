"""Tensors of the device that have a shape and no data, and the bytes they would take.

Inside `imagined`, what the host holds is real and computes as ever; what a factory makes, and everything computed
from it, is a tensor of PyTorch's FakeTensorMode. So one rank of a model of any size is built and trained in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from npu_rec.ops import hstu_attention_tiled, sampled_softmax_loss_chunked, softmax_attention_tiled
from npu_rec.ops.hstu_attention_request import HSTUAttentionRequest
from npu_rec.ops.softmax_attention_request import SoftmaxAttentionRequest

_aten = torch.ops.aten


def _index(x: Tensor, indices: Any) -> Tensor:
    """By masks: everything is chosen."""
    places = [
        i.new_empty(i.shape, dtype=torch.int64) if i is not None and i.dtype == torch.bool else i for i in indices
    ]
    chosen: Tensor = _aten.index.Tensor(x, places)
    return chosen


def _unique(x: Tensor, *flags: bool, **more: bool) -> tuple[Tensor, ...]:
    """All are distinct."""
    return tuple(x.new_empty(x.shape, dtype=dtype) for dtype in (x.dtype, torch.int64, torch.int64))


def _number(x: Tensor) -> float | int:
    """A loss that is finite, an id that every table has; of a question, no."""
    return 1.0 if x.dtype.is_floating_point else 0


# What an operator answers whose result depends on data.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _number,
    _aten.item.default: _number,
    _aten._unique2.default: _unique,
    _aten.index.Tensor: _index,
}
_CHUNKS = 16

_UPDATE = ("embedding_update", "embedding_lookup")
_COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: ("all_gather", 0),
    torch.ops.c10d._reduce_scatter_base_.default: ("reduce_scatter", 1),
}


# Operators by their plain PyTorch backend, which is run for the tensors that it has for a while. That of attention
# without its tiles: which there are depends on data, and their size is fixed (attention_tiles.SCORES_AT_ONCE).
_PLAIN = {
    "hstu_attention": "tiled",
    "softmax_attention": "tiled",
    "norm_gate": "reference",
    "dropout": "reference",
    "sampled_softmax_loss": "chunked",
    "embedding_lookup": "reference",
}


def _in_many_chunks(func: Any, args: Any) -> bool:
    """Whether the loss works in so many chunks that one is nothing beside the rest; they would take long to imagine."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    if "negatives" not in named:
        return False
    floats = named["negatives"].numel() * named["queries"].shape[1]
    return bool(floats > _CHUNKS * sampled_softmax_loss_chunked.FLOATS_AT_ONCE)


class Ledger(TorchDispatchMode):
    """Counts the bytes of the device's tensors that are alive.

    Operators whose result depends on data get an answer all the same (`_ANSWERS`). Where `ops:` leaves the choice of a
    backend open, the plain one counts (`_PLAIN`).

    Attributes:
        bytes, peak: now, and the most since `reset_peak`.
        collective: told of the collectives of FSDP2: their name, and the bytes of the whole.
    """

    def __init__(self, collective: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collective = collective
        self.bytes = self.peak = 0
        self._alive: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Count the peak from now on."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = (args, kwargs)
        fake = tree_any(lambda x: isinstance(x, FakeTensor), given)
        if not fake and tree_any(lambda x: isinstance(x, Tensor), given):
            with _disable_current_modes():  # work of the host
                return func(*args, **kwargs)
        if func in _ANSWERS:
            return tree_map_only(Tensor, self.take, _ANSWERS[func](*args, **kwargs))
        if func in _COLLECTIVES:
            op, whole = _COLLECTIVES[func]
            self.collective(op, args[whole].nbytes)
        result = self._plain(func, args) if func.namespace == "npu_rec" else func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor):
                self.take(x)
        return result

    def _plain(self, func: Any, args: Any) -> Any:
        """One of our operators, by the code of its plain backend if that is to be counted."""
        name = func._schema.name.partition("::")[2]
        operator = next((o for o in _PLAIN if name in (o, f"{o}_backward") or (name, o) == _UPDATE), None)
        place = [argument.name for argument in func._schema.arguments].index("backend")
        if operator is None or args[place] not in ("auto", _PLAIN[operator]) or _in_many_chunks(func, args):
            return func(*args)
        with self:
            function: Callable[..., Any] = OPDEFS[func._schema.name]._init_fn
            return function(*args[:place], _PLAIN[operator], *args[place + 1 :])

    def take(self, x: Tensor) -> Tensor:
        """Count a tensor, unless its memory is counted already."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = 0
            self._resized(storage)
            weakref.finalize(storage, self._gone, key)
        return x

    def _resized(self, storage: torch.UntypedStorage) -> None:
        self.bytes += storage.nbytes() - self._alive[storage._cdata]
        self._alive[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int) -> None:
        self.bytes -= self._alive.pop(key)

    def materialise(self, module: nn.Module) -> None:
        """Put parameters and buffers that are on `meta` on the device."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def imagined(collective: Callable[[str, int], None]) -> Iterator[Ledger]:
    """The device's tensors are imagined and counted."""
    ledger = Ledger(collective)
    resize = torch.UntypedStorage.resize_

    def counted(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 frees and takes memory so
        result = resize(storage, size)
        if storage._cdata in ledger._alive:
            ledger._resized(storage)
        return result

    with ExitStack() as patches:
        patches.enter_context(patch.object(torch.UntypedStorage, "resize_", counted))
        for tiled in (hstu_attention_tiled, softmax_attention_tiled):
            patches.enter_context(patch.object(tiled, "tiles_of", lambda request: ()))
        for request in (HSTUAttentionRequest, SoftmaxAttentionRequest):
            patches.enter_context(patch.object(request, "check", lambda request: None))  # it reads offsets
        patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield patches.enter_context(ledger)
