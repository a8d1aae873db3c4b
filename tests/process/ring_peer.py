"""The child of the ring's process tests: `python -m tests.process.ring_peer FD ROLE ARGUMENT...`.

FD is its control socket, on which the end of a ring arrives first. Roles are the functions below;
what they report goes back over the same socket.
"""

import os
import signal
import socket
import sys
import zlib
from collections.abc import Iterator, Sequence

import zmq

from shm import (
    Buffer,
    Interrupted,
    RingDescriptors,
    RingReader,
    RingWriter,
    receive_message,
    send_message,
)
from stages.overflow import ZmqOverflowReceiver

DEADLINE_S = 60.0


def checked(body: bytes) -> bytes:
    """`body` with its crc32 in front."""
    return zlib.crc32(body).to_bytes(4, "little") + body


def check(payload: bytes | memoryview) -> None:
    """Assert that `payload` is what `checked` made."""
    assert int.from_bytes(payload[:4], "little") == zlib.crc32(payload[4:])


def receive_end(control: socket.socket) -> RingDescriptors:
    """The end of a ring from the next message."""
    return RingDescriptors.from_wire(*receive_message(control))


def count_records(control: socket.socket, index: str, num_records: str) -> None:
    """Check `num_records` records and report how many were good."""
    with RingReader(receive_end(control), int(index), epoch=1) as reader:
        for sequence in range(int(num_records)):
            payload = reader.get(DEADLINE_S)
            check(payload)
            assert payload[4:12] == sequence.to_bytes(8, "little")
    send_message(control, num_records.encode())


def report_records(control: socket.socket, index: str, start: str) -> None:
    """Report every sequence number from inside its view, before the slot is released."""
    reader = RingReader(receive_end(control), int(index), epoch=1, start_sequence=int(start))
    while True:
        with reader.view(DEADLINE_S) as view:
            check(view)
            send_message(control, bytes(view[4:12]))


def hold_record(control: socket.socket, index: str, num_records: str) -> None:
    """Take `num_records` records, then hold the next one for ever."""
    reader = RingReader(receive_end(control), int(index), epoch=1)
    for _ in range(int(num_records)):
        reader.get(DEADLINE_S)
    with reader.view(DEADLINE_S):
        send_message(control, b"holding")
        signal.pause()


def stream_records(control: socket.socket, epoch: str) -> None:
    """Put records of many sizes for ever."""
    writer = RingWriter(receive_end(control), int(epoch))
    while True:
        size = writer.sequence * 37 % 3000
        writer.put(checked(writer.sequence.to_bytes(8, "little") + bytes(size)), DEADLINE_S)


class StallingParts(Sequence[Buffer]):
    """Two buffers whose second never comes once the first is in the slot."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.num_passes = 0

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Buffer:  # type: ignore[override]
        return b"never complete"

    def __iter__(self) -> Iterator[Buffer]:
        self.num_passes += 1
        yield self[0]
        if self.num_passes == 2:  # the first pass adds up the sizes, the second one copies
            send_message(self.control, b"in the middle")
            signal.pause()
        yield self[1]


def stall_in_put(control: socket.socket, num_records: str) -> None:
    """Put `num_records` whole records, then stop in the middle of the next."""
    writer = RingWriter(receive_end(control), epoch=1)
    for n in range(int(num_records)):
        writer.put(checked(bytes([n])), DEADLINE_S)
    writer.put(StallingParts(control), DEADLINE_S)


def put_until_interrupted(control: socket.socket) -> None:
    """Fill the ring, report once that a put waits, and how the put was ended."""
    end = receive_end(control)
    with RingWriter(end, epoch=1) as writer:
        for _ in range(writer.geometry.num_slots):
            writer.put(b"", DEADLINE_S)
        send_message(control, b"full")
        try:
            writer.put(b"", DEADLINE_S, control.fileno())
        except Interrupted:
            command, _ = receive_message(control)
            send_message(control, b"interrupted by " + command)


def answer_overflow(control: socket.socket, index: str, address: str, num_records: str) -> None:
    """Report the length and crc32 of every record, some of which overflow."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with (
        context,
        ZmqOverflowReceiver(context, address, "writer") as overflow,
        RingReader(receive_end(control), int(index), 1, overflow) as reader,
    ):
        for _ in range(int(num_records)):
            payload = reader.get(DEADLINE_S)
            send_message(control, f"{len(payload)} {zlib.crc32(payload)}".encode())


def attach_and_leave(control: socket.socket, index: str, num_times: str) -> None:
    """Attach and close `num_times` times; report the number of open descriptors each time."""
    for _ in range(int(num_times)):
        RingReader(receive_end(control), int(index), epoch=1).close()
        send_message(control, str(len(os.listdir("/proc/self/fd"))).encode())


ROLES = {
    role.__name__: role
    for role in (
        answer_overflow,
        attach_and_leave,
        count_records,
        hold_record,
        put_until_interrupted,
        report_records,
        stall_in_put,
        stream_records,
    )
}

if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as control_socket:
        ROLES[sys.argv[2]](control_socket, *sys.argv[3:])
