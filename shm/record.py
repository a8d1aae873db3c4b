"""The header in front of every record of a ring.

    bytes  0..8   sequence   place of the record since the ring was made, from 0
           8..16  epoch      incarnation of the writer
          16..24  length     bytes of the payload
          24..28  flags      OVERFLOW: the payload travels beside the ring
          28..32  checksum   crc32 of the 28 bytes before
          32..64  unused     so that a payload starts on a cache line

Little-endian. The payload has no checksum of its own: a copy over memory has no line to guard.
"""

import struct
import zlib
from mmap import mmap
from typing import NamedTuple

from shm.errors import RecordCorrupt

HEADER_BYTES = 64
OVERFLOW = 1
_FIELDS = struct.Struct("<QQQI")
_CHECKSUM = struct.Struct("<I")
_END = _FIELDS.size + _CHECKSUM.size


class RecordHeader(NamedTuple):
    """One header; see the module for its layout."""

    sequence: int
    epoch: int
    length: int
    flags: int


def write_header(memory: mmap, offset: int, header: RecordHeader) -> None:
    """Store `header` and its checksum at `offset`."""
    fields = _FIELDS.pack(*header)
    memory[offset : offset + _END] = fields + _CHECKSUM.pack(zlib.crc32(fields))


def read_header(memory: mmap, offset: int) -> RecordHeader:
    """Load the header at `offset`. Raises RecordCorrupt when the checksum differs."""
    stored = memory[offset : offset + _END]
    fields = stored[: _FIELDS.size]
    if _CHECKSUM.unpack_from(stored, _FIELDS.size)[0] != zlib.crc32(fields):
        raise RecordCorrupt(f"the header at byte {offset} fails its checksum")
    return RecordHeader._make(_FIELDS.unpack(fields))
