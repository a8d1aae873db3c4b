"""The ring between real processes: kill -9 of either end, restarts, leaks, load, overflow."""

import os
import random
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from shm import (
    PeerClosed,
    ReaderLate,
    RingDescriptors,
    RingReader,
    RingWriter,
    WriterLate,
    create_ring,
    create_socket_pair,
    receive_message,
    send_message,
)
from stages.overflow import ZmqOverflowSender
from tests.process.ring_peer import check, checked

DEADLINE_S = 60.0


@dataclass
class Peer:
    """A child process and the test's end of its control socket."""

    process: subprocess.Popen[bytes]
    control: socket.socket

    def hand_over(self, end: RingDescriptors) -> None:
        """Send `end` and close it here."""
        with end:
            send_message(self.control, *end.to_wire())

    def report(self) -> str:
        """The next thing that the child reports."""
        return receive_message(self.control)[0].decode()

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.process.kill()
        assert self.process.wait(DEADLINE_S) == -signal.SIGKILL

    def wait(self) -> None:
        """Wait for a clean end."""
        assert self.process.wait(DEADLINE_S) == 0


Spawn = Callable[..., Peer]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start children of tests.process.ring_peer; every one is dead and reaped afterwards."""
    with ExitStack() as stack:

        def start(role: str, *arguments: object) -> Peer:
            here, there = create_socket_pair()
            stack.enter_context(here)
            here.settimeout(DEADLINE_S)
            command = [sys.executable, "-m", "tests.process.ring_peer", str(there.fileno()), role]
            with there:
                process = subprocess.Popen(
                    [*command, *map(str, arguments)],
                    pass_fds=[there.fileno()],
                    cwd=Path(__file__).parents[2],
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return Peer(process, here)

        yield start


@pytest.fixture
def descriptors() -> Iterator[RingDescriptors]:
    with create_ring("process-test", ["zero", "one"], 4096, 4) as made:
        yield made


def test_hundred_thousand_records_reach_two_processes(spawn: Spawn) -> None:
    num_records = 100_000
    with create_ring("stress", ["zero", "one"], 256, 64) as descriptors:
        peers = [spawn("count_records", index, num_records) for index in range(2)]
        for index, peer in enumerate(peers):
            peer.hand_over(descriptors.for_reader(index))
        with RingWriter(descriptors.for_writer(), 1) as writer:
            for n in range(num_records):
                writer.put(checked(n.to_bytes(8, "little") * (1 + n % 30)), DEADLINE_S)
        for peer in peers:
            assert peer.report() == str(num_records)
            peer.wait()


def test_reader_killed_with_a_record_in_hand_is_replaced(
    spawn: Spawn, descriptors: RingDescriptors
) -> None:
    victim = spawn("hold_record", 1, 2)
    victim.hand_over(descriptors.for_reader(1))
    with (
        RingWriter(descriptors.for_writer(), 1) as writer,
        RingReader(descriptors.for_reader(0), 0, 1) as other,
    ):
        for n in range(5):
            writer.put(checked(n.to_bytes(8, "little")), DEADLINE_S)
            other.get(0)
        assert victim.report() == "holding"
        victim.kill()
        writer.put(checked((5).to_bytes(8, "little")), 0)
        other.get(0)
        with pytest.raises(ReaderLate, match="'one'"):
            writer.put(b"", 0.01)

        start = writer.reset_reader(1)
        assert start == 2  # the record in hand comes again
        successor = spawn("report_records", 1, start)
        successor.hand_over(descriptors.for_reader(1))
        for n in range(6, 20):
            writer.put(checked(n.to_bytes(8, "little")), DEADLINE_S)
            other.get(0)
        assert [receive_sequence(successor) for _ in range(2, 20)] == list(range(2, 20))


def receive_sequence(peer: Peer) -> int:
    return int.from_bytes(receive_message(peer.control)[0], "little")


def test_no_record_is_lost_when_a_reader_is_killed_again_and_again(
    spawn: Spawn, descriptors: RingDescriptors
) -> None:
    """Each reader reports a record while it holds it: nothing may be missing, and what comes
    twice is the one record that a victim held."""
    rng = random.Random(2)
    seen: list[int] = []
    with (
        RingWriter(descriptors.for_writer(), 1) as writer,
        RingReader(descriptors.for_reader(0), 0, 1) as other,
    ):
        for _ in range(10):
            start = writer.reset_reader(1)
            assert start in (len(set(seen)), len(set(seen)) - 1)
            peer = spawn("report_records", 1, start)
            peer.hand_over(descriptors.for_reader(1))
            for _ in range(rng.randrange(1, 60)):
                body = writer.sequence.to_bytes(8, "little")
                writer.put(checked(body + bytes(rng.randrange(2000))), DEADLINE_S)
                other.get(0)
            seen.append(receive_sequence(peer))
            peer.kill()
            seen.extend(remaining_sequences(peer))
    assert sorted(set(seen)) == list(range(len(set(seen))))
    assert len(seen) - len(set(seen)) <= 9


def remaining_sequences(peer: Peer) -> Iterator[int]:
    try:
        while True:
            yield receive_sequence(peer)
    except PeerClosed:
        return


def test_record_of_a_writer_killed_in_the_middle_of_a_put_is_never_seen(
    spawn: Spawn, descriptors: RingDescriptors
) -> None:
    victim = spawn("stall_in_put", 3)
    victim.hand_over(descriptors.for_writer())
    with RingReader(descriptors.for_reader(0), 0, 1) as reader:
        assert victim.report() == "in the middle"
        memory = os.pread(descriptors.memfd, descriptors.geometry.size, 0)
        assert b"never complete" in memory  # it was in the middle indeed
        victim.kill()
        assert [reader.get(0) for _ in range(3)] == [checked(bytes([n])) for n in range(3)]
        with pytest.raises(WriterLate, match="'writer'"):
            reader.get(0.01)


def test_every_record_is_whole_when_writers_are_killed_at_random(spawn: Spawn) -> None:
    rng = random.Random(3)
    for epoch in range(1, 9):  # what the supervisor does: a new ring for each writer
        with create_ring("killed", ["reader"], 4096, 4) as descriptors:
            victim = spawn("stream_records", epoch)
            victim.hand_over(descriptors.for_writer())
            with RingReader(descriptors.for_reader(0), 0, epoch) as reader:
                for _ in range(rng.randrange(1, 2000)):
                    check(reader.get(DEADLINE_S))
                victim.kill()
                num_left = 0
                while (payload := reader.get_nowait()) is not None:
                    check(payload)
                    num_left += 1
                assert num_left <= 4


def test_control_socket_interrupts_a_waiting_writer(
    spawn: Spawn, descriptors: RingDescriptors
) -> None:
    peer = spawn("put_until_interrupted")
    peer.hand_over(descriptors.for_writer())
    assert peer.report() == "full"
    send_message(peer.control, b"reset")
    assert peer.report() == "interrupted by reset"
    peer.wait()


def test_memory_has_no_name_and_dies_with_its_processes(
    spawn: Spawn, descriptors: RingDescriptors
) -> None:
    victims = [spawn("hold_record", 0, 0), spawn("hold_record", 1, 0)]
    with RingWriter(descriptors.for_writer(), 1) as writer:
        for index, victim in enumerate(victims):
            victim.hand_over(descriptors.for_reader(index))
        writer.put(b"", 0)
        for victim in victims:
            assert victim.report() == "holding"
            maps = Path(f"/proc/{victim.process.pid}/maps").read_text()
            assert "/memfd:headrace-process-test" in maps
            assert "/dev/shm" not in maps
            victim.kill()
    assert not [name for name in os.listdir("/dev/shm") if "process-test" in name]


def test_no_descriptor_leaks_over_handovers(spawn: Spawn) -> None:
    here_before = set(os.listdir("/proc/self/fd"))
    peer = spawn("attach_and_leave", 0, 20)
    counts = set()
    for _ in range(20):
        with create_ring("leak", ["zero", "one"], 100, 2) as descriptors:
            peer.hand_over(descriptors.for_reader(0))
            RingWriter(descriptors.for_writer(), 1).close()
            counts.add(peer.report())
    assert len(counts) == 1
    peer.wait()
    peer.control.close()
    assert set(os.listdir("/proc/self/fd")) == here_before


def test_overflow_of_any_size_keeps_the_order(spawn: Spawn, tmp_path: Path) -> None:
    sizes = [0, 1, 4096, 4097, 10, 3 * 2**20, 4096, 100 * 2**20, 4097, 5]
    addresses = {name: f"ipc://{tmp_path}/{name}" for name in ("zero", "one")}
    peers = []
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, create_ring("overflow", list(addresses), 4096, 3) as descriptors:
        for index, address in enumerate(addresses.values()):
            peers.append(spawn("answer_overflow", index, address, len(sizes)))
            peers[-1].hand_over(descriptors.for_reader(index))
        with (
            ZmqOverflowSender(context, addresses) as overflow,
            RingWriter(descriptors.for_writer(), 1, overflow) as writer,
        ):
            expected = []
            for n, size in enumerate(sizes):
                payload = random.Random(n).randbytes(min(size, 4096)) * -(-size // 4096)
                writer.put([payload[:size]], DEADLINE_S)
                expected.append(f"{size} {zlib.crc32(payload[:size])}")
            for peer in peers:
                assert [peer.report() for _ in sizes] == expected
                peer.wait()
