"""What a stage is: a pure object that turns messages into messages.

No sockets, clock, environment, threads or global randomness inside; a runner (`runner.py`) gives
it I/O and a lifecycle. Tests, property tests and replay drive the same object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from stages.messages import BeginEpoch, Message


class Stage(Protocol):
    """The core of a stage."""

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Forget every request; messages of older epochs are dropped from here on."""

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Take what has arrived, in order, and say what follows.

        A bad message fails one request, never the stage. `now_ns` is the wall clock.
        """

    def progress(self) -> int:
        """How much the stage has finished since it started: grows while it works."""

    def queue_len(self) -> int:
        """How much waits in the stage."""

    def stats(self) -> dict[str, float]:
        """Figures for `/metrics`, by metric name; counters end in `_total`."""


@runtime_checkable
class TimedStage(Stage, Protocol):
    """A core that has something to say at a time of its own, with no message that causes it."""

    def wakeup_ns(self) -> int | None:
        """When to call `handle`, with what has come until then or with nothing; None: never.

        Asked after every call of `handle`; wall clock.
        """


@runtime_checkable
class CompletingStage(Stage, Protocol):
    """A core whose device finishes work by itself, with no message that causes it."""

    def completion_fd(self) -> int:
        """A descriptor, readable while `handle` has results to say."""
