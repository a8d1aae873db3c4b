"""When the device began and ended each step, by its own clock, on the wall's axis.

What the host sees comes late: a copy, a thread's wake and the interpreter's lock lie between.
"""

from __future__ import annotations

from typing import Protocol

# The host learns of an end within this time; what lies further off is another run of the clock.
MAX_DELAY_NS = 50_000_000


class TimingEvent(Protocol):
    """A device's event that notes the time."""

    def record(self, stream: object = None) -> object: ...

    def elapsed_time(self, end_event: object) -> float:
        """Milliseconds from this event to `end_event`; both have come."""
        ...


class StepClock:
    """Lays steps one behind the other; the first one's end is where the host saw it.

    An end that would lie behind the host's knowledge of it, or long before, is set anew.
    """

    def __init__(self) -> None:
        self._last: TimingEvent | None = None
        self._last_end_ns = 0

    def interval(self, start: TimingEvent, end: TimingEvent, seen_ns: int) -> tuple[int, int]:
        """Begin and end in ns of the wall clock; the host saw the end at `seen_ns`."""
        end_ns = seen_ns
        if self._last is not None:
            by_device_ns = self._last_end_ns + _ns_between(self._last, end)
            if 0 <= seen_ns - by_device_ns <= MAX_DELAY_NS:
                end_ns = by_device_ns
        self._last, self._last_end_ns = end, end_ns
        return end_ns - _ns_between(start, end), end_ns


def _ns_between(start: TimingEvent, end: TimingEvent) -> int:
    return round(start.elapsed_time(end) * 1e6)
