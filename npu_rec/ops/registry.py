"""Operators, their backends, and the choice between them.

A backend is a forward and a backward function over the operator's request, and `supports`,
which answers None when it can run a request and the reason when it cannot. To add one, write
a module that makes a `Backend` and name it in the operator's list (docs/operators.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from npu_rec.errors import BackendError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    Attributes:
        by_name_only: `auto` never takes it (kernels under an interpreter, say).
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[[Any], str | None] = lambda request: None
    by_name_only: bool = False


@dataclass
class Operator:
    """An operator and its backends, the fastest first."""

    name: str
    backends: list[Backend]
    sample: Callable[[torch.device], Any]

    def availability(self, device: torch.device) -> dict[str, str | None]:
        """For each backend None when it runs an ordinary small request on this device, or the reason why not."""
        request = self.sample(device)
        return {backend.name: _reason(backend, request) for backend in self.backends}

    def select(self, request: Any, name: str) -> Backend:
        """The backend to run `request` with.

        Raises:
            BackendError: no backend is named so, or the named one cannot run the request (with its reason).
        """
        if name != "auto":
            backend = self.find(name)
            reason = backend.supports(request)
            if reason is not None:
                raise BackendError(f"ops.{self.name}: backend {name!r} cannot run here: {reason}")
            return backend
        for backend in self.backends:
            if not backend.by_name_only and backend.supports(request) is None:
                _log_choice(self.name, backend.name)
                return backend
        reasons = "; ".join(f"{b.name}: {b.supports(request)}" for b in self.backends)
        raise BackendError(f"ops.{self.name}: no backend can run here: {reasons}")

    def forward(self, request: Any, name: str, device: torch.device) -> Any:
        """Run the chosen backend's forward."""
        backend = self.select(request, name)
        with _for_backend(device):
            return backend.forward(request)

    def backward(self, request: Any, name: str, device: torch.device, *arguments: Tensor) -> Any:
        """Run the chosen backend's backward."""
        backend = self.select(request, name)
        with _for_backend(device):
            return backend.backward(request, *arguments)

    def find(self, name: str) -> Backend:
        """The backend of that name."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(["auto", *(b.name for b in self.backends)])
        raise BackendError(f"ops.{self.name}: no backend {name!r}; known: {known}")

    def add(self, backend: Backend, *, before: str) -> None:
        """Register a backend from outside, ahead of the one named `before`."""
        if any(b.name == backend.name for b in self.backends):
            raise BackendError(f"ops.{self.name}: a backend {backend.name!r} is registered already")
        self.backends.insert(self.backends.index(self.find(before)), backend)


def _reason(backend: Backend, request: Any) -> str | None:
    try:
        return backend.supports(request)
    except BackendError as error:  # a wrong setting, which stops every run
        return str(error)


@contextmanager
def _for_backend(device: torch.device) -> Iterator[None]:
    """No autocast, for a backend decides on its precision itself; the card of the tensors is the current one."""
    card = nullcontext() if device.type in ("cpu", "meta") else torch.accelerator.device_index(device.index or 0)
    with torch.autocast(device.type, enabled=False), card:
        yield


OPERATORS: dict[str, Operator] = {}


def operator(name: str, *backends: Backend, sample: Callable[[torch.device], Any]) -> Operator:
    """Make and register an operator, its backends given the fastest first; `sample` makes a small request."""
    OPERATORS[name] = Operator(name, list(backends), sample)
    return OPERATORS[name]


@cache
def _log_choice(operator_name: str, backend_name: str) -> None:
    log.info("operator %s runs on backend %s", operator_name, backend_name)


def backward_by_autograd(
    forward: Callable[..., Tensor], grad: Tensor, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `forward(*inputs)` by PyTorch's autograd; zeros, never None, for a given input.

    `torch.func.vjp`, because inside an operator's kernel the ordinary autograd is switched off.
    """
    given = [x.detach() for x in inputs if x is not None]

    def of_given(*leaves: Tensor) -> Tensor:
        remaining = iter(leaves)
        return forward(*(None if x is None else next(remaining) for x in inputs))

    pull_back = torch.func.vjp(of_given, *given)[1]
    grads = iter(pull_back(grad))
    return tuple(None if x is None else next(grads) for x in inputs)
