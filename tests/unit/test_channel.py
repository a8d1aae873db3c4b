"""ZMQ channels: typed, ordered, and not harmed by garbage or by a peer that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from stages.channel import HIGH_WATER_MARK, Inbox, Outbox
from stages.messages import AbortRequest, FinishRequest, Message, SchedulerInbound

WAIT_MS = 5000


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


def receive(inbox: Inbox[Message], count: int) -> list[Message]:
    messages: list[Message] = []
    while len(messages) < count:
        assert inbox.socket.poll(WAIT_MS), f"{len(messages)} of {count} messages came"
        messages += inbox.drain()
    return messages


def test_messages_arrive_typed_and_in_order(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/in"
    outbox = Outbox(context, address)  # before anybody listens
    sent = [AbortRequest(n, 1) for n in range(500)]
    for message in sent:
        outbox.send(message)
    inbox: Inbox[Message] = Inbox(context, address, SchedulerInbound)
    assert receive(inbox, 500) == sent
    inbox.close()
    outbox.close()


def test_garbage_is_counted_and_dropped(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"ipc://{tmp_path}/in"
    inbox: Inbox[Message] = Inbox(context, address, SchedulerInbound)
    raw = context.socket(zmq.PUSH)
    raw.connect(address)
    for frame in (b"", b"\xc1", b"\x93\xa5Stray\x01\x02", b"\x92\xacAbortRequest\xa1x"):
        raw.send(frame)
    outbox = Outbox(context, address)
    raw.close(linger=WAIT_MS)
    assert inbox.socket.poll(WAIT_MS)
    outbox.send(FinishRequest(1, 1))
    assert receive(inbox, 1) == [FinishRequest(1, 1)]
    while inbox.num_malformed < 4:
        assert inbox.socket.poll(WAIT_MS)
        assert inbox.drain() == []
    assert "malformed" in caplog.text
    inbox.close()
    outbox.close()


def test_a_full_channel_makes_room_by_forgetting(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/in"
    outbox = Outbox(context, address)
    for _ in range(HIGH_WATER_MARK):
        outbox.send(AbortRequest(1, 1))
    outbox.forget()
    outbox.send(AbortRequest(2, 2))  # a full channel would wait here, and fail
    inbox: Inbox[Message] = Inbox(context, address, SchedulerInbound)
    messages: list[Message] = []
    while AbortRequest(2, 2) not in messages:
        messages += receive(inbox, 1)
    # ZMQ closes in the background: some may slip through, and their epoch gives them away.
    assert {message.epoch for message in messages[:-1]} <= {1}  # type: ignore[attr-defined]
    inbox.close()
    outbox.close()
