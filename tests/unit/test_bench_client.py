"""The load client's streams: events are counted wherever the bytes are cut."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from stages.bench.client import Stream
from stages.errors import HeadraceError

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUEST = b"the request"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def ends(listener: socket.socket) -> Iterator[tuple[Stream, socket.socket]]:
    stream = Stream(listener.getsockname(), REQUEST)
    peer, _ = listener.accept()
    assert peer.recv(100) == REQUEST
    yield stream, peer
    stream.socket.close()
    peer.close()


def test_events_are_counted_in_pieces_of_any_size(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    data = HEAD + b"".join(b'6\r\ndata: {"n": %d}\n\n\r\n' % i for i in range(40))
    for piece in (data[:60], data[60:61], data[61:64], data[64:300], data[300:]):
        peer.sendall(piece)
        stream.read()
    assert stream.num_events == 40


def test_the_same_is_asked_again_when_an_answer_has_ended(
    ends: tuple[Stream, socket.socket],
) -> None:
    stream, peer = ends
    peer.sendall(HEAD + b"data: {}\n\n")
    assert stream.read() == 1
    peer.sendall(b"data: [DONE]\n\n")
    assert stream.read() == 0
    assert peer.recv(100) == REQUEST
    peer.sendall(b"0\r\n\r\n")
    assert (stream.read(), stream.num_events) == (0, 0)
    peer.sendall(HEAD + b"data: {}\n\ndata: {}\n\n")
    assert (stream.read(), stream.num_events) == (2, 2)


def test_a_refusal_is_an_error(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    peer.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\nbusy")
    with pytest.raises(HeadraceError, match="busy"):
        stream.read()


def test_a_server_that_hangs_up_is_an_error(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    peer.close()
    with pytest.raises(HeadraceError, match="hung up"):
        stream.read()
