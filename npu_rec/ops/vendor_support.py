"""Whether an operator of Ascend's own packages can be called: there at all, with our arguments, for this device.

Their signatures drift between releases, so an adapter passes arguments by keyword and looks first at the schema that
is really registered. None of them is ever traced: an adapter runs inside an operator of ours, which has a fake kernel.

The schemas that the adapters expect were read in the sources of RecSDK, fbgemm-ascend, FBGEMM and op-plugin, that of
ops_rec in its library, all in 2026. The calls are tested against stand-ins; none has run on an NPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from npu_rec.device.ascend import vendor_package_problems

OPS_REC, REC_OPS, FBGEMM_ASCEND, TORCH_NPU = "ops_rec", "rec_ops", "fbgemm_ascend", "torch_npu"


@dataclass(frozen=True)
class VendorOperator:
    """An operator of a vendor's package, and what an adapter needs of its schema.

    Attributes:
        name: `namespace::operator` or `namespace::operator.overload`.
        package: what brings it, a key of `npu_rec.device.ascend.VENDOR_PACKAGES`.
        arguments: the arguments that the adapter passes, with their types as `str(argument.type)` gives them.
        leading: types of arguments passed by place before those, where releases differ in their names.
        returns: types of the results, where releases differ in them.
    """

    name: str
    package: str
    arguments: tuple[tuple[str, str], ...]
    leading: tuple[str, ...] = ()
    returns: tuple[str, ...] | None = None

    @property
    def registered(self) -> bool:
        """Whether a schema of that name is there."""
        vendor_package_problems()  # this loads the packages
        return _find(self.name) is not None

    def unusable(self, *tensors: Tensor | None) -> str | None:
        """None when the operator can be called with tensors on this device, or the reason why not."""
        problems = vendor_package_problems()  # this loads the packages
        overload = _find(self.name)
        if overload is None:
            return f"no {self.name}: {self.package} {problems.get(self.package, 'is loaded, but has none')}"
        types = _argument_types(overload)
        first = tuple(types)[: len(self.leading)]
        if tuple(types[name] for name in first) != self.leading:
            return f"{self.name} begins with other arguments: another release of {self.package}"
        for name, wanted in self.arguments:
            if name not in types:
                return f"{self.name} has no argument {name!r}: another release of {self.package}"
            if types[name] != wanted:
                return f"{self.name}: {name!r} is {types[name]}, not {wanted}: another release of {self.package}"
        needed = [name for name in _needed(overload) if name not in (*first, *dict(self.arguments))]
        if needed:
            return f"{self.name} wants an argument {needed[0]!r} as well: another release of {self.package}"
        if self.returns is not None and _return_types(overload) != self.returns:
            return f"{self.name} returns something else: another release of {self.package}"
        for tensor in tensors:
            if tensor is not None and not _has_kernel(self.name, tensor.device.type):
                return f"{self.name} has no kernel for {tensor.device.type}"
        return None

    def __call__(self, *leading: object, **arguments: object) -> Any:
        """Call it; `unusable` has answered None."""
        overload = _find(self.name)
        assert overload is not None
        return overload(*leading, **arguments)


def vendor_operator(package: str, name: str, *leading: str, **arguments: str) -> VendorOperator:
    """A `VendorOperator`; the types of what is passed by place, then of what is passed by keyword."""
    return VendorOperator(name, package, tuple(arguments.items()), leading)


def dtype_refused(allowed: tuple[torch.dtype, ...], *tensors: Tensor | None) -> str | None:
    """None when all tensors have one of the allowed dtypes, or the reason."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in allowed:
            return f"the dtype is {tensor.dtype}; {', '.join(str(d).removeprefix('torch.') for d in allowed)}"
    return None


def outside(what: str, value: int, low: int, high: int, multiple: int = 1) -> str | None:
    """None when `value` lies in low..high and is a multiple of `multiple`, or the reason."""
    if low <= value <= high and value % multiple == 0:
        return None
    return f"{what} is {value}; {low} to {high}" + (f", a multiple of {multiple}" if multiple > 1 else "")


def _find(name: str) -> torch._ops.OpOverload | None:
    namespace, _, rest = name.partition("::")
    operator, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    found: torch._ops.OpOverload | None = getattr(packet, overload or "default", None)  # packet may be None
    return found


@cache
def _argument_types(overload: torch._ops.OpOverload) -> dict[str, str]:
    return {argument.name: str(argument.type) for argument in overload._schema.arguments}


@cache
def _return_types(overload: torch._ops.OpOverload) -> tuple[str, ...]:
    return tuple(str(result.type) for result in overload._schema.returns)


@cache
def _needed(overload: torch._ops.OpOverload) -> list[str]:
    return [a.name for a in overload._schema.arguments if not a.has_default_value()]


def _has_kernel(name: str, device_type: str) -> bool:
    # a FakeTensor's device is that of the tensor it stands for, so this is asked of the real kernel
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
