"""Messages with file descriptors over AF_UNIX SOCK_SEQPACKET sockets.

Knows bytes and descriptors, not what they mean. A non-blocking socket raises BlockingIOError.
"""

import array
import os
import socket
from collections.abc import Sequence

from shm.errors import MessageTruncated, PeerClosed

MAX_MESSAGE_BYTES = 64 * 1024
MAX_MESSAGE_FDS = 253  # SCM_MAX_FD of the kernel
_FD_BYTES = array.array("i").itemsize


def create_socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that keep the bounds of messages; close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_message(sock: socket.socket, payload: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message; the receiver gets duplicates of `fds`, the sender keeps its own.

    Raises PeerClosed when the other end is gone.
    """
    # An empty packet reads like the end of the stream.
    if not 0 < len(payload) <= MAX_MESSAGE_BYTES:
        raise ValueError(f"a message has 1 to {MAX_MESSAGE_BYTES} bytes, not {len(payload)}")
    if len(fds) > MAX_MESSAGE_FDS:
        raise ValueError(f"a message carries up to {MAX_MESSAGE_FDS} descriptors, not {len(fds)}")
    try:
        socket.send_fds(sock, [payload], fds)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise PeerClosed("the peer is gone") from error


def receive_message(
    sock: socket.socket, max_bytes: int = MAX_MESSAGE_BYTES, max_fds: int = MAX_MESSAGE_FDS
) -> tuple[bytes, list[int]]:
    """Receive one message and own its descriptors (close-on-exec).

    Raises PeerClosed at end of file, MessageTruncated when a limit was too small.
    """
    # Not socket.recv_fds: Python 3.11 drops its flags, and the descriptors would survive an exec.
    try:
        payload, control, flags, _ = sock.recvmsg(
            max_bytes, socket.CMSG_LEN(max_fds * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError as error:
        raise PeerClosed("the peer is gone") from error
    fds = _received_fds(control)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise MessageTruncated(f"a message exceeds {max_bytes} bytes or {max_fds} descriptors")
    if not payload:
        raise PeerClosed("the peer is gone")
    return payload, fds


def _received_fds(control: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    return list(fds)
