"""The ring ends of one stage in one epoch: records in and out as messages.

Opened from what `BeginEpoch` brought, closed when the next epoch begins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import zmq

from shm.descriptors import RingDescriptors
from shm.ring import RingReader, RingWriter
from stages.messages import (
    BeginEpoch,
    LogitsRecord,
    Message,
    PlanRecord,
    TokenRecord,
)
from stages.overflow import ZmqOverflowReceiver, ZmqOverflowSender
from stages.topology import LOGITS_RING, PLAN_RING, TOKEN_RING

PUT_DEADLINE_S = 30.0
WRITER = "writer"

RECORDS: dict[str, Any] = {
    PLAN_RING: PlanRecord,
    TOKEN_RING: TokenRecord,
    LOGITS_RING: LogitsRecord,
}
logger = logging.getLogger(__name__)


class MessageReader:
    """The reading end of a ring. A record that is no message is counted, logged, dropped."""

    def __init__(self, reader: RingReader, name: str) -> None:
        self.name = name
        self.num_malformed = 0
        self._reader = reader
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(RECORDS[name])

    def fileno(self) -> int:
        """Readable while a record waits."""
        return self._reader.fileno()

    def get_nowait(self) -> Message | None:
        """The next message, or None when there is none."""
        while (record := self._reader.get_nowait()) is not None:
            try:
                return self._decoder.decode(record)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.num_malformed += 1
                logger.warning("ring %s: dropped a malformed record (%s)", self.name, error)
        return None


class MessageWriter:
    """The writing end of a ring."""

    def __init__(self, writer: RingWriter, interrupt_fd: int) -> None:
        self._writer = writer
        self._interrupt_fd = interrupt_fd
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: Message) -> None:
        """Put one record; waits for the slowest reader.

        Raises `ReaderLate` after the deadline and `Interrupted` when the supervisor speaks: a
        reader that has died makes no room, and the news of it comes down the control socket.
        """
        self._writer.put(self._encoder.encode(message), PUT_DEADLINE_S, self._interrupt_fd)


class RingEnds:
    """All ring ends of a stage in one epoch; owns their descriptors and overflow channels."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        message: BeginEpoch,
        fds: Sequence[int],
        run_dir: str,
        interrupt_fd: int,
    ) -> None:
        self.readers: dict[str, MessageReader] = {}
        self.writers: dict[str, MessageWriter] = {}
        self._zmq = context
        self._run_dir = run_dir
        self._epoch = message.epoch
        self._stack = ExitStack()
        remaining = list(fds)
        for end in message.rings:
            own, remaining = remaining[: end.num_fds], remaining[end.num_fds :]
            descriptors = RingDescriptors.from_wire(end.geometry, own)
            if end.role == WRITER:
                writer = self._stack.enter_context(self._writer(end.name, descriptors))
                self.writers[end.name] = MessageWriter(writer, interrupt_fd)
            else:
                reader = self._stack.enter_context(
                    self._reader(end.name, int(end.role), descriptors)
                )
                self.readers[end.name] = MessageReader(reader, end.name)

    def close(self) -> None:
        """Detach from every ring."""
        self._stack.close()

    def _writer(self, name: str, descriptors: RingDescriptors) -> RingWriter:
        names = descriptors.geometry.reader_names
        addresses = {
            reader: self._overflow_address(name, index) for index, reader in enumerate(names)
        }
        overflow = ZmqOverflowSender(self._zmq, addresses)
        self._stack.callback(overflow.close)
        return RingWriter(descriptors, self._epoch, overflow)

    def _reader(self, name: str, index: int, descriptors: RingDescriptors) -> RingReader:
        address = self._overflow_address(name, index)
        overflow = ZmqOverflowReceiver(self._zmq, address, descriptors.geometry.writer_name)
        self._stack.callback(overflow.close)
        return RingReader(descriptors, index, self._epoch, overflow)

    def _overflow_address(self, ring: str, reader_index: int) -> str:
        # An address an epoch: the socket of the last one may still be closing.
        return f"ipc://{self._run_dir}/{ring}.{reader_index}.{self._epoch}.ov"
