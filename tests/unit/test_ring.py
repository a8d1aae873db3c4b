"""The ring's two ends in one process: records, limits, deadlines, errors, restart of a reader."""

import mmap
import os
import select
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from shm import (
    EpochMismatch,
    HandoverError,
    Interrupted,
    OverflowLost,
    PayloadTooLarge,
    ReaderLate,
    RecordCorrupt,
    RingDescriptors,
    RingReader,
    RingWriter,
    WriterLate,
    create_ring,
)
from shm.record import HEADER_BYTES, RecordHeader, write_header
from shm.ring import Buffer
from shm.semaphore import Deadline

EPOCH = 7
SLOT_BYTES = 100
NUM_SLOTS = 3


class StubOverflow:
    """Both halves of an overflow channel for one reader; `ready` False stands for a late peer."""

    def __init__(self) -> None:
        self.payloads: dict[tuple[int, int], bytes] = {}
        self.is_ready = True

    def send(self, epoch: int, sequence: int, parts: Sequence[Buffer], deadline: Deadline) -> None:
        if not self.is_ready:
            raise ReaderLate("slow", deadline.seconds)
        self.payloads[epoch, sequence] = b"".join(parts)

    def receive(self, epoch: int, sequence: int, deadline: Deadline) -> bytes:
        if not self.is_ready:
            raise WriterLate("writer", deadline.seconds)
        return self.payloads.pop((epoch, sequence))


@pytest.fixture
def descriptors() -> Iterator[RingDescriptors]:
    with create_ring("test", ["fast", "slow"], SLOT_BYTES, NUM_SLOTS, writer_name="w") as made:
        yield made


@pytest.fixture
def writer(descriptors: RingDescriptors) -> Iterator[RingWriter]:
    with RingWriter(descriptors.for_writer(), EPOCH) as end:
        yield end


@pytest.fixture
def readers(descriptors: RingDescriptors) -> Iterator[list[RingReader]]:
    with (
        RingReader(descriptors.for_reader(0), 0, EPOCH) as fast,
        RingReader(descriptors.for_reader(1), 1, EPOCH) as slow,
    ):
        yield [fast, slow]


