"""The device layer of npu_rec, and what PyTorch offers around it, on the fake npu (two devices of 64 GiB)."""

import io
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_rec.device import get_device
from npu_rec.errors import DeviceError

# By its entry point: `import npu_rec` keeps torch from loading it, `import torch` above did not.
assert torch.npu.is_available()


def refused(kind: type[Exception], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_selection() -> None:
    device = get_device("auto")
    assert device == get_device("ascend")
    assert (device.name, device.torch_device) == ("ascend", torch.device("npu:0"))
    assert (device.dispatch_key, device.collective_backend) == ("PrivateUse1", "hccl")
    profile = device.profile
    assert (profile.chip, profile.cube_cores, profile.vector_cores) == ("Ascend910B1", 24, 48)
    assert (profile.memory_bytes, profile.ub_bytes) == (64 << 30, 192 << 10)
    refused(DeviceError, "build without CUDA", lambda: get_device("cuda"))
    assert get_device("cpu").torch_device.type == "cpu"


def test_memory_is_counted_to_the_byte() -> None:
    device = get_device("ascend")
    assert device.memory_allocated() == 0
    a = torch.empty(1000, 3, device="npu")
    b = torch.empty(7, dtype=torch.int64, device="npu")
    assert device.memory_allocated() == 12_000 + 56
    view = a[10:].t()
    assert device.memory_allocated() == 12_056
    del a
    assert device.memory_allocated() == 12_056  # the view keeps it
    other = torch.empty(5, dtype=torch.uint8, device="npu:1")
    assert device.memory_allocated() == 12_056
    counted = torch.arange(4, device="npu:1")  # made empty, then resized
    assert torch.accelerator.memory_allocated("npu:1") == other.nbytes + counted.nbytes == 5 + 32
    del view, b
    assert (device.memory_allocated(), device.max_memory_allocated()) == (0, 12_056)
    device.reset_peak_memory()
    assert device.max_memory_allocated() == 0
    c = torch.ones(100, device="npu")
    d = (c + c) * 2  # one intermediate of 400 bytes at a time
    assert (device.memory_allocated(), device.max_memory_allocated()) == (800, 1200)
    assert torch.accelerator.get_memory_info() == ((64 << 30) - 800, 64 << 30)
    d.resize_(300)
    assert device.memory_allocated() == 400 + 1200
    assert torch.accelerator.memory_stats()["allocation.all.current"] == 2
    refused(torch.OutOfMemoryError, "out of memory", lambda: torch.empty(1 << 40, device="npu"))
    del c, d
    assert device.memory_allocated() == 0


def test_random_numbers() -> None:
    device = get_device("ascend")
    device.manual_seed(3)
    assert torch.equal(torch.rand(5, device="npu").cpu(), torch.rand(5))  # seeded alike, they draw alike
    state, host = device.rng_state(), torch.get_rng_state()
    assert state is not None
    assert (state.dtype, state.device.type) == (torch.uint8, "cpu")
    first = torch.randn(5, device="npu")
    assert torch.equal(torch.get_rng_state(), host)  # the host's generator stays where it was
    device.set_rng_state(state)
    assert torch.equal(first, torch.randn(5, device="npu"))
    torch.rand(1, device="npu:1")
    assert not torch.equal(state, device.rng_state())
    generator = torch.Generator("npu").manual_seed(1)
    assert generator.device == torch.device("npu:0")
    permutation = torch.randperm(50, generator=generator, device="npu")
    assert sorted(permutation.tolist()) == list(range(50))
    assert torch.equal(torch.randperm(50, generator=generator.manual_seed(1), device="npu"), permutation)
    assert torch.equal(torch.randperm(50, generator=torch.Generator().manual_seed(1)), permutation.cpu())


def test_streams_and_events() -> None:
    stream = torch.npu.Stream(device="npu:0")
    assert torch.npu.current_stream() != stream
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
        start.record()
        time.sleep(0.01)
        end.record(stream)
    assert torch.npu.current_stream() == torch.npu.default_stream()
    torch.npu.current_stream().wait_event(end)
    torch.npu.current_stream().wait_stream(stream)
    end.synchronize()
    assert end.query()
    assert 10 <= start.elapsed_time(end) < 10_000
    torch.ones(3, device="npu").record_stream(stream)
    get_device("ascend").synchronize()


def test_pinned_memory() -> None:
    pinned = torch.arange(6).pin_memory()
    assert pinned.is_pinned()
    assert pinned[2:].is_pinned()
    assert not torch.arange(6).is_pinned()
    assert torch.equal(pinned.to("npu", non_blocking=True).cpu(), torch.arange(6))
    loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2, pin_memory=True)
    assert all(batch.is_pinned() for batch in loader)


