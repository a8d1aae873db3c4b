"""The flight recorder of a process: what it did when, for the last seconds; always on.

A memory file of fixed size takes one record an event. It is read from outside, through the
process's descriptors, so a stage that hangs can be looked at and one that works is not disturbed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shm.closable import Closable
from stages.errors import HeadraceError
from stages.messages import ExecuteStep, Message, StepLogits, StepTokens

NAME = "headrace-trace"
# Five seconds of a pipeline at full speed, minutes of a common one; 1.3 MB.
CAPACITY = 32 * 1024

EVENT_DTYPE = np.dtype(
    [("what", "<i8"), ("step_id", "<i8"), ("size", "<i8"), ("start_ns", "<i8"), ("end_ns", "<i8")]
)
Events = NDArray[np.void]

_RECORD = struct.Struct("<5q")
_COUNT = struct.Struct("<q")


class What(IntEnum):
    """What an event is about.

    TURN: a stage took messages, thought and answered; `size`: messages in and out. DEVICE: the
    device computed a step; `size`: its tokens. LAUNCH: an executor enqueued a step on a device that
    runs beside it; `size`: its tokens.
    """

    TURN = 1
    DEVICE = 2
    LAUNCH = 3


class Trace(Closable):
    """The newest `CAPACITY` events of this process. One thread writes; anyone may read.

    Layout: int64 number of events ever recorded, then `CAPACITY` records in a ring. The count is
    written last, so a reader that drops the oldest slot sees no half-written event.
    """

    def __init__(self) -> None:
        size = _COUNT.size + CAPACITY * _RECORD.size
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        # The mapping keeps a descriptor of its own, by which others find it.
        self._memory = mmap.mmap(fd, size)
        os.close(fd)
        self._count = 0

    def record(self, what: What, step_id: int, size: int, start_ns: int, end_ns: int) -> None:
        """Note one event; times are wall clock."""
        offset = _COUNT.size + self._count % CAPACITY * _RECORD.size
        _RECORD.pack_into(self._memory, offset, what, step_id, size, start_ns, end_ns)
        self._count += 1
        _COUNT.pack_into(self._memory, 0, self._count)

    def events(self) -> Events:
        """The recorded events, oldest first: structured array of `EVENT_DTYPE`."""
        return _parse(bytes(self._memory))

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


def read_trace(pid: int) -> Events:
    """The events of another process of this user, oldest first.

    Raises `HeadraceError` if the process has gone or records none.
    """
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link).startswith(f"/memfd:{NAME}"):
                return _parse(link.read_bytes())
    except OSError as error:
        raise HeadraceError(f"cannot read the trace of process {pid}: {error}") from None
    raise HeadraceError(f"process {pid} records no trace: it is no stage of headrace")


def step_of(messages: Iterable[Message]) -> int:
    """The step that messages are about: that of the first that has one, else 0."""
    for message in messages:
        if isinstance(message, ExecuteStep | StepTokens | StepLogits):
            return message.step_id
    return 0


def _parse(data: bytes) -> Events:
    (count,) = _COUNT.unpack_from(data)
    events = np.frombuffer(data, EVENT_DTYPE, offset=_COUNT.size)
    if count < CAPACITY:
        return events[:count]
    # The slot behind the newest event may be being overwritten.
    return np.roll(events, -(count % CAPACITY))[1:]
