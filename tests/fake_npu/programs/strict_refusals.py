"""What strict mode refuses, and that it lets the rest through. FAKE_NPU_STRICT=1."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import embedding_bag, silu

assert torch.npu.is_available()  # `import torch` has loaded the device


def refused(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(NotImplementedError, match=f"strict: .*{words}"):
        call()


x = torch.arange(24.0, device="npu").view(6, 4)
ids = torch.tensor([0, 2, 2], device="npu")
offsets = torch.tensor([0, 2, 6], device="npu")

refused("embedding_bag is not supported", lambda: embedding_bag(ids, x, offsets[:1]))
refused("embedding_bag is not supported", lambda: embedding_bag(ids, x.requires_grad_(), offsets[:1]))
x = x.detach()
refused("nested_tensor_from_jagged", lambda: torch.nested.nested_tensor_from_jagged(x, offsets))
refused(
    "nested tensors can be created",
    lambda: torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged, device="npu"),
)
refused("_jagged_to_padded_dense_forward", lambda: torch.ops.aten._jagged_to_padded_dense_forward(x, [offsets], [4]))

# a dtype, not the operator
counts = torch.zeros(3, dtype=torch.int64, device="npu")
refused("scatter_add/Long", lambda: counts.scatter_add_(0, ids, torch.ones_like(ids)))
counts.float().scatter_add_(0, ids, torch.ones(3, device="npu"))
refused("silu/BFloat16", lambda: silu(x.bfloat16()))
silu(x)
refused("mul/Double", lambda: x.double() * 2)

# an operator that nobody has looked at, in each of its forms; the device itself could run it
refused("igamma is not a reviewed operator", lambda: torch.igamma(x, x))
refused("igamma is not a reviewed operator", lambda: x.igamma_(x))
refused("operators/reviewed.txt says how to add it", lambda: torch.igamma(x, x, out=x))

# an operator of another library that knows only the CPU
library = torch.library.Library("fake_npu_test", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: x * 2, "CPU")
refused("fake_npu_test::twice is not a reviewed operator", lambda: torch.ops.fake_npu_test.twice(x))
torch.ops.fake_npu_test.twice(x.cpu())

assert torch.igamma(torch.ones(1), torch.ones(1)).item() > 0  # the host is free
