"""The two ends of a ring: one writer, many readers, records in shared memory.

No flag and no index lives in that memory. Each reader has two counting semaphores, `free` (slots
it has released) and `filled` (records ready for it): the writer takes one `free` of every reader,
stores the record, adds one `filled` to every reader. A record that its writer did not finish is
thus never seen. A call that raises has taken nothing, on either end, and can be repeated.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from shm.closable import Closable
from shm.descriptors import RingDescriptors, RingGeometry, create_ring
from shm.errors import (
    EpochMismatch,
    OverflowLost,
    PayloadTooLarge,
    ReaderLate,
    RecordCorrupt,
    RingError,
    WriterLate,
)
from shm.record import HEADER_BYTES, OVERFLOW, RecordHeader, read_header, write_header
from shm.semaphore import Deadline, Semaphore

__all__ = [
    "Buffer",
    "Deadline",
    "OverflowReceiver",
    "OverflowSender",
    "RingDescriptors",
    "RingGeometry",
    "RingReader",
    "RingWriter",
    "create_ring",
]

Buffer = bytes | bytearray | memoryview


class OverflowSender(Protocol):
    """The channel beside the ring for payloads that exceed a slot; the writer's half."""

    def send(self, epoch: int, sequence: int, parts: Sequence[Buffer], deadline: Deadline) -> None:
        """Send the joined `parts` to every reader, or, when raising, to none.

        Raises ReaderLate, Interrupted.
        """


class OverflowReceiver(Protocol):
    """The channel beside the ring for payloads that exceed a slot; one reader's half."""

    def receive(self, epoch: int, sequence: int, deadline: Deadline) -> bytes:
        """Return that record's payload; drop what an older epoch or sequence left behind.

        Raises WriterLate, Interrupted, RecordCorrupt.
        """


class RingWriter(Closable):
    """The writing end; owns the descriptors it is given. Used by one thread.

    After `close` every call raises ValueError. A writer is never restarted on its ring: its
    successor gets a new ring and a new epoch, because a writer that dies between two `filled` has
    given its last record to some readers only.
    """

    def __init__(
        self, descriptors: RingDescriptors, epoch: int, overflow: OverflowSender | None = None
    ) -> None:
        """Attach; `epoch` (u64) is the writer's incarnation and goes into every record."""
        self.geometry = descriptors.geometry
        self.sequence = 0
        """Sequence number of the next record."""
        self._descriptors = descriptors
        self._epoch = epoch
        self._overflow = overflow
        self._last_overflow = -1
        self._memory = mmap.mmap(descriptors.memfd, self.geometry.size)
        readers = range(len(self.geometry.reader_names))
        self._free = [Semaphore(descriptors.free[i]) for i in readers]
        self._filled = [Semaphore(descriptors.filled[i]) for i in readers]

    def put(
        self,
        payload: Buffer | Sequence[Buffer],
        deadline_s: float,
        interrupt_fd: int | None = None,
    ) -> int:
        """Publish `payload`, or the buffers of a sequence joined, and return its sequence number.

        Waits up to `deadline_s` seconds for room. Raises ReaderLate; Interrupted when it would
        wait and `interrupt_fd` is readable; PayloadTooLarge without an overflow channel.
        """
        parts = [payload] if isinstance(payload, Buffer) else payload
        length = sum(_num_bytes(part) for part in parts)
        deadline = Deadline(deadline_s, interrupt_fd)
        self._take_room(deadline)
        try:
            self._store(parts, length, deadline)
        except BaseException:  # whatever it was, the slot goes back and the error goes on
            self._give_back(self._free)
            raise
        sequence = self.sequence
        self.sequence += 1
        for filled in self._filled:
            filled.release()
        return sequence

    def reset_reader(self, index: int) -> int:
        """Make reader `index` ready for a successor; returns the successor's start sequence.

        Call it once the predecessor is dead and reaped. The successor gets every record that its
        predecessor had not released: also the one that it was reading when it died, which is then
        delivered twice. Raises OverflowLost when one of these had overflowed; the ring is to be
        replaced then.

        Only the writer can do this: the slots that are out are those that it has filled and has
        not got back, and between two puts it holds none itself.
        """
        free, filled = self._free[index], self._filled[index]
        num_free = free.drain()
        free.release(num_free)
        num_unreleased = self.geometry.num_slots - num_free
        start = self.sequence - num_unreleased
        if self._last_overflow >= start:
            name = self.geometry.reader_names[index]
            raise OverflowLost(f"the overflow of record {self._last_overflow} died with {name!r}")
        filled.drain()
        filled.release(num_unreleased)
        return start

    def close(self) -> None:
        """Unmap the memory and close the descriptors; a second call does nothing."""
        for semaphore in (*self._free, *self._filled):
            semaphore.fd = -1
        self._memory.close()
        self._descriptors.close()

    def _take_room(self, deadline: Deadline) -> None:
        taken: list[Semaphore] = []
        try:
            for name, free in zip(self.geometry.reader_names, self._free, strict=True):
                if not free.acquire(deadline):
                    raise ReaderLate(name, deadline.seconds)
                taken.append(free)
        except RingError:
            self._give_back(taken)
            raise

    def _give_back(self, taken: Sequence[Semaphore]) -> None:
        for free in taken:
            free.release()

    def _store(self, parts: Sequence[Buffer], length: int, deadline: Deadline) -> None:
        start = self.sequence % self.geometry.num_slots * self.geometry.stride
        flags = 0
        if length > self.geometry.slot_bytes:
            self._send_overflow(parts, length, deadline)
            flags = OVERFLOW
        else:
            self._copy_in(parts, start + HEADER_BYTES)
        write_header(self._memory, start, RecordHeader(self.sequence, self._epoch, length, flags))

    def _copy_in(self, parts: Sequence[Buffer], offset: int) -> None:
        for part in parts:
            end = offset + _num_bytes(part)
            self._memory[offset:end] = part
            offset = end

    def _send_overflow(self, parts: Sequence[Buffer], length: int, deadline: Deadline) -> None:
        if self._overflow is None:
            limit = self.geometry.slot_bytes
            raise PayloadTooLarge(f"{length} bytes exceed the {limit} of a slot")
        self._overflow.send(self._epoch, self.sequence, parts, deadline)
        self._last_overflow = self.sequence


