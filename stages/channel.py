"""ZMQ channels for what happens once a request: PUSH/PULL over ipc, typed msgspec messages.

An inbox is bound by its one reader; any number of outboxes connect to it. Nothing is dropped: a
full channel makes the sender wait, up to a deadline.
"""

from __future__ import annotations

import logging
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from stages.errors import ChannelLate
from stages.messages import Message

HIGH_WATER_MARK = 10_000
SEND_DEADLINE_S = 10.0
MAX_FRAME_BYTES = 64 * 2**20

M = TypeVar("M", bound=Message)
logger = logging.getLogger(__name__)


class Inbox(Generic[M]):
    """The receiving end. A frame that is no message of the channel is counted, logged, dropped."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, union: Any) -> None:
        self.address = address
        self.num_malformed = 0
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._socket = context.socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(address)

    def fileno(self) -> int:
        """A descriptor that becomes readable when messages *may* wait (edge-triggered: drain)."""
        return int(self._socket.get(zmq.FD))

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For `zmq.Poller`, which knows about the edge-triggered descriptor."""
        return self._socket

    def drain(self, limit: int = HIGH_WATER_MARK) -> list[M]:
        """Take what has arrived, in order, up to `limit` messages; never waits."""
        messages: list[M] = []
        while len(messages) < limit:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                messages.append(self._decoder.decode(frame))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.num_malformed += 1
                logger.warning("%s: dropped a malformed frame (%s)", self.address, error)
        return messages

    def close(self) -> None:
        """Close without waiting."""
        self._socket.close(linger=0)


class Outbox:
    """The sending end; not owned by one peer, so a restarted reader is found again by itself."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.address = address
        self._context = context
        self._encoder = msgspec.msgpack.Encoder()
        self._socket = self._connect()

    def send(self, message: Message) -> None:
        """Send, waiting while the channel is full; raises `ChannelLate` after the deadline."""
        try:
            self._socket.send(self._encoder.encode(message))
        except zmq.Again:
            raise ChannelLate(self.address, SEND_DEADLINE_S) from None

    def forget(self) -> None:
        """Drop what the peer has not taken: those messages belong to an epoch that is over.

        One that is on its way already may still arrive; its reader drops it by its epoch.
        """
        self.close()
        self._socket = self._connect()

    def close(self) -> None:
        """Close without waiting."""
        self._socket.close(linger=0)

    def _connect(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.set(zmq.SNDTIMEO, int(SEND_DEADLINE_S * 1000))
        socket.set(zmq.LINGER, 0)
        socket.connect(self.address)
        return socket
