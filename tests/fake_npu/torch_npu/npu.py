"""`torch.npu`: the functions that PyTorch and its users ask of a device module, under torch_npu's names."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.accelerator import current_device_index as current_device
from torch.accelerator import (  # noqa: F401  what torch_npu names alike
    current_stream,
    device_index,
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_peak_memory_stats,
    set_device_index,
    set_stream,
    synchronize,
)

Where = torch.device | str | int | None

# Cube and vector cores of a chip (npu_rec/device/profile.py has the source).
_CORES = {"Ascend910B3": (20, 40), "Ascend910B4": (20, 40), "Ascend950PR_9589": (32, 64)}

Stream, Event = torch.Stream, torch.Event


def _index(where: Where) -> int:
    if isinstance(where, int):
        return where
    index = None if where is None else torch.device(where).index
    return current_device() if index is None else index


def device_count() -> int:
    count: int = torch.ops.fake_npu.device_count()
    return count


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def _lazy_init() -> None: ...


def _is_in_bad_fork() -> bool:
    return False


def set_device(where: Where) -> None:
    set_device_index(_index(where))


def device(where: Where) -> AbstractContextManager[object]:
    """The device is the current one inside."""
    return device_index(_index(where))


def default_stream(where: Where = None) -> torch.Stream:
    return torch.Stream(stream_id=0, device_index=_index(where), device_type=20)


def stream(given: torch.Stream | None) -> AbstractContextManager[object]:
    """The stream is the current one inside; None changes nothing."""
    return nullcontext() if given is None else given


def get_device_name(where: Where = None) -> str:
    return os.environ.get("FAKE_NPU_CHIP", "Ascend910B1")


def get_device_properties(where: Where = None) -> SimpleNamespace:
    cube, vector = _CORES.get(get_device_name(where), (24, 48))
    return SimpleNamespace(
        name=get_device_name(where),
        total_memory=torch.ops.fake_npu.total_memory(),
        cube_core_num=cube,
        vector_core_num=vector,
    )


def mem_get_info(where: Where = None) -> tuple[int, int]:
    """(free, total) bytes."""
    return torch.accelerator.get_memory_info(_index(where))


def manual_seed(seed: int) -> None:
    torch.ops.fake_npu.manual_seed(current_device(), seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        torch.ops.fake_npu.manual_seed(index, seed)


def get_rng_state(where: Where = "npu") -> Tensor:
    """The default generator's state, uint8 on the host."""
    state: Tensor = torch.ops.fake_npu.get_rng_state(_index(where))
    return state


def set_rng_state(state: Tensor, where: Where = "npu") -> None:
    torch.ops.fake_npu.set_rng_state(_index(where), state)


def get_rng_state_all() -> list[Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(states: list[Tensor]) -> None:
    for index, state in enumerate(states):
        set_rng_state(state, index)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    return True
