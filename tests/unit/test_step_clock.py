"""Steps on the device's own axis, with events that are told their time."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from executor_svc.accelerator.step_clock import MAX_DELAY_NS, StepClock

MS = 1_000_000
WALL_NS = 10**18  # the wall's axis begins elsewhere


@dataclass(frozen=True)
class At:
    """An event that came at a moment of the device's clock."""

    ns: int

    def record(self, stream: object = None) -> None:
        raise AssertionError("it has come")

    def elapsed_time(self, end_event: object) -> float:
        assert isinstance(end_event, At)
        return (end_event.ns - self.ns) / 1e6


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20 * MS),  # idle
            st.integers(1, 20 * MS),  # busy
            st.integers(0, MAX_DELAY_NS // 2),  # until the host knows
        ),
        min_size=1,
    )
)
def test_late_news_does_not_blur_the_steps(steps: list[tuple[int, int, int]]) -> None:
    clock, device_ns, first_delay = StepClock(), 0, steps[0][2]
    for idle, busy, delay in steps:
        begun, device_ns = device_ns + idle, device_ns + idle + busy
        # Never sooner than the first one: an end is not set before its cause.
        seen_ns = WALL_NS + device_ns + max(delay, first_delay)
        start_ns, end_ns = clock.interval(At(begun), At(device_ns), seen_ns)
        assert end_ns - start_ns == busy
        assert end_ns == WALL_NS + device_ns + first_delay


def test_an_end_is_never_later_than_the_host_knows() -> None:
    clock = StepClock()
    clock.interval(At(0), At(5 * MS), WALL_NS + 9 * MS)  # told 4 ms late
    assert clock.interval(At(5 * MS), At(6 * MS), WALL_NS + 7 * MS) == (
        WALL_NS + 6 * MS,
        WALL_NS + 7 * MS,
    )


def test_a_clock_that_has_run_off_is_set_anew() -> None:
    clock = StepClock()
    clock.interval(At(0), At(MS), WALL_NS)
    seen_ns = WALL_NS + MAX_DELAY_NS + 3 * MS
    assert clock.interval(At(MS), At(2 * MS), seen_ns) == (seen_ns - MS, seen_ns)
