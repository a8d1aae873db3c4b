"""Says when steps are done without anybody polling: one thread waits, a descriptor wakes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Protocol


class Waitable(Protocol):
    """A device's event."""

    def synchronize(self) -> object:
        """Wait for it, with the interpreter free."""
        ...


class DeviceFault(Exception):
    """The device failed while it computed a step; its memory cannot be trusted any more."""


class Completions:
    """Waits for events in the order in which they were given.

    The thread touches nothing but the events: whoever reads `fileno` does the work.
    """

    def __init__(self, enter_thread: Callable[[], None]) -> None:
        """`enter_thread` runs first on the waiting thread."""
        self._enter_thread = enter_thread
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watched: SimpleQueue[Waitable | None] = SimpleQueue()
        self._done: deque[int | Exception] = deque()
        self._num_pending = 0
        self._thread = Thread(target=self._run, name="completions", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable while `take` has something to give."""
        return self._fd

    @property
    def num_pending(self) -> int:
        """Events that `take` has not told yet."""
        return self._num_pending

    def watch(self, event: Waitable) -> None:
        """Wait for one more."""
        self._num_pending += 1
        self._watched.put(event)

    def take(self) -> list[int]:
        """When each event since the last call came, in ns of the wall clock.

        Raises:
            DeviceFault: the device has failed.
        """
        try:
            count = os.eventfd_read(self._fd)
        except BlockingIOError:
            return []
        self._num_pending -= count
        return [_checked(self._done.popleft()) for _ in range(count)]

    def drain(self) -> None:
        """Wait for all of them, and tell none.

        Raises:
            DeviceFault: the device has failed.
        """
        os.set_blocking(self._fd, True)
        while self._num_pending:
            self.take()
        os.set_blocking(self._fd, False)

    def close(self) -> None:
        """Let the thread end behind the events that it waits for."""
        self._watched.put(None)
        self._thread.join()
        os.close(self._fd)

    def _run(self) -> None:
        self._enter_thread()
        while (event := self._watched.get()) is not None:
            self._done.append(_wait(event))
            os.eventfd_write(self._fd, 1)


def _wait(event: Waitable) -> int | Exception:
    try:
        event.synchronize()
    except RuntimeError as error:  # torch's type for what a device reports
        return error
    return time.time_ns()


def _checked(result: int | Exception) -> int:
    if isinstance(result, Exception):
        raise DeviceFault(f"the device failed: {result}") from result
    return result
