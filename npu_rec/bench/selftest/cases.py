"""A case of an operator: inputs of a seeded draw, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Operation = Callable[[Tensors, str], tuple[Tensor, ...]]
"""Takes tensors by name and a backend, returns the operator's outputs."""


@dataclass(frozen=True)
class Case:
    """Inputs, and what is compared.

    Attributes:
        floats: float64 on the CPU; cast to the precision under test.
        indices: int64 on the CPU.
        parameters: names of floats that stay float32 in a lower precision, as under autocast.
        results: `results(tensors, backend, dtype)` computes what is compared, by name. Outputs of a forward pass have
            names that begin with `out`. `dtype` is the precision under test.
    """

    label: str
    floats: Tensors
    indices: Tensors
    results: Callable[[Tensors, str, torch.dtype], Tensors]
    parameters: tuple[str, ...] = field(default=())

    def rounded(self, dtype: torch.dtype) -> Tensors:
        """The floats in the precision under test."""
        lower = dtype not in (torch.float32, torch.float64)
        kept = self.parameters if lower else ()
        return {name: x.to(torch.float32 if name in kept else dtype) for name, x in self.floats.items()}


def differentiated(operation: Operation, constants: tuple[str, ...] = ()) -> Callable[..., Tensors]:
    """The outputs of `operation` and the gradients of all floats but `constants`, for drawn gradients of outputs."""

    def results(tensors: Tensors, backend: str, dtype: torch.dtype) -> Tensors:
        leaves = {
            name: x.detach().clone().requires_grad_()
            for name, x in tensors.items()
            if x.is_floating_point() and name not in constants
        }
        outputs = operation({**tensors, **leaves}, backend)
        upstream = [draw(7 + i, *out.shape).to(dtype).to(out) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        found = {f"out{i or ''}": out.detach() for i, out in enumerate(outputs)}
        return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    return results


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal, float64 on the CPU."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_ints(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Uniform in low..high-1, int64 on the CPU."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
