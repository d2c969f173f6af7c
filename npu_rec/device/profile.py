"""What is known about a piece of hardware, and the table of Ascend chips."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

CAPABILITIES = {
    "bf16": "matrix products and the vendor's fused operators take bfloat16; not every element-wise operator does",
    "hstu_v2": "the vendor's second generation of fused HSTU attention (RecSDK, CATLASS) is built for this chip",
    "no_int64_atomics": "Triton's atomic_add takes no int64 operand",
    "scalar_integer_compare": "vector code compares int32 and int64, and adds int64, one by one: use float32",
}
"""The meaning of each capability of the Ascend table. CUDA has `sm<major><minor>`, a CPU its vector extension."""


@dataclass(frozen=True)
class HardwareProfile:
    """Facts about one device. What is not known is None, never guessed.

    Attributes:
        chip: Name as the vendor's runtime reports it.
        cube_cores: Ascend matrix cores.
        vector_cores: Ascend vector cores.
        ub_bytes: Unified buffer of an Ascend vector core. The other buffers belong to a cube core:
            `l1_bytes`, the two operand buffers `l0a_bytes` and `l0b_bytes`, the accumulator `l0c_bytes`.
        multiprocessors: Streaming multiprocessors of a GPU.
        physical_cores: Cores of the host, without hyper-threads.
        logical_cores: Cores that the host's operating system sees.
        memory_bytes: Memory of the card; of the host for a CPU.
        capabilities: See `CAPABILITIES`.
    """

    chip: str
    cube_cores: int | None = None
    vector_cores: int | None = None
    ub_bytes: int | None = None
    l1_bytes: int | None = None
    l0a_bytes: int | None = None
    l0b_bytes: int | None = None
    l0c_bytes: int | None = None
    multiprocessors: int | None = None
    physical_cores: int | None = None
    logical_cores: int | None = None
    memory_bytes: int | None = None
    capabilities: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """What is known, for JSON: unknown fields are left out."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known | {"capabilities": sorted(self.capabilities)}


KIB = 1024

# Core counts and buffers are those of the target descriptions in Ascend's compiler (bishengir 1.2.0).
_A2_A3 = HardwareProfile(
    "",
    ub_bytes=192 * KIB,
    l1_bytes=512 * KIB,
    l0a_bytes=64 * KIB,
    l0b_bytes=64 * KIB,
    l0c_bytes=128 * KIB,
    capabilities=frozenset({"bf16", "no_int64_atomics", "scalar_integer_compare"}),
)
_24_CUBES = replace(_A2_A3, cube_cores=24, vector_cores=48)
_20_CUBES = replace(_A2_A3, cube_cores=20, vector_cores=40)
_A5 = HardwareProfile(
    "",
    cube_cores=32,
    vector_cores=64,
    ub_bytes=248 * KIB,
    l0c_bytes=256 * KIB,
    capabilities=frozenset({"bf16", "hstu_v2", "no_int64_atomics"}),
)
ASCEND_CHIPS = {
    "Ascend910B1": _24_CUBES,  # A2
    "Ascend910B2": _24_CUBES,
    "Ascend910B3": _20_CUBES,
    "Ascend910B4": _20_CUBES,
    "Ascend910_9382": _24_CUBES,  # A3
    "Ascend910_9391": _24_CUBES,
    "Ascend910_9392": _24_CUBES,
    "Ascend950PR_9589": _A5,
}


def ascend_profile(
    chip: str, *, memory_bytes: int | None = None, cube_cores: int | None = None, vector_cores: int | None = None
) -> HardwareProfile:
    """The profile of an Ascend chip, such as `Ascend910B1`; of a chip outside the table only what is given.

    What the runtime reports (the keyword arguments) wins over the table: a virtual NPU has fewer cores than its chip.
    """
    known = ASCEND_CHIPS.get(chip, HardwareProfile(chip))
    return replace(
        known,
        chip=chip,
        memory_bytes=memory_bytes,
        cube_cores=cube_cores or known.cube_cores,
        vector_cores=vector_cores or known.vector_cores,
    )