def test_devices_do_not_mix() -> None:
    here, there, host = torch.ones(2, 2, device="npu"), torch.ones(2, 2, device="npu:1"), torch.ones(2, 2)
    refused(RuntimeError, "npu:1", lambda: here + there)
    refused(RuntimeError, "cpu", lambda: here @ host)
    refused(RuntimeError, "cpu", lambda: torch.cumsum(host, 0, out=here))
    refused(RuntimeError, "does not exist", lambda: torch.empty(1, device="npu:2"))
    with torch.npu.device(1):
        assert torch.empty(1, device="npu").device.index == torch.npu.current_device() == 1
    assert torch.npu.current_device() == 0
    assert torch.equal(here[torch.tensor([0])], here[:1])  # indices may come from the host, as on a card
    assert torch.equal((here * torch.tensor(2.0)).cpu(), 2 * host)


def test_autocast() -> None:
    device = get_device("ascend")
    x = torch.randn(4, 8, device="npu")
    layer = torch.nn.Linear(8, 3).npu()
    exact = x @ x.T
    with device.autocast(torch.bfloat16):
        product = x @ x.T
        assert product.dtype == layer(x).dtype == torch.bfloat16
        assert torch.bmm(x[None], x.T[None]).dtype == torch.einsum("id,jd->ij", x, x).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(product, (4,)).dtype == torch.float32
        assert (product + 1).dtype == torch.bfloat16
        with torch.autocast("npu", enabled=False):
            assert torch.equal(x @ x.T, exact)
    assert torch.equal(product.cpu(), x.cpu().bfloat16() @ x.T.cpu().bfloat16())
    assert not torch.equal(product.float(), exact)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_operators_compute_in_place_into_views_and_out() -> None:
    x = torch.zeros(4, 3, device="npu")
    x[1:3].add_(2)
    x.t()[0].mul_(3)
    x[:, 1] = torch.arange(4.0, device="npu")
    expected = torch.zeros(4, 3)
    expected[1:3] += 2
    expected[:, 0] *= 3
    expected[:, 1] = torch.arange(4.0)
    assert torch.equal(x.cpu(), expected)
    out = torch.empty(0, device="npu")
    assert torch.cumsum(x, 0, out=out) is out
    assert torch.equal(out.cpu(), expected.cumsum(0))
    values, places = x.topk(2, dim=1)
    assert torch.equal(values.cpu(), expected.topk(2, dim=1).values)
    assert places.device == x.device
    assert torch.equal(x.flatten().unfold(0, 4, 2).cpu(), expected.flatten().unfold(0, 4, 2))
    assert x.new_ones(2).dtype == torch.float32


def test_saved_and_loaded() -> None:
    file = io.BytesIO()
    torch.save({"x": torch.arange(3.0, device="npu:1")}, file)
    for where, device in ((None, "npu:1"), ("npu:0", "npu:0"), ("cpu", "cpu")):
        file.seek(0)
        loaded = torch.load(file, weights_only=True, map_location=where)["x"]
        assert loaded.device == torch.device(device)
        assert loaded.tolist() == [0.0, 1.0, 2.0]


def test_custom_operators_dispatch() -> None:
    @torch.library.custom_op("fake_npu_test::double", mutates_args=(), device_types="cpu")
    def double(x: Tensor) -> Tensor:
        return x * 2

    @double.register_kernel("npu")
    def _(x: Tensor) -> Tensor:
        return x * 2 + 1

    assert double(torch.ones(1)).item() == 2
    assert double(torch.ones(1, device="npu")).item() == 3


for name, test in list(globals().items()):
    if name.startswith("test_"):
        test()
        print(name)
