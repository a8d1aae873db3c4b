"""Everything that can go wrong with a ring or a handover, by name.

RingError
├── ReaderLate, WriterLate      a peer missed the deadline (also TimeoutError)
├── Interrupted                 the caller's own descriptor wants attention
├── RecordCorrupt, EpochMismatch, PayloadTooLarge, OverflowLost
HandoverError
├── PeerClosed                  end of file
└── MessageTruncated
"""


class RingError(Exception):
    """Base of every error of a ring."""


class ReaderLate(RingError, TimeoutError):
    """A reader did not release a slot in time. `reader_name`, `seconds` say which and how long."""

    def __init__(self, reader_name: str, seconds: float) -> None:
        super().__init__(f"reader {reader_name!r} made no room within {seconds:g} s")
        self.reader_name = reader_name
        self.seconds = seconds


class WriterLate(RingError, TimeoutError):
    """The writer published nothing in time. `writer_name`, `seconds` say which and how long."""

    def __init__(self, writer_name: str, seconds: float) -> None:
        super().__init__(f"writer {writer_name!r} published nothing within {seconds:g} s")
        self.writer_name = writer_name
        self.seconds = seconds


class Interrupted(RingError):
    """The interrupt descriptor became readable (or its peer hung up) while a call waited."""


class RecordCorrupt(RingError):
    """A record fails its checksum, its bounds or its place in the sequence."""


class EpochMismatch(RingError):
    """A record was written by another epoch than the one this end was attached for."""

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(f"this end is attached for epoch {expected}, the record is of {found}")
        self.expected = expected
        self.found = found


class PayloadTooLarge(RingError, ValueError):
    """A payload exceeds the slot and the ring has no overflow channel."""


class OverflowLost(RingError):
    """A restarted reader would need an overflow payload that died with its predecessor."""


class HandoverError(Exception):
    """Base of every error of a handover."""


class PeerClosed(HandoverError, EOFError):
    """The other end of the socket is gone."""


class MessageTruncated(HandoverError):
    """A message or its descriptors did not fit; the descriptors that came were closed."""
