"""The clock without arithmetic: EMULATED_CANN_CLOCK=1 and EMULATED_CANN_COMPUTE=0.

Times are compared on the device's own axis, which does not depend on how busy this machine is. The
figures are those of emulated_cann/runtime/figures_910b.h.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch_npu  # noqa: F401  registers the device

HBM_BYTES_PER_MS = 1600e6 * 0.58
CUBE_FLOPS_PER_MS = 390e9 * 0.68
EAGER_GAP_MS, CAPTURED_GAP_MS, GRAPH_LAUNCH_MS = 0.003, 0.0008, 0.015


def _device_ms(work: Callable[[], object]) -> float:
    """Device time from the start of the work, which begins when all of it is queued."""
    queued, other = torch.npu.ExternalEvent(), torch.npu.Stream()
    start, end = (torch.npu.Event(enable_timing=True) for _ in "se")
    queued.wait(torch.npu.current_stream())
    start.record()
    work()
    end.record()
    queued.record(other)
    end.synchronize()
    return start.elapsed_time(end)


def test_a_large_product_takes_its_flops() -> None:
    weight = torch.empty(8192, 8192, dtype=torch.bfloat16, device="npu")
    expected = 2 * 8192**3 / CUBE_FLOPS_PER_MS + EAGER_GAP_MS
    assert _device_ms(lambda: weight @ weight) == pytest.approx(expected, rel=0.01)


def test_a_thin_product_takes_its_weight_bytes() -> None:
    weight, x = (torch.empty(n, 8192, dtype=torch.bfloat16, device="npu") for n in (8192, 1))
    expected = 2 * 8192**2 / HBM_BYTES_PER_MS + EAGER_GAP_MS
    assert _device_ms(lambda: x @ weight.T) == pytest.approx(expected, rel=0.02)


def test_a_lookup_takes_what_it_picks_not_the_table() -> None:
    table = torch.empty(1 << 15, 1024, dtype=torch.bfloat16, device="npu")
    index = torch.zeros(8, dtype=torch.int64, device="npu")
    assert _device_ms(lambda: table.index_select(0, index)) < 0.01


def test_captured_tasks_follow_each_other_closer() -> None:
    x = torch.empty(64, device="npu")

    def chain() -> None:
        for _ in range(100):
            x.add_(1)

    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        chain()
    eager, captured = _device_ms(chain), _device_ms(graph.replay)
    assert eager == pytest.approx(100 * EAGER_GAP_MS, rel=0.05)
    assert captured == pytest.approx(100 * CAPTURED_GAP_MS + GRAPH_LAUNCH_MS, rel=0.05)


def test_kernels_of_two_streams_share_the_card() -> None:
    weight, side = torch.empty(8192, 8192, dtype=torch.bfloat16, device="npu"), torch.npu.Stream()

    def both() -> None:
        main = torch.npu.current_stream()
        side.wait_stream(main)
        with torch.npu.stream(side):
            weight @ weight
        weight @ weight
        main.wait_stream(side)

    one = 2 * 8192**3 / CUBE_FLOPS_PER_MS
    assert _device_ms(both) == pytest.approx(2 * one, rel=0.02)


def test_the_host_sees_the_device_take_its_time() -> None:
    weight = torch.empty(8192, 8192, dtype=torch.bfloat16, device="npu")
    torch.npu.synchronize()
    begin = time.monotonic()
    for _ in range(10):
        weight @ weight
    launched = time.monotonic() - begin
    torch.npu.synchronize()
    passed = time.monotonic() - begin
    on_device = 10 * 2 * 8192**3 / CUBE_FLOPS_PER_MS * 1e-3
    assert passed >= on_device
    assert launched < passed


def test_small_results_are_zeros_without_arithmetic() -> None:
    logits = torch.ones(4, 1000, device="npu")
    assert logits.argmax(-1).cpu().tolist() == [0, 0, 0, 0]
    assert (logits + 1).cpu().eq(0).all()
    assert torch.ones(3).npu().cpu().eq(1).all()
