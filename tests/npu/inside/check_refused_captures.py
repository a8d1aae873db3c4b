"""What a real NPU refuses while a stream captures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu  # noqa: F401  registers the device


def _copy_pageable() -> None:
    torch.empty(4, device="npu").copy_(torch.ones(4), non_blocking=True)


def _wait_for_work_outside() -> None:
    torch.npu.current_stream().wait_event(OUTSIDE)


def _query_own_event() -> None:
    event = torch.npu.Event()
    event.record()
    event.synchronize()


OUTSIDE = torch.npu.Event()
OUTSIDE.record()
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "stream synchronize": (
        lambda: torch.npu.current_stream().synchronize(),
        "cannot be synchronized",
    ),
    "device synchronize": (
        lambda: torch.npu.synchronize(),
        "aclrtSynchronizeDevice is not permitted",
    ),
    "item": (lambda: torch.ones(1, device="npu").item(), "captur"),
    "blocking copy": (lambda: torch.ones(4, device="npu").cpu(), "captur"),
    "pageable copy": (_copy_pageable, "pinned host memory"),
    "outside event": (_wait_for_work_outside, "from outside the capture"),
    "own event": (_query_own_event, "recorded in a capture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, reason = REFUSED[name]
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        graph.capture_begin()
        with pytest.raises(RuntimeError, match=reason):
            call()
        with pytest.raises(RuntimeError, match="invalidated"):
            graph.capture_end()
    torch.npu.synchronize()


def test_a_stream_that_forked_must_be_joined() -> None:
    graph, stream, side = torch.npu.NPUGraph(), torch.npu.Stream(), torch.npu.Stream()
    x = torch.ones(4, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        graph.capture_begin()
        side.wait_stream(stream)
        with torch.npu.stream(side):
            x.add_(1)
        with pytest.raises(RuntimeError, match="not joined back"):
            graph.capture_end()


def test_a_task_group_must_be_ended() -> None:
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        graph.capture_begin()
        torch.npu.graph_task_group_begin(stream)
        with pytest.raises(RuntimeError, match="inside a task group"):
            graph.capture_end()


def test_a_capture_needs_a_stream_of_its_own() -> None:
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.npu.NPUGraph().capture_begin()
