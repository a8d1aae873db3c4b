"""Messages with descriptors over a socket pair."""

import os
import socket
from collections.abc import Iterator

import pytest

from shm import (
    MessageTruncated,
    PeerClosed,
    RingDescriptors,
    RingReader,
    RingWriter,
    create_ring,
    create_socket_pair,
    receive_message,
    send_message,
)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = create_socket_pair()
    with here, there:
        yield here, there


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_messages_keep_their_bounds_and_order(pair: Pair) -> None:
    sent = [b"a", b"b" * 1000, b"\0"]
    for payload in sent:
        send_message(pair[0], payload)
    assert [receive_message(pair[1]) for _ in sent] == [(payload, []) for payload in sent]


@pytest.mark.parametrize("count", [1, 2, 3, 17, 253])
def test_descriptors_arrive_as_duplicates_that_do_not_survive_exec(pair: Pair, count: int) -> None:
    fds = [os.eventfd(n, os.EFD_NONBLOCK) for n in range(1, count + 1)]
    send_message(pair[0], b"take these", fds)
    payload, received = receive_message(pair[1])
    assert payload == b"take these"
    assert not set(received) & set(fds)
    assert not any(os.get_inheritable(fd) for fd in received)
    assert [os.eventfd_read(fd) for fd in received] == list(range(1, count + 1))
    for fd in fds + received:
        os.close(fd)


def test_ring_works_over_a_handover(pair: Pair) -> None:
    with create_ring("plan", ["sampler"], 100, 2) as descriptors:
        with descriptors.for_reader(0) as end:
            payload, fds = end.to_wire()
            send_message(pair[0], payload, fds)
        received = RingDescriptors.from_wire(*receive_message(pair[1]))
        assert received.geometry == descriptors.geometry
        with (
            RingWriter(descriptors.for_writer(), 1) as writer,
            RingReader(received, 0, 1) as reader,
        ):
            writer.put(b"through", 0)
            assert reader.get(0) == b"through"


def test_end_of_file_has_a_name(pair: Pair) -> None:
    send_message(pair[0], b"last")
    pair[0].close()
    assert receive_message(pair[1]) == (b"last", [])
    with pytest.raises(PeerClosed):
        receive_message(pair[1])
    with pytest.raises(PeerClosed):
        send_message(pair[1], b"too late")


def test_peer_that_left_without_reading_is_closed(pair: Pair) -> None:
    send_message(pair[1], b"never read")
    pair[0].close()
    with pytest.raises(PeerClosed):
        receive_message(pair[1])


@pytest.mark.parametrize("limits", [(4, 253), (100, 1), (100, 0), (4, 1)])
def test_truncated_message_is_an_error_that_leaks_nothing(
    pair: Pair, limits: tuple[int, int]
) -> None:
    before = open_fds()
    send_message(pair[0], b"12345", [0, 1])
    with pytest.raises(MessageTruncated):
        receive_message(pair[1], *limits)
    assert open_fds() == before
    send_message(pair[0], b"next")
    assert receive_message(pair[1], *limits) == (b"next", [])


def test_limits_that_fit_exactly_are_enough(pair: Pair) -> None:
    send_message(pair[0], b"12345", [0, 1, 2])
    payload, fds = receive_message(pair[1], 5, 3)
    assert (payload, len(fds)) == (b"12345", 3)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("payload", "fds"), [(b"", []), (b"", [0]), (bytes(2**16 + 1), []), (b"x", [0] * 254)]
)
def test_message_that_cannot_be_received_is_refused(
    pair: Pair, payload: bytes, fds: list[int]
) -> None:
    with pytest.raises(ValueError, match="a message"):
        send_message(pair[0], payload, fds)
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        receive_message(pair[1])
