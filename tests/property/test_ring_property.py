"""The ring against a list: any sizes, any interleaving, slow readers, restarts of every end."""

import os
import select
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shm import (
    Buffer,
    Deadline,
    OverflowLost,
    ReaderLate,
    RingReader,
    RingWriter,
    WriterLate,
    create_ring,
)

READERS = ("left", "right")
SLOT_BYTES = 40
readers = st.sampled_from(range(len(READERS)))
sizes = st.sampled_from([0, 1, SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1]) | st.integers(0, 200)


class Channel:
    """An overflow channel in memory, shared by all ends; what it has sent stays until received."""

    def __init__(self) -> None:
        self.queues: list[deque[tuple[tuple[int, int], bytes]]] = [deque() for _ in READERS]
        self.late_reader: str | None = None

    def send(self, epoch: int, sequence: int, parts: Sequence[Buffer], deadline: Deadline) -> None:
        if self.late_reader:
            raise ReaderLate(self.late_reader, deadline.seconds)
        for queue in self.queues:
            queue.append(((epoch, sequence), b"".join(parts)))


class ChannelEnd:
    """One reader's half of a channel."""

    def __init__(self, channel: Channel, index: int) -> None:
        self.queue = channel.queues[index]

    def receive(self, epoch: int, sequence: int, deadline: Deadline) -> bytes:
        while self.queue:
            found, payload = self.queue.popleft()
            if found == (epoch, sequence):
                return payload
            assert found < (epoch, sequence)
        raise WriterLate("writer", deadline.seconds)


def take_one(reader: RingReader, way: str) -> bytes | None:
    if way == "view":
        with reader.view(0) as view:
            return bytes(view)
    return reader.get(0) if way == "get" else reader.get_nowait()


class RingMachine(RuleBasedStateMachine):
    """Model: the list of published payloads, and how many of them each reader has taken."""

    @initialize(num_slots=st.integers(1, 4))
    def start(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.epoch = 0
        self.channel = Channel()
        self.open_ring()

    def open_ring(self) -> None:
        self.epoch += 1
        self.published: list[bytes] = []
        self.taken = [0] * len(READERS)
        self.descriptors = create_ring("model", READERS, SLOT_BYTES, self.num_slots)
        self.writer = RingWriter(self.descriptors.for_writer(), self.epoch, self.channel)
        self.readers = [self.attach(index, 0) for index in range(len(READERS))]

    def attach(self, index: int, start: int) -> RingReader:
        end = self.descriptors.for_reader(index)
        channel = ChannelEnd(self.channel, index)
        return RingReader(end, index, self.epoch, channel, start_sequence=start)

    def close_ring(self) -> None:
        self.writer.close()
        for reader in self.readers:
            reader.close()
        self.descriptors.close()

    @rule(size=sizes, cut=st.integers(0, 200), seed=st.integers(0, 255))
    def put(self, size: int, cut: int, seed: int) -> None:
        payload = bytes((seed + n) % 256 for n in range(size))
        full = [n for n, taken in zip(READERS, self.taken, strict=True) if self.is_full(taken)]
        if full:
            with pytest.raises(ReaderLate) as caught:
                self.writer.put(payload, 0)
            assert caught.value.reader_name == full[0]
        else:
            sequence = self.writer.put([payload[:cut], memoryview(payload)[cut:]], 0)
            assert sequence == len(self.published)
            self.published.append(payload)

    def is_full(self, taken: int) -> bool:
        return len(self.published) - taken == self.num_slots

    @rule(name=st.sampled_from(READERS))
    def put_while_the_channel_is_late(self, name: str) -> None:
        self.channel.late_reader = name
        with pytest.raises(ReaderLate):
            self.writer.put(bytes(SLOT_BYTES + 1), 0)
        self.channel.late_reader = None

    @rule(index=readers, way=st.sampled_from(["get", "get_nowait", "view"]))
    def take(self, index: int, way: str) -> None:
        reader, taken = self.readers[index], self.taken[index]
        if taken == len(self.published):
            assert reader.get_nowait() is None
            with pytest.raises(WriterLate):
                reader.get(0)
            return
        assert take_one(reader, way) == self.published[taken]
        self.taken[index] += 1

    @rule(index=readers, is_holding=st.booleans())
    def restart_reader(self, index: int, is_holding: bool) -> None:
        self.readers[index].close()
        taken = self.taken[index]
        if is_holding and taken < len(self.published):
            os.eventfd_read(self.descriptors.filled[index])
        if any(len(payload) > SLOT_BYTES for payload in self.published[taken:]):
            with pytest.raises(OverflowLost):
                self.writer.reset_reader(index)
            self.restart_writer()
        else:
            assert self.writer.reset_reader(index) == taken
            self.readers[index] = self.attach(index, taken)

    @rule()
    def restart_writer(self) -> None:
        self.close_ring()
        self.open_ring()

    @precondition(lambda self: hasattr(self, "readers"))
    @invariant()
    def a_reader_is_readable_while_a_record_waits(self) -> None:
        for reader, taken in zip(self.readers, self.taken, strict=True):
            is_readable = bool(select.select([reader], [], [], 0)[0])
            assert is_readable == (taken < len(self.published))

    def teardown(self) -> None:
        self.close_ring()


RingMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True
)
test_ring_follows_its_model = RingMachine.TestCase
