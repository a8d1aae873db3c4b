"""The parts of the accelerator's executor: completions, transfers, device rows, graphs, epochs."""

from __future__ import annotations

from collections.abc import Iterator
from select import select
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor_svc.accelerator.completion import Completions, DeviceFault
from executor_svc.accelerator.device import DecodeOutput
from executor_svc.accelerator.graphs import LARGEST_BUCKET, DecodeGraphs, batch_buckets
from executor_svc.accelerator.npu_graph import HEADROOM, MAX_EXCESS, LengthBounds
from executor_svc.accelerator.rows import DeviceRows
from executor_svc.accelerator.transfers import Transfers
from executor_svc.rows import RowTable, TableChanges
from stages.columns import i32_bytes
from stages.messages import ExecuteStep, NewRow, SamplingParams
from tests.accelerator_cpu import CpuDevice

TIMEOUT_S = 30
BLOCK_SIZE = 4


class HeldEvent:
    """A device's event that comes when the test says so."""

    def __init__(self, fault: str = "") -> None:
        self.come = Event()
        self.fault = fault

    def synchronize(self) -> None:
        assert self.come.wait(TIMEOUT_S)
        if self.fault:
            raise RuntimeError(self.fault)


@pytest.fixture
def completions() -> Iterator[Completions]:
    waiting = Completions(lambda: None)
    yield waiting
    waiting.close()


def is_readable(completions: Completions, timeout_s: float) -> bool:
    return bool(select([completions.fileno()], [], [], timeout_s)[0])


class TestCompletions:
    def test_wakes_when_an_event_comes(self, completions: Completions) -> None:
        first, second = HeldEvent(), HeldEvent()
        completions.watch(first)
        completions.watch(second)
        assert not is_readable(completions, 0)
        assert completions.take() == []
        first.come.set()
        assert is_readable(completions, TIMEOUT_S)
        assert len(completions.take()) == 1
        assert completions.num_pending == 1
        second.come.set()
        assert is_readable(completions, TIMEOUT_S)
        assert len(completions.take()) == 1

    def test_tells_in_the_order_of_the_launches(self, completions: Completions) -> None:
        first, second = HeldEvent(), HeldEvent()
        for event in (first, second):
            completions.watch(event)
        second.come.set()
        assert not is_readable(completions, 0)
        first.come.set()
        ends: list[int] = []
        while len(ends) < 2:
            assert is_readable(completions, TIMEOUT_S)
            ends += completions.take()
        assert ends == sorted(ends)

    def test_drain_waits_for_all(self, completions: Completions) -> None:
        events = [HeldEvent() for _ in range(3)]
        for event in events:
            completions.watch(event)
            event.come.set()
        completions.drain()
        assert completions.num_pending == 0
        assert not is_readable(completions, 0)
        assert completions.take() == []

    def test_a_fault_of_the_device_is_raised_where_results_are_taken(
        self, completions: Completions
    ) -> None:
        event = HeldEvent("out of range")
        event.come.set()
        completions.watch(event)
        assert is_readable(completions, TIMEOUT_S)
        with pytest.raises(DeviceFault, match="out of range"):
            completions.take()


columns_of = st.lists(
    st.tuples(st.sampled_from(["i4", "i8", "f4"]), st.lists(st.integers(0, 99), max_size=5)),
    min_size=1,
    max_size=6,
)


@given(columns_of, st.integers(0, 2))
def test_uploads_keep_their_order_types_and_values(
    described: list[tuple[str, list[int]]], num_streams: int
) -> None:
    transfers = Transfers(CpuDevice(), num_streams)
    columns = [np.array(values, dtype=kind) for kind, values in described]
    for tensor, column in zip(transfers.upload_all(columns), columns, strict=True):
        assert tensor.numpy().dtype == column.dtype
        assert tensor.tolist() == column.tolist()


@given(st.integers(1, 2000))
def test_buckets_hold_every_batch_and_waste_less_than_half(max_num_rows: int) -> None:
    buckets = batch_buckets(max_num_rows)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == min(max_num_rows, LARGEST_BUCKET)
    for num_rows in range(1, buckets[-1] + 1):
        bucket = next(bucket for bucket in buckets if bucket >= num_rows)
        assert bucket < 2 * num_rows or bucket == num_rows == 1


class TestDecodeGraphs:
    def test_a_batch_takes_the_smallest_bucket_that_holds_it(self) -> None:
        def decode(num_rows: int) -> DecodeOutput:
            return DecodeOutput(torch.ones(num_rows, 3), torch.zeros(num_rows, dtype=torch.int64))

        device = CpuDevice()
        graphs = DecodeGraphs(device, device.module.Stream(), [1, 2, 4], decode, capacity=16)
        taken = [graphs.of(num_rows) for num_rows in (1, 2, 3, 4, 5)]
        sizes = [None if own is None else len(own.output.logits) for own in taken]
        assert sizes == [1, 2, 4, 4, None]


LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=6)


class TestLengthBounds:
    """What a recorded batch of six rows reads of contexts of at most 1,024 tokens."""

    @given(st.lists(LENGTHS, min_size=1, max_size=8))
    def test_no_row_is_longer_than_its_bound_and_few_keys_are_read_in_vain(
        self, steps: list[list[int]]
    ) -> None:
        bounds = LengthBounds(6, 1024)
        for lengths in steps:
            seq_lens = np.array(lengths, dtype=np.int32)
            bounds.fit(seq_lens)
            assert (bounds.values[: len(seq_lens)] >= seq_lens).all()
            assert bounds.values.max() <= 1024
            num_padding = 6 - len(seq_lens)
            excess = int(bounds.values.sum() - seq_lens.sum()) - num_padding
            assert excess <= MAX_EXCESS * len(seq_lens)

    def test_bounds_hold_for_as_many_steps_as_they_have_room(self) -> None:
        bounds = LengthBounds(4, 1024)
        start = np.array([7, 300, 12], dtype=np.int32)
        changed = [step for step in range(3 * HEADROOM) if bounds.fit(start + step)]
        assert changed == [0, HEADROOM + 1, 2 * HEADROOM + 2]

    def test_a_context_ends_with_its_block_table(self) -> None:
        bounds = LengthBounds(1, 256)
        assert bounds.fit(np.array([250], dtype=np.int32)) is False
        assert bounds.values.tolist() == [256]


class TestDeviceRows:
    def make(self) -> DeviceRows:
        return DeviceRows(4, 16, BLOCK_SIZE, Transfers(CpuDevice(), 2))

    def test_padding_lands_in_the_null_block_and_stays_there(self) -> None:
        rows = self.make()
        rows.set_decoding(np.array([2], dtype=np.int32))
        for _ in range(2 * BLOCK_SIZE):
            batch = rows.decode_batch(4, [1] * 4, is_static=True)
            assert (batch.slot_mapping[1:] == 0).all()
            assert batch.seq_lens[1:].tolist() == [1, 1, 1]
            rows.advance_decoding(4)

    def test_a_row_advances_through_its_blocks(self) -> None:
        rows = self.make()
        places = np.array([1 * 4 + 0, 1 * 4 + 1], dtype=np.int64)
        rows.change_tables(TableChanges(places, np.array([9, 5], dtype=np.int32)))
        rows.set_decoding(np.array([1], dtype=np.int32))
        slots = []
        for length in range(1, 2 * BLOCK_SIZE + 1):
            slots += rows.decode_batch(1, [length], is_static=False).slot_mapping.tolist()
            rows.advance_decoding(1)
        assert slots == [36, 37, 38, 39, 20, 21, 22, 23]

    def test_the_same_rows_are_not_uploaded_again(self, monkeypatch: Any) -> None:
        rows = self.make()
        decoding = np.array([0, 3], dtype=np.int32)
        rows.set_decoding(decoding)
        monkeypatch.setattr(Transfers, "upload_all", lambda *_: pytest.fail("an upload"))
        rows.set_decoding(decoding.copy())
        rows.change_tables(TableChanges(np.zeros(0, np.int64), np.zeros(0, np.int32)))


def new_row(row: int, num_tokens: int, block_ids: list[int]) -> NewRow:
    token_ids = i32_bytes(list(range(num_tokens)))
    return NewRow(
        row, row, token_ids, num_tokens, 0, 0, i32_bytes(block_ids), SamplingParams(max_tokens=1)
    )


def test_changes_of_the_tables_are_what_a_copy_needs() -> None:
    """A copy that applies them holds each row's blocks, whatever came in one step."""
    table = RowTable(3, 16, BLOCK_SIZE)
    copy = np.zeros((3, 4), dtype=np.int32)
    steps = [
        ExecuteStep(
            1,
            new_rows=[new_row(0, 4, [7]), new_row(2, 8, [3, 4])],
            prefill_rows=i32_bytes([0, 2]),
            prefill_lens=i32_bytes([4, 8]),
        ),
        ExecuteStep(
            2,
            block_rows=i32_bytes([2, 0, 2]),
            block_ids=i32_bytes([8, 1, 9]),
            started_rows=i32_bytes([0, 2]),
        ),
    ]
    for step in steps:
        rows, changes = table.advance(step)
        copy.reshape(-1)[changes.places] = changes.block_ids
        table.inputs(rows)
    assert copy.tolist() == [[7, 1, 0, 0], [0, 0, 0, 0], [3, 4, 8, 9]]
