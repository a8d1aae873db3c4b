"""The flight recorder: what it keeps, and that it can be read from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest

from stages.errors import HeadraceError
from stages.messages import BeginEpoch, EndRequests, ExecuteStep, Message, StepTokens
from stages.trace import CAPACITY, Trace, What, read_trace, step_of
from stages.traced import TracedDevice


@pytest.fixture
def trace() -> Iterator[Trace]:
    trace = Trace()
    yield trace
    trace.close()


def test_events_come_back_as_recorded(trace: Trace) -> None:
    trace.record(What.TURN, 7, 3, 100, 200)
    trace.record(What.DEVICE, 8, 64, 200, 10_000_000_300)
    assert trace.events().tolist() == [(1, 7, 3, 100, 200), (2, 8, 64, 200, 10_000_000_300)]


def test_the_newest_events_are_kept_in_order(trace: Trace) -> None:
    for step_id in range(CAPACITY + 10):
        trace.record(What.TURN, step_id, 0, step_id, step_id + 1)
    kept = trace.events()["step_id"]
    # One slot is given up: it may be written to while another process reads.
    assert kept.tolist() == list(range(11, CAPACITY + 10))


def test_another_process_is_read_while_it_waits() -> None:
    code = (
        "from stages.trace import Trace, What; trace = Trace();"
        "trace.record(What.TURN, 5, 1, 2, 3); print('ready', flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        assert read_trace(process.pid).tolist() == [(1, 5, 1, 2, 3)]
        process.stdin.close()


def test_a_process_without_a_trace_is_an_error() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        with pytest.raises(HeadraceError, match="no stage of headrace"):
            read_trace(process.pid)
        process.stdin.close()


def test_a_process_that_has_gone_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(HeadraceError, match="cannot read"):
        read_trace(process.pid)


def test_an_event_costs_little(trace: Trace) -> None:
    """1000 events a second are far below one percent of a core."""
    started = time.process_time()
    for step_id in range(20_000):
        trace.record(What.TURN, step_id, 1, 2, 3)
    assert (time.process_time() - started) / 20_000 < 10e-6


@pytest.mark.parametrize(
    ("messages", "step_id"),
    [
        ([], 0),
        ([EndRequests(b"", b"")], 0),
        ([EndRequests(b"", b""), ExecuteStep(4), StepTokens(3, b"", b"")], 4),
    ],
)
def test_step_of_the_first_message_that_has_one(messages: list[Message], step_id: int) -> None:
    assert step_of(messages) == step_id


class Echo:
    """A core that answers each call with what it was told to."""

    def __init__(self, *answers: Message) -> None:
        self._answers = list(answers)

    def begin_epoch(self, message: BeginEpoch) -> None:
        raise AssertionError

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        return self._answers

    def progress(self) -> int:
        return 7

    def queue_len(self) -> int:
        return 8

    def stats(self) -> dict[str, float]:
        return {"a": 9}


def test_a_device_inside_the_process_is_traced_by_its_results(trace: Trace) -> None:
    results = (StepTokens(5, bytes(12), bytes(12)), StepTokens(6, bytes(8), bytes(8)))
    stage = TracedDevice(Echo(*results), trace)
    assert stage.handle([ExecuteStep(5)], 0) == list(results)
    assert (stage.progress(), stage.queue_len(), stage.stats()) == (7, 8, {"a": 9})
    first, second = trace.events()
    assert (first["what"], first["step_id"], first["size"]) == (What.DEVICE, 5, 3)
    assert (second["step_id"], second["size"]) == (6, 2)
    assert first["start_ns"] <= first["end_ns"] == second["start_ns"]  # time counts once


def test_a_call_without_a_result_is_no_step(trace: Trace) -> None:
    TracedDevice(Echo(), trace).handle([], 0)
    assert len(trace.events()) == 0
