"""kill -9 of any stage under streams: the clients see a pause, never an error, and every token."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.process.group import Group, serving
from tests.process.streams import run_streams

# How many chunks all streams together have seen when the stage is killed.
CHUNKS_BEFORE_KILL = 100


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with serving(tmp_path_factory.mktemp("g") / "run", "--max-restarts", "100") as group:
        yield group


@pytest.fixture(scope="module")
def undisturbed(group: Group) -> dict[str, list[str]]:
    return {kind: run_streams(group, kind) for kind in ("greedy", "seeded")}


class Countdown:
    """Calls `action` once, when `count` chunks have come."""

    def __init__(self, count: int, action: object) -> None:
        self._count = count
        self._action = action
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._count -= 1
            is_time = self._count == 0
        if is_time:
            assert callable(self._action)
            self._action()


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("stage", ["tokenizer", "scheduler", "executor", "sampler"])
def test_a_killed_stage_costs_no_token(
    group: Group, undisturbed: dict[str, list[str]], stage: str, kind: str
) -> None:
    restarts = group.stage(stage)["incarnation"]
    kill = Countdown(CHUNKS_BEFORE_KILL, lambda: group.kill(stage))
    assert run_streams(group, kind, kill) == undisturbed[kind]
    assert group.stage(stage)["incarnation"] == restarts + 1


def test_all_stages_killed_at_once(group: Group, undisturbed: dict[str, list[str]]) -> None:
    def kill_all() -> None:
        stages = ("tokenizer", "scheduler", "executor", "sampler")
        for pid in [group.pid(stage) for stage in stages]:
            os.kill(pid, signal.SIGKILL)

    texts = run_streams(group, "greedy", Countdown(CHUNKS_BEFORE_KILL, kill_all))
    assert texts == undisturbed["greedy"]


def test_requests_that_come_while_a_stage_is_down_wait_for_it(
    group: Group, undisturbed: dict[str, list[str]]
) -> None:
    group.kill("executor")
    assert run_streams(group, "greedy") == undisturbed["greedy"]


def test_a_killed_gateway_takes_new_requests_again(
    group: Group, undisturbed: dict[str, list[str]]
) -> None:
    """Its connections are lost with it; the group's socket is not, so nobody is refused."""
    group.kill("gateway")
    assert run_streams(group, "greedy") == undisturbed["greedy"]
