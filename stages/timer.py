"""A timer that is a descriptor, so that a poller waits for a moment to the microsecond.

The timeouts of poll() are whole milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = os.O_CLOEXEC
_NS = 1_000_000_000
# struct itimerspec: interval (s, ns), value (s, ns). A value of zero disarms.
_ITIMERSPEC = struct.Struct("@4l")


class Timer:
    """A Linux timerfd; readable from the moment it was set to."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self._at_ns: int | None = None

    def fileno(self) -> int:
        """For a poller."""
        return self._fd

    def set(self, at_ns: int | None) -> None:
        """Fire at that wall clock time, at once if it has passed; None: not at all."""
        if at_ns == self._at_ns:
            return
        self._at_ns = at_ns
        delay_ns = 0 if at_ns is None else max(1, at_ns - time.time_ns())
        value = _ITIMERSPEC.pack(0, 0, delay_ns // _NS, delay_ns % _NS)
        if self._libc.timerfd_settime(self._fd, 0, value, None) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
