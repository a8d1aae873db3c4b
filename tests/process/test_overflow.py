"""The overflow channel over real ipc sockets: bounds, deadlines, interrupts, dead epochs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from shm import Deadline, Interrupted, ReaderLate, RecordCorrupt, WriterLate
from stages.overflow import ZmqOverflowReceiver, ZmqOverflowSender

Context = zmq.Context[zmq.Socket[bytes]]
DEADLINE_S = 30.0


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def addresses(tmp_path: Path) -> dict[str, str]:
    return {name: f"ipc://{tmp_path}/{name}" for name in ("zero", "one")}


def late() -> Deadline:
    return Deadline(DEADLINE_S)


def test_parts_of_a_payload_arrive_joined_and_in_order(
    context: Context, addresses: dict[str, str]
) -> None:
    with (
        ZmqOverflowReceiver(context, addresses["zero"], "w") as zero,
        ZmqOverflowReceiver(context, addresses["one"], "w") as one,
        ZmqOverflowSender(context, addresses) as sender,
    ):
        wide = memoryview(bytearray(range(16))).cast("I")
        sender.send(1, 4, [b"head", wide, bytearray(b"tail")], late())
        sender.send(1, 9, [], late())
        for receiver in (zero, one):
            assert receiver.receive(1, 4, late()) == b"head" + bytes(range(16)) + b"tail"
            assert receiver.receive(1, 9, late()) == b""


def test_full_channel_names_its_reader_and_reaches_nobody(
    context: Context, addresses: dict[str, str]
) -> None:
    """Reader `one` never binds; what fails for it must not pile up at `zero`."""
    with (
        ZmqOverflowReceiver(context, addresses["zero"], "w") as zero,
        ZmqOverflowSender(context, addresses, high_water_mark=2, linger_s=0) as sender,
    ):
        for sequence in range(2):
            sender.send(1, sequence, [b"sent"], late())
        for deadline in [Deadline(0.5)] + [Deadline(0)] * 10:
            with pytest.raises(ReaderLate, match="'one'"):
                sender.send(1, 2, [b"refused"], deadline)
        assert [zero.receive(1, sequence, late()) for sequence in range(2)] == [b"sent"] * 2
        with pytest.raises(WriterLate, match=r"'w' published nothing within 0\.05 s"):
            zero.receive(1, 2, Deadline(0.05))


def test_what_was_sent_before_close_still_arrives(
    context: Context, addresses: dict[str, str]
) -> None:
    payload = os.urandom(8 * 2**20)
    with ZmqOverflowReceiver(context, addresses["zero"], "w") as zero:
        with ZmqOverflowSender(context, {"zero": addresses["zero"]}) as sender:
            sender.send(1, 0, [payload], late())
        assert zero.receive(1, 0, late()) == payload


def test_payloads_of_a_dead_epoch_or_an_older_record_are_dropped(
    context: Context, addresses: dict[str, str]
) -> None:
    only = {"zero": addresses["zero"]}
    with ZmqOverflowReceiver(context, addresses["zero"], "w") as zero:
        for epoch in (1, 2):
            with ZmqOverflowSender(context, only) as sender:
                for sequence in range(2):
                    sender.send(epoch, sequence, [bytes([epoch, sequence])], late())
        assert zero.receive(2, 1, late()) == b"\2\1"


def test_payload_of_a_later_record_means_that_one_is_missing(
    context: Context, addresses: dict[str, str]
) -> None:
    only = {"zero": addresses["zero"]}
    with (
        ZmqOverflowReceiver(context, addresses["zero"], "w") as zero,
        ZmqOverflowSender(context, only) as sender,
    ):
        sender.send(1, 5, [b"later"], late())
        with pytest.raises(RecordCorrupt, match="record 4 never came"):
            zero.receive(1, 4, late())


def test_interrupt_reaches_a_waiting_send_and_receive(
    context: Context, addresses: dict[str, str]
) -> None:
    interrupt, control = os.pipe()
    os.write(control, b"!")
    with (
        os.fdopen(interrupt),
        os.fdopen(control, "wb"),
        ZmqOverflowReceiver(context, addresses["zero"], "w") as zero,
        ZmqOverflowSender(
            context, {"one": addresses["one"]}, high_water_mark=1, linger_s=0
        ) as sender,
    ):
        with pytest.raises(Interrupted):
            zero.receive(1, 0, Deadline(DEADLINE_S, interrupt))
        sender.send(1, 0, [b"room"], Deadline(DEADLINE_S, interrupt))
        with pytest.raises(Interrupted):
            sender.send(1, 1, [b"no room"], Deadline(DEADLINE_S, interrupt))
