"""Bugs of a host that a fast device hides: with a delay a task, each one shows.

EMULATED_CANN_DELAY_US=300 and EMULATED_CANN_ALLOW_FLOAT32=1.
"""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401  registers the device
from torch import Tensor

from tests.npu.inside.paged import PagedCall


def _busy(x: Tensor, num_tasks: int = 20) -> Tensor:
    for _ in range(num_tasks):
        x = x * 1.0
    return x


def test_a_result_read_before_its_event_is_not_there_yet() -> None:
    source, host = torch.ones(64, device="npu"), torch.zeros(64, pin_memory=True)
    torch.npu.synchronize()
    done = torch.npu.Event()
    host.copy_(_busy(source), non_blocking=True)
    done.record()
    early, was_complete = host.clone(), done.query()
    done.synchronize()
    assert not was_complete
    assert early.eq(0).all()
    assert host.eq(1).all()


def test_a_staging_buffer_written_too_early_is_uploaded_wrong() -> None:
    host, target = torch.ones(64, pin_memory=True), torch.empty(64, device="npu")
    _busy(target)
    target.copy_(host, non_blocking=True)
    host.fill_(7)
    torch.npu.synchronize()
    assert target.cpu().eq(7).all()


def test_a_missing_wait_between_streams_shows() -> None:
    x, side = torch.zeros(4, device="npu"), torch.npu.Stream()
    torch.npu.synchronize()
    _busy(x)
    x.add_(1)
    with torch.npu.stream(side):
        unordered = x * 10
        side.wait_stream(torch.npu.default_stream())
        ordered = x * 10
    torch.npu.synchronize()
    assert unordered.cpu().eq(0).all()
    assert ordered.cpu().eq(10).all()


def test_a_pageable_upload_makes_the_host_wait() -> None:
    target, done = torch.empty(64, device="npu"), torch.npu.Event()
    _busy(target)
    done.record()
    target.copy_(torch.ones(64), non_blocking=True)
    assert done.query()


def test_the_host_runs_ahead_of_the_device() -> None:
    x, done = torch.ones(4, device="npu"), torch.npu.Event()
    _busy(x, 30)
    done.record()
    assert not done.query()
    torch.npu.synchronize()
    assert done.query()


def test_attention_takes_float32_where_it_is_allowed() -> None:
    call = PagedCall([3, 1], [140, 9], dtype=torch.float32)
    torch.testing.assert_close(call.run().cpu(), call.expected()[0], rtol=1e-4, atol=1e-5)
