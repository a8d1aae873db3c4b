"""The timer descriptor: readable from the moment it was set to, not before, not when disarmed."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator

import pytest

from stages.timer import Timer

MS = 1_000_000


@pytest.fixture
def timer() -> Iterator[Timer]:
    timer = Timer()
    yield timer
    timer.close()


def is_readable(timer: Timer, within_s: float = 0.0) -> bool:
    return bool(select.select([timer.fileno()], [], [], within_s)[0])


def test_it_fires_at_its_moment(timer: Timer) -> None:
    at_ns = time.time_ns() + 20 * MS
    timer.set(at_ns)
    assert not is_readable(timer)
    assert is_readable(timer, within_s=5)
    assert time.time_ns() >= at_ns


def test_a_moment_that_has_passed_fires_at_once(timer: Timer) -> None:
    timer.set(time.time_ns() - MS)
    assert is_readable(timer, within_s=5)


def test_it_is_set_again_and_off(timer: Timer) -> None:
    timer.set(time.time_ns())
    assert is_readable(timer, within_s=5)
    timer.set(time.time_ns() + 3600 * 1000 * MS)
    assert not is_readable(timer)
    timer.set(time.time_ns())
    timer.set(None)
    assert not is_readable(timer, within_s=0.05)
