"""The control socket between the supervisor and one stage: typed messages, descriptors ride along.

A Unix socketpair that is inherited at spawn: its end of file tells each side that the other has
died, whatever the reason.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from shm.handover import receive_message, send_message
from stages.messages import Message

M = TypeVar("M", bound=Message)


class ControlSocket(Generic[M]):
    """One end; `union` is what the other end may say."""

    def __init__(self, sock: socket.socket, union: Any) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)

    def fileno(self) -> int:
        """Readable when a message waits, or the other side has died."""
        return self._sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message with duplicates of `fds`; OSError when the other side is gone."""
        send_message(self._sock, msgspec.msgpack.encode(message), fds)

    def receive(self) -> tuple[M, list[int]]:
        """Wait for one message; the descriptors now belong to the caller.

        Raises `shm.handover.PeerClosed` when the other side is gone.
        """
        payload, fds = receive_message(self._sock)
        return self._decoder.decode(payload), fds

    def set_blocking(self, is_blocking: bool) -> None:
        """A non-blocking end raises BlockingIOError instead of waiting."""
        self._sock.setblocking(is_blocking)

    def close(self) -> None:
        """Close this end."""
        self._sock.close()
