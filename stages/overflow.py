"""The channel beside a ring, over ZMQ, for payloads that exceed a slot.

One PUSH/PULL pair over `ipc://` for each reader, bounded, in order, never dropping. A message is
[epoch u64 and sequence u64, little-endian][payload in one or more frames]. Implements the two
overflow protocols of `shm.ring`; the ring says when to use it.
"""

import struct
from collections.abc import Mapping, Sequence

import zmq

from shm import Buffer, Deadline, Interrupted, ReaderLate, RecordCorrupt, WriterLate
from shm.closable import Closable

DEFAULT_HIGH_WATER_MARK = 2  # payloads, on each side of a channel
DEFAULT_LINGER_S = 5.0
_TAG = struct.Struct("<QQ")


class ZmqOverflowSender(Closable):
    """The writer's half: one PUSH socket for each reader; connects, so a reader may come later.

    Belongs to one epoch: what a dead reader left unread would fill the sockets of the next.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        addresses: Mapping[str, str],
        high_water_mark: int = DEFAULT_HIGH_WATER_MARK,
        linger_s: float = DEFAULT_LINGER_S,
    ) -> None:
        """`addresses` maps each reader's name to the address that it binds.

        What was sent before `close` has `linger_s` seconds to leave while the context ends.
        """
        self._sockets = {name: context.socket(zmq.PUSH) for name in addresses}
        for name, address in addresses.items():
            self._sockets[name].set(zmq.SNDHWM, high_water_mark)
            self._sockets[name].set(zmq.LINGER, round(linger_s * 1000))
            self._sockets[name].connect(address)

    def send(self, epoch: int, sequence: int, parts: Sequence[Buffer], deadline: Deadline) -> None:
        """Send to every reader, or, when raising ReaderLate or Interrupted, to none."""
        # A connected PUSH socket that can take a message stays so until this thread sends one.
        for name, socket in self._sockets.items():
            if not _wait(socket, zmq.POLLOUT, deadline):
                raise ReaderLate(name, deadline.seconds)
        for socket in self._sockets.values():
            socket.send_multipart([_TAG.pack(epoch, sequence), *parts], zmq.NOBLOCK)

    def close(self) -> None:
        """Close every socket; a second call does nothing."""
        for socket in self._sockets.values():
            socket.close()


class ZmqOverflowReceiver(Closable):
    """One reader's half: a PULL socket bound to the reader's address."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        writer_name: str,
        high_water_mark: int = DEFAULT_HIGH_WATER_MARK,
    ) -> None:
        """`writer_name` appears in WriterLate."""
        self._socket = context.socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, high_water_mark)
        self._socket.bind(address)
        self._writer_name = writer_name

    def receive(self, epoch: int, sequence: int, deadline: Deadline) -> bytes:
        """Return the payload of that record; drop those of a dead epoch or an older record.

        Raises WriterLate, Interrupted; RecordCorrupt when a later record's payload comes first.
        """
        while True:
            if not _wait(self._socket, zmq.POLLIN, deadline):
                raise WriterLate(self._writer_name, deadline.seconds)
            tag, *payload = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            found = _TAG.unpack(tag.buffer)
            if found == (epoch, sequence):
                return b"".join(frame.buffer for frame in payload)
            if found > (epoch, sequence):
                raise RecordCorrupt(f"the overflow of record {sequence} never came")

    def close(self) -> None:
        """Close at once."""
        self._socket.close(linger=0)


def _wait(socket: zmq.Socket[bytes], event: int, deadline: Deadline) -> bool:
    """Wait until `socket` is ready for `event`; False when the deadline passes first."""
    poller = zmq.Poller()
    poller.register(socket, event)
    if deadline.interrupt_fd is not None:
        poller.register(deadline.interrupt_fd, zmq.POLLIN)
    ready = dict(poller.poll(deadline.remaining_ms()))
    if ready and socket not in ready:
        raise Interrupted
    return bool(ready)
