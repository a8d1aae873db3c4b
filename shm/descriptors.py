"""The descriptors of a ring: made by the supervisor, handed to each end, closed by their owner.

Knows geometry and descriptors; must not touch a record.
"""

import fcntl
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

from shm.closable import Closable
from shm.errors import HandoverError
from shm.record import HEADER_BYTES
from shm.semaphore import create_semaphore

DEFAULT_SLOT_BYTES = 10 * 2**20
DEFAULT_NUM_SLOTS = 8
# With both ends of the memfd sealed nobody can shrink it, which would be SIGBUS for the others.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class RingGeometry:
    """Names and sizes of a ring. `slot_bytes` is the largest payload that a slot holds."""

    name: str
    writer_name: str
    reader_names: tuple[str, ...]
    slot_bytes: int
    num_slots: int

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.slot_bytes < 1 or not self.reader_names:
            raise ValueError(f"a ring needs a slot, a byte and a reader: {self}")

    @property
    def stride(self) -> int:
        """Bytes from slot to slot, whole pages: a small record touches the first page only."""
        return -(-(HEADER_BYTES + self.slot_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def size(self) -> int:
        """Bytes of the memfd. Pages are committed when first touched."""
        return self.stride * self.num_slots


class RingDescriptors(Closable):
    """The memfd and the semaphores of a ring, or of one end of it.

    Owns its descriptors: `for_writer` and `for_reader` return duplicates that are closed on their
    own. `filled` and `free` map a reader's index to its eventfds; a reader's end has only its own.
    """

    def __init__(
        self, geometry: RingGeometry, memfd: int, filled: Mapping[int, int], free: Mapping[int, int]
    ) -> None:
        self.geometry = geometry
        self.memfd = memfd
        self.filled = dict(filled)
        self.free = dict(free)

    def for_writer(self) -> "RingDescriptors":
        """Duplicates of everything that the writer needs."""
        return self._duplicate(self.filled)

    def for_reader(self, index: int) -> "RingDescriptors":
        """Duplicates of what reader `index` needs and nothing else."""
        return self._duplicate([index])

    def to_wire(self) -> tuple[bytes, list[int]]:
        """The (payload, descriptors) of a handover message; the descriptors stay owned here."""
        readers = list(self.filled)
        payload = json.dumps(asdict(self.geometry) | {"readers": readers}).encode()
        return payload, [self.memfd, *self.filled.values(), *(self.free[i] for i in readers)]

    @classmethod
    def from_wire(cls, payload: bytes, fds: Sequence[int]) -> Self:
        """Take ownership of received descriptors.

        Raises HandoverError when they do not fit the payload; they are closed then.
        """
        try:
            return cls._parse(payload, fds)
        except (ValueError, KeyError, TypeError) as error:
            for fd in fds:
                os.close(fd)
            raise HandoverError(f"not the descriptors of a ring: {error}") from error

    @classmethod
    def _parse(cls, payload: bytes, fds: Sequence[int]) -> Self:
        wire = json.loads(payload)
        geometry = RingGeometry(
            str(wire["name"]),
            str(wire["writer_name"]),
            tuple(str(name) for name in wire["reader_names"]),
            int(wire["slot_bytes"]),
            int(wire["num_slots"]),
        )
        readers = [int(index) for index in wire["readers"]]
        if len(fds) != 1 + 2 * len(readers):
            raise ValueError(f"{len(fds)} descriptors for {len(readers)} readers")
        memfd, filled, free = fds[0], fds[1 : 1 + len(readers)], fds[1 + len(readers) :]
        if os.fstat(memfd).st_size != geometry.size:
            raise ValueError(f"the memory is not {geometry.size} bytes")
        return cls(
            geometry,
            memfd,
            dict(zip(readers, filled, strict=True)),
            dict(zip(readers, free, strict=True)),
        )

    def close(self) -> None:
        """Close every descriptor; a second call does nothing."""
        fds = [] if self.memfd < 0 else [self.memfd, *self.filled.values(), *self.free.values()]
        self.memfd = -1
        self.filled.clear()
        self.free.clear()
        for fd in fds:
            os.close(fd)

    def _duplicate(self, readers: Sequence[int] | Mapping[int, int]) -> "RingDescriptors":
        return RingDescriptors(
            self.geometry,
            os.dup(self.memfd),
            {i: os.dup(self.filled[i]) for i in readers},
            {i: os.dup(self.free[i]) for i in readers},
        )


def create_ring(
    name: str,
    reader_names: Sequence[str],
    slot_bytes: int = DEFAULT_SLOT_BYTES,
    num_slots: int = DEFAULT_NUM_SLOTS,
    *,
    writer_name: str = "writer",
) -> RingDescriptors:
    """Create an empty ring: one writer, a reader for each name, `num_slots` records in flight.

    The names appear in errors. The memory has no name in any file system: it is gone with the
    last process that holds it.
    """
    geometry = RingGeometry(name, writer_name, tuple(reader_names), slot_bytes, num_slots)
    memfd = os.memfd_create(f"headrace-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, geometry.size)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
    readers = range(len(geometry.reader_names))
    filled = {i: create_semaphore(0) for i in readers}
    free = {i: create_semaphore(num_slots) for i in readers}
    return RingDescriptors(geometry, memfd, filled, free)