def test_every_reader_gets_every_record_in_order(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    payloads = [bytes([n]) * n for n in range(20)]
    for sequence, payload in enumerate(payloads):
        assert writer.put(payload, 0) == sequence
        assert [reader.get(0) for reader in readers] == [payload, payload]


@pytest.mark.parametrize("size", [0, 1, SLOT_BYTES - 1, SLOT_BYTES])
def test_payload_up_to_the_slot_size_needs_no_overflow(
    writer: RingWriter, readers: list[RingReader], size: int
) -> None:
    payload = os.urandom(size)
    writer.put(payload, 0)
    assert readers[0].get(0) == payload


def test_buffers_of_a_sequence_are_joined(writer: RingWriter, readers: list[RingReader]) -> None:
    wide = memoryview(bytearray(range(16))).cast("I")
    writer.put([b"head", bytearray(b""), wide, memoryview(b"tail")], 0)
    assert readers[0].get(0) == b"head" + bytes(range(16)) + b"tail"


def test_payload_over_the_slot_size_is_refused_without_overflow(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    for _ in range(2 * NUM_SLOTS):  # a refused put must not use up a slot
        with pytest.raises(PayloadTooLarge, match="101 bytes exceed the 100"):
            writer.put(bytes(SLOT_BYTES + 1), 0)
    assert writer.put(b"next", 0) == 0
    assert readers[1].get(0) == b"next"


def test_put_names_the_late_reader_and_takes_nothing(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    for n in range(NUM_SLOTS):
        writer.put(bytes([n]), 0)
        readers[0].get(0)
    for _ in range(2 * NUM_SLOTS):  # each attempt takes and gives back a slot of the fast reader
        with pytest.raises(ReaderLate, match=r"'slow' made no room within 0.001 s") as caught:
            writer.put(b"late", 0.001)
        assert (caught.value.reader_name, caught.value.seconds) == ("slow", 0.001)
    assert readers[1].get(0) == b"\0"
    assert writer.put(b"late", 0) == NUM_SLOTS
    assert readers[0].get(0) == b"late"


def test_get_names_the_late_writer(readers: list[RingReader]) -> None:
    with pytest.raises(WriterLate, match=r"'w' published nothing within 0.001 s") as caught:
        readers[0].get(0.001)
    assert (caught.value.writer_name, caught.value.seconds) == ("w", 0.001)
    assert isinstance(caught.value, TimeoutError)


def test_get_nowait_returns_none_when_no_record_waits(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    assert readers[0].get_nowait() is None
    writer.put(b"", 0)
    assert readers[0].get_nowait() == b""
    assert readers[0].get_nowait() is None


def test_descriptor_is_readable_exactly_while_a_record_waits(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    poll = select.poll()
    poll.register(readers[0], select.POLLIN)
    assert poll.poll(0) == []
    writer.put(b"a", 0)
    writer.put(b"b", 0)
    readers[0].get(0)
    assert poll.poll(0) == [(readers[0].fileno(), select.POLLIN)]
    readers[0].get(0)
    assert poll.poll(0) == []


def test_interrupt_reaches_a_waiting_put_and_get(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    interrupt, control = os.pipe()
    with os.fdopen(interrupt), os.fdopen(control, "wb", buffering=0) as control_file:
        with pytest.raises(WriterLate):
            readers[0].get(0, interrupt)
        control_file.write(b"!")
        with pytest.raises(Interrupted):
            readers[0].get(60, interrupt)
        for n in range(NUM_SLOTS):  # with room an interrupt is not looked at
            assert writer.put(b"", 0, interrupt) == n
        with pytest.raises(Interrupted):
            writer.put(b"", 60, interrupt)
        assert readers[0].get(0, interrupt) == b""  # nor with a record
        readers[0].get(0)
        readers[0].get(0)
        with pytest.raises(WriterLate):  # and it is forgotten with its call
            readers[0].get(0.001)


def test_hang_up_of_the_interrupt_descriptor_interrupts(readers: list[RingReader]) -> None:
    interrupt, control = os.pipe()
    os.close(control)
    with os.fdopen(interrupt), pytest.raises(Interrupted):
        readers[0].get(60, interrupt)


def test_view_is_in_place_read_only_and_released_on_exit(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    for n in range(NUM_SLOTS):
        writer.put(bytes([n]), 0)
        readers[1].get(0)
    with readers[0].view(0) as view:
        assert view.readonly
        assert bytes(view) == b"\0"
        with pytest.raises(ReaderLate, match="'fast'"):
            writer.put(b"no room yet", 0)
    assert writer.put(b"room", 0) == NUM_SLOTS


def test_view_takes_the_record_when_its_body_raises(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    writer.put(b"first", 0)
    writer.put(b"second", 0)
    with pytest.raises(ZeroDivisionError), readers[0].view(0):
        raise ZeroDivisionError
    assert readers[0].get(0) == b"second"


def test_array_that_outlives_its_reader_is_not_unmapped(
    descriptors: RingDescriptors, writer: RingWriter
) -> None:
    writer.put(np.arange(4, dtype=np.float32).data.cast("B"), 0)
    with RingReader(descriptors.for_reader(0), 0, EPOCH) as reader, reader.view(0) as view:
        logits = np.frombuffer(view, np.float32)
        del view
    assert logits.tolist() == [0, 1, 2, 3]


def test_a_view_does_not_nest(writer: RingWriter, readers: list[RingReader]) -> None:
    writer.put(b"a", 0)
    writer.put(b"b", 0)
    with readers[0].view(0), pytest.raises(AssertionError):
        readers[0].get(0)
    assert readers[0].get(0) == b"b"


def test_record_of_another_epoch_is_an_error_that_stays(
    descriptors: RingDescriptors, writer: RingWriter
) -> None:
    writer.put(b"old", 0)
    with RingReader(descriptors.for_reader(0), 0, EPOCH + 1) as reader:
        for _ in range(2):
            with pytest.raises(EpochMismatch, match="epoch 8, the record is of 7"):
                reader.get(0)
            with pytest.raises(EpochMismatch), reader.view(0):
                pytest.fail("the body must not run")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (RecordHeader(1, EPOCH, 4, 0), "found record 1 instead of 0"),
        (RecordHeader(0, EPOCH, SLOT_BYTES + 1, 0), "claims 101 bytes"),
        (RecordHeader(0, EPOCH, SLOT_BYTES + 1, 1), "has no channel"),
    ],
)
def test_header_that_cannot_be_is_corrupt(
    descriptors: RingDescriptors,
    writer: RingWriter,
    readers: list[RingReader],
    header: RecordHeader,
    message: str,
) -> None:
    writer.put(b"good", 0)
    with mmap.mmap(descriptors.memfd, descriptors.geometry.size) as memory:
        write_header(memory, 0, header)
    with pytest.raises(RecordCorrupt, match=message):
        readers[0].get(0)


def test_any_flipped_bit_of_a_header_is_corrupt(
    descriptors: RingDescriptors, writer: RingWriter, readers: list[RingReader]
) -> None:
    writer.put(b"good", 0)
    with mmap.mmap(descriptors.memfd, descriptors.geometry.size) as memory:
        for bit in range(32 * 8):
            memory[bit // 8] ^= 1 << bit % 8
            with pytest.raises(RecordCorrupt, match="fails its checksum"):
                readers[0].get(0)
            memory[bit // 8] ^= 1 << bit % 8
    assert readers[0].get(0) == b"good"


def test_overflow_travels_beside_the_ring_in_order(descriptors: RingDescriptors) -> None:
    channel = StubOverflow()
    large = os.urandom(SLOT_BYTES + 1)
    with (
        RingWriter(descriptors.for_writer(), EPOCH, channel) as writer,
        RingReader(descriptors.for_reader(0), 0, EPOCH, channel) as reader,
    ):
        writer.put(b"before", 0)
        writer.put([large[:50], large[50:]], 0)
        writer.put(b"after", 0)
        assert [reader.get(0), reader.get_nowait(), reader.get(0)] == [b"before", large, b"after"]


def test_late_overflow_takes_nothing(descriptors: RingDescriptors) -> None:
    channel = StubOverflow()
    large = bytes(SLOT_BYTES + 1)
    with (
        RingWriter(descriptors.for_writer(), EPOCH, channel) as writer,
        RingReader(descriptors.for_reader(0), 0, EPOCH, channel) as reader,
    ):
        channel.is_ready = False
        for _ in range(2 * NUM_SLOTS):
            with pytest.raises(ReaderLate, match="'slow'"):
                writer.put(large, 0)
        channel.is_ready = True
        writer.put(large, 0)
        channel.is_ready = False
        for _ in range(2):
            with pytest.raises(WriterLate):
                reader.get(0)
            assert select.select([reader], [], [], 0)[0]  # an event loop will come back
        channel.is_ready = True
        with reader.view(0) as view:
            assert view == large


def test_overflow_of_a_wrong_length_is_corrupt(descriptors: RingDescriptors) -> None:
    channel = StubOverflow()
    with (
        RingWriter(descriptors.for_writer(), EPOCH, channel) as writer,
        RingReader(descriptors.for_reader(0), 0, EPOCH, channel) as reader,
    ):
        writer.put(bytes(SLOT_BYTES + 1), 0)
        channel.payloads[EPOCH, 0] = b"short"
        with pytest.raises(RecordCorrupt, match="5 bytes came for 101"):
            reader.get(0)


@pytest.mark.parametrize("held", [0, 1])
def test_successor_of_a_reader_gets_what_was_not_released(
    descriptors: RingDescriptors, writer: RingWriter, readers: list[RingReader], held: int
) -> None:
    """`held` 1: the predecessor died between taking its record and releasing the slot."""
    for n in range(NUM_SLOTS):
        writer.put(bytes([n]), 0)
        readers[0].get(0)
    readers[1].get(0)
    for _ in range(held):
        os.eventfd_read(descriptors.filled[1])
    start = writer.reset_reader(1)
    assert start == 1
    with RingReader(descriptors.for_reader(1), 1, EPOCH, start_sequence=start) as successor:
        assert [successor.get(0) for _ in range(NUM_SLOTS - 1)] == [b"\1", b"\2"]
        assert successor.get_nowait() is None
        for n in range(NUM_SLOTS):  # every slot is back in use
            writer.put(bytes([n]), 0)
        with pytest.raises(ReaderLate):
            writer.put(b"", 0)
        assert successor.get(0) == b"\0"


def test_reset_of_an_unused_reader_changes_nothing(
    writer: RingWriter, readers: list[RingReader]
) -> None:
    assert writer.reset_reader(0) == 0
    assert readers[0].get_nowait() is None
    for _ in range(NUM_SLOTS):
        writer.put(b"", 0)


def test_reset_refuses_when_an_overflow_died_with_the_reader(
    descriptors: RingDescriptors,
) -> None:
    channel = StubOverflow()
    with (
        RingWriter(descriptors.for_writer(), EPOCH, channel) as writer,
        RingReader(descriptors.for_reader(0), 0, EPOCH, channel) as reader,
    ):
        writer.put(bytes(SLOT_BYTES + 1), 0)
        with pytest.raises(OverflowLost, match="record 0 died with 'fast'"):
            writer.reset_reader(0)
        reader.get(0)
        assert writer.reset_reader(0) == 1


def test_ends_have_what_they_need_and_nothing_else(descriptors: RingDescriptors) -> None:
    with descriptors.for_reader(1) as end:
        assert (list(end.filled), list(end.free)) == ([1], [1])
        with pytest.raises(KeyError):
            RingReader(end, 0, EPOCH)
    with descriptors.for_writer() as end:
        assert (list(end.filled), list(end.free)) == ([0, 1], [0, 1])


def test_reader_maps_the_memory_read_only_and_nobody_can_resize_it(
    descriptors: RingDescriptors, readers: list[RingReader]
) -> None:
    with pytest.raises(TypeError):
        readers[0]._memory[0] = 1
    for size in (0, 2 * descriptors.geometry.size):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptors.memfd, size)


def test_every_descriptor_is_close_on_exec(descriptors: RingDescriptors) -> None:
    fds = [descriptors.memfd, *descriptors.filled.values(), *descriptors.free.values()]
    with descriptors.for_writer() as end:
        fds += [end.memfd, *end.filled.values(), *end.free.values()]
        assert not any(os.get_inheritable(fd) for fd in fds)


def test_untouched_slots_cost_no_memory() -> None:
    with create_ring("large", ["r"], 10 * 2**20, 8) as descriptors:
        with (
            RingWriter(descriptors.for_writer(), EPOCH) as writer,
            RingReader(descriptors.for_reader(0), 0, EPOCH) as reader,
        ):
            for _ in range(100):
                writer.put(bytes(1000), 0)
                reader.get(0)
        assert os.fstat(descriptors.memfd).st_blocks * 512 <= 8 * mmap.PAGESIZE


def test_close_is_final_and_idempotent(descriptors: RingDescriptors) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    writer = RingWriter(descriptors.for_writer(), EPOCH)
    reader = RingReader(descriptors.for_reader(0), 0, EPOCH)
    for _ in range(2):
        writer.close()
        reader.close()
    assert reader.fileno() == -1
    for call in (lambda: writer.put(b"", 0), lambda: reader.get(0), reader.get_nowait):
        with pytest.raises(ValueError, match="negative"):
            call()
    assert set(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize(
    ("reader_names", "slot_bytes", "num_slots"), [([], 1, 1), (["r"], 0, 1), (["r"], 1, 0)]
)
def test_ring_without_reader_byte_or_slot_is_refused(
    reader_names: list[str], slot_bytes: int, num_slots: int
) -> None:
    with pytest.raises(ValueError, match="needs a slot, a byte and a reader"):
        create_ring("bad", reader_names, slot_bytes, num_slots)


def test_wire_form_that_does_not_fit_its_descriptors_is_refused(
    descriptors: RingDescriptors,
) -> None:
    payload, fds = descriptors.to_wire()
    before = set(os.listdir("/proc/self/fd"))
    other_size = payload.replace(b'"num_slots": 3', b'"num_slots": 4')
    for wrong, count in [(payload, 1), (b"{}", 5), (b"garbage", 5), (other_size, 5), (b"[]", 5)]:
        with pytest.raises(HandoverError):
            RingDescriptors.from_wire(wrong, [os.dup(fd) for fd in fds[:count]])
    assert set(os.listdir("/proc/self/fd")) == before


def test_header_leaves_the_payload_on_a_cache_line() -> None:
    assert HEADER_BYTES % 64 == 0
