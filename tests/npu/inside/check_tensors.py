"""Tensors, copies, memory, streams and events on the emulated device. EMULATED_CANN_MEM_MB=256."""

from __future__ import annotations

import pytest
import torch
import torch_npu  # noqa: F401  registers the device


def test_the_device_presents_itself() -> None:
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 1
    assert torch.npu.get_device_name(0) == "Ascend910B3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_copies_keep_values(dtype: torch.dtype) -> None:
    source = torch.arange(24).view(4, 6).to(dtype)
    on_device = source.npu()
    assert on_device.device.type == "npu"
    assert torch.equal(on_device.cpu(), source)
    assert torch.equal(on_device[1:3].t().contiguous().cpu(), source[1:3].t())
    on_device[:, 2:4].copy_(source[:, 4:6].npu())
    assert torch.equal(on_device[:, 2:4].cpu(), source[:, 4:6])


def test_copies_convert_dtypes() -> None:
    source = torch.randn(5, 3)
    assert torch.equal(source.npu().to(torch.bfloat16).cpu(), source.to(torch.bfloat16))
    assert torch.equal(source.npu().to("cpu", torch.float64), source.double())


def test_fresh_memory_is_poison() -> None:
    torch.npu.empty_cache()
    assert torch.empty(64, dtype=torch.uint8, device="npu").cpu().eq(0xCB).all()


def test_memory_has_a_limit() -> None:
    free, total = torch.npu.mem_get_info()
    assert total == 256 << 20
    assert free <= total
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(300 << 20, dtype=torch.uint8, device="npu")
    kept = torch.empty(100 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.mem_get_info()[0] <= total - (100 << 20)
    del kept
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] > total - (100 << 20)


def test_pinned_memory_is_known() -> None:
    assert torch.empty(4, pin_memory=True).is_pinned()
    assert not torch.empty(4).is_pinned()


def test_a_stream_waits_for_an_event_of_another() -> None:
    side, start, end = torch.npu.Stream(), *(torch.npu.Event(enable_timing=True) for _ in "ab")
    x = torch.zeros(8, device="npu")
    start.record()
    x.add_(1)
    with torch.npu.stream(side):
        side.wait_stream(torch.npu.default_stream())
        y = x * 2
        end.record()
    torch.npu.current_stream().wait_event(end)
    assert torch.equal((y + 1).cpu(), torch.full((8,), 3.0))
    end.synchronize()
    assert end.query()
    assert start.elapsed_time(end) >= 0


def test_host_callbacks_run_in_the_order_of_the_stream() -> None:
    seen: list[int] = []
    stream = torch.npu.current_stream()
    torch.npu._subscribe_report(stream)
    torch.npu._launch_host_func(stream, lambda value: seen.append(value), 1)
    torch.npu._launch_host_func(stream, lambda value: seen.append(value), 2)
    stream.synchronize()
    torch.npu._unsubscribe_report(stream)
    assert seen == [1, 2]
