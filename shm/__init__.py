"""Shared-memory ring and descriptor handover: bytes between the processes of one host.

Imports the standard library only; knows bytes, never messages.
"""

from shm.descriptors import (
    DEFAULT_NUM_SLOTS,
    DEFAULT_SLOT_BYTES,
    RingDescriptors,
    RingGeometry,
    create_ring,
)
from shm.errors import (
    EpochMismatch,
    HandoverError,
    Interrupted,
    MessageTruncated,
    OverflowLost,
    PayloadTooLarge,
    PeerClosed,
    ReaderLate,
    RecordCorrupt,
    RingError,
    WriterLate,
)
from shm.handover import create_socket_pair, receive_message, send_message
from shm.ring import Buffer, OverflowReceiver, OverflowSender, RingReader, RingWriter
from shm.semaphore import Deadline

__all__ = [
    "DEFAULT_NUM_SLOTS",
    "DEFAULT_SLOT_BYTES",
    "Buffer",
    "Deadline",
    "EpochMismatch",
    "HandoverError",
    "Interrupted",
    "MessageTruncated",
    "OverflowLost",
    "OverflowReceiver",
    "OverflowSender",
    "PayloadTooLarge",
    "PeerClosed",
    "ReaderLate",
    "RecordCorrupt",
    "RingDescriptors",
    "RingError",
    "RingGeometry",
    "RingReader",
    "RingWriter",
    "WriterLate",
    "create_ring",
    "create_socket_pair",
    "receive_message",
    "send_message",
]
