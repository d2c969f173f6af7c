"""A stand-in for Huawei's torch_npu: a device really called "npu", on host memory, for tests without a card.

    PYTHONPATH=tests/fake_npu python ...          then `import torch_npu`, as on an Ascend machine

Environment: FAKE_NPU_DEVICES (2), FAKE_NPU_CHIP (Ascend910B1), FAKE_NPU_MEMORY (bytes of each device, 64 GiB) and
FAKE_NPU_STRICT (1: an operator that is not in operators/reviewed.txt, or is in operators/unsupported.yaml, is an
error). It proves routing, wiring and memory use, not the numerics of the chip: PyTorch's CPU kernels compute.
"""

import os

import fake_npu_build
import torch

torch.ops.load_library(fake_npu_build.library())
torch.utils.rename_privateuse1_backend("npu")

from torch_npu import hccl, npu, strict  # noqa: E402

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(
    unsupported_dtype=[torch.quint8, torch.quint4x2, torch.quint2x4, torch.qint32, torch.qint8]
)
hccl.register()
__version__ = fake_npu_build.VERSION

if os.environ.get("FAKE_NPU_STRICT") == "1":
    strict.enable()


def _autoload() -> None:
    """The entry point by which `import torch` loads this package; importing it has done everything."""