class RingReader(Closable):
    """One reading end; owns the descriptors it is given. Used by one thread.

    After `close` every call raises ValueError. An error other than WriterLate and Interrupted
    is final: the record stays in place and every later call meets it again.
    """

    def __init__(
        self,
        descriptors: RingDescriptors,
        index: int,
        epoch: int,
        overflow: OverflowReceiver | None = None,
        *,
        start_sequence: int = 0,
    ) -> None:
        """Attach as reader `index` of the ring that the writer's `epoch` writes.

        `start_sequence` is what `RingWriter.reset_reader` returned for a successor.
        """
        self.geometry = descriptors.geometry
        self.sequence = start_sequence
        """Sequence number of the next record."""
        self._descriptors = descriptors
        self._epoch = epoch
        self._overflow = overflow
        self._filled = Semaphore(descriptors.filled[index])
        self._free = Semaphore(descriptors.free[index])
        self._memory = mmap.mmap(descriptors.memfd, self.geometry.size, access=mmap.ACCESS_READ)
        self._is_viewing = False

    def fileno(self) -> int:
        """A descriptor that is readable as long as a record waits; -1 after `close`."""
        return self._filled.fd

    def get(self, deadline_s: float, interrupt_fd: int | None = None) -> bytes:
        """Take the next payload, waiting up to `deadline_s` seconds.

        Raises WriterLate; Interrupted when it would wait and `interrupt_fd` is readable;
        RecordCorrupt, EpochMismatch.
        """
        deadline = Deadline(deadline_s, interrupt_fd)
        self._take_record(deadline)
        return self._copy_out(deadline)

    def get_nowait(self, overflow_deadline_s: float = 10.0) -> bytes | None:
        """Take the next payload, None when no record waits.

        An overflow payload is under way before its record shows; only for that it waits, up to
        `overflow_deadline_s` seconds. Raises as `get`.
        """
        if not self._filled.try_acquire():
            return None
        return self._copy_out(Deadline(overflow_deadline_s))

    @contextmanager
    def view(self, deadline_s: float, interrupt_fd: int | None = None) -> Iterator[memoryview]:
        """Take the next payload in place: a read-only view whose slot is released on exit.

        What is made from the view is for the block only: later the slot's next record would show
        through. Raises as `get`. A body that raises has taken the record.
        """
        deadline = Deadline(deadline_s, interrupt_fd)
        self._take_record(deadline)
        try:
            payload = memoryview(self._open(deadline))
        except BaseException:
            self._filled.release()
            raise
        self._is_viewing = True
        try:
            yield payload
        finally:
            self._is_viewing = False
            self._release()

    def close(self) -> None:
        """Unmap the memory and close the descriptors; a second call does nothing."""
        self._filled.fd = self._free.fd = -1
        with suppress(BufferError):  # a view is still referred to; the mapping goes with it
            self._memory.close()
        self._descriptors.close()

    def _take_record(self, deadline: Deadline) -> None:
        if not self._filled.acquire(deadline):
            raise WriterLate(self.geometry.writer_name, deadline.seconds)

    def _copy_out(self, deadline: Deadline) -> bytes:
        try:
            payload = bytes(self._open(deadline))
        except BaseException:  # whatever it was, the record stays and the error goes on
            self._filled.release()
            raise
        self._release()
        return payload

    def _open(self, deadline: Deadline) -> bytes | memoryview:
        assert not self._is_viewing, "this reader's record is in use by a view"
        start = self.sequence % self.geometry.num_slots * self.geometry.stride
        header = read_header(self._memory, start)
        self._check(header)
        if header.flags & OVERFLOW:
            return self._receive_overflow(header.length, deadline)
        start += HEADER_BYTES
        return memoryview(self._memory)[start : start + header.length]

    def _check(self, header: RecordHeader) -> None:
        if header.epoch != self._epoch:
            raise EpochMismatch(self._epoch, header.epoch)
        if header.sequence != self.sequence:
            raise RecordCorrupt(f"found record {header.sequence} instead of {self.sequence}")
        if not header.flags & OVERFLOW and header.length > self.geometry.slot_bytes:
            raise RecordCorrupt(f"record {self.sequence} claims {header.length} bytes")

    def _receive_overflow(self, length: int, deadline: Deadline) -> bytes:
        if self._overflow is None:
            raise RecordCorrupt(
                f"record {self.sequence} overflowed, this end has no channel for it"
            )
        payload = self._overflow.receive(self._epoch, self.sequence, deadline)
        if len(payload) != length:
            raise RecordCorrupt(f"{len(payload)} bytes came for {length} of record {self.sequence}")
        return payload

    def _release(self) -> None:
        self.sequence += 1
        self._free.release()


def _num_bytes(part: Buffer) -> int:
    return part.nbytes if isinstance(part, memoryview) else len(part)
