"""A counting semaphore between processes, kept by the kernel in an eventfd.

Owns waiting: deadlines and interrupts. Knows nothing of slots and records.
"""

import math
import os
import select
import time

from shm.errors import Interrupted


class Deadline:
    """When a call gives up (`at`, on the monotonic clock) and what may interrupt its waiting."""

    __slots__ = ("at", "interrupt_fd", "seconds")

    def __init__(self, seconds: float, interrupt_fd: int | None = None) -> None:
        self.seconds = seconds
        self.at = time.monotonic() + seconds
        self.interrupt_fd = interrupt_fd

    def remaining_ms(self) -> int:
        """Whole milliseconds left, rounded up so that a wait never ends before the deadline."""
        return max(0, math.ceil((self.at - time.monotonic()) * 1000))


def create_semaphore(value: int) -> int:
    """Return the descriptor of a new semaphore: close-on-exec, non-blocking."""
    return os.eventfd(value, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class Semaphore:
    """One process's use of a semaphore eventfd; the descriptor belongs to the caller.

    Every read and write of an eventfd takes the kernel's lock of its counter. What a process
    stored before `release` is therefore seen by the process whose `acquire` took that unit, on
    weakly ordered processors too.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._interrupt_fd: int | None = None

    def try_acquire(self) -> bool:
        """Take one unit if there is one."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def acquire(self, deadline: Deadline) -> bool:
        """Take one unit; False when the deadline passes first. Raises Interrupted."""
        while not self.try_acquire():
            if not self._wait(deadline):
                return False
        return True

    def release(self, units: int = 1) -> None:
        """Add `units`; wakes whoever waits for them."""
        os.eventfd_write(self.fd, units)

    def drain(self) -> int:
        """Take every unit there is and return their number."""
        units = 0
        while self.try_acquire():
            units += 1
        return units

    def _wait(self, deadline: Deadline) -> bool:
        if deadline.interrupt_fd != self._interrupt_fd:
            self._watch(deadline.interrupt_fd)
        ready = dict(self._poll.poll(deadline.remaining_ms()))
        # A unit that is there wins: an interrupt is for a caller that would go on waiting.
        if ready and self.fd not in ready:
            raise Interrupted
        return bool(ready)

    def _watch(self, interrupt_fd: int | None) -> None:
        if self._interrupt_fd is not None:
            self._poll.unregister(self._interrupt_fd)
        if interrupt_fd is not None:
            self._poll.register(interrupt_fd, select.POLLIN)
        self._interrupt_fd = interrupt_fd
