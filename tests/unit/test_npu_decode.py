"""What a recorded decode step sees, against a plain account of each row's tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from executor_svc.batch import ForwardBatch, Span
from executor_svc.ops.npu_decode import visible_keys

BLOCK_SIZE = 4
WIDTH = 6
CAPACITY = WIDTH * BLOCK_SIZE


def make_batch(lengths: list[int]) -> ForwardBatch:
    """One token a row, whose blocks are its own and fill the whole width."""
    spans = [
        Span([0], length - 1, range(1 + row * WIDTH, 1 + (row + 1) * WIDTH))
        for row, length in enumerate(lengths)
    ]
    return ForwardBatch.from_spans(spans, BLOCK_SIZE)


@given(
    lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=5),
    window=st.none() | st.integers(1, CAPACITY + 3),
)
def test_a_row_sees_its_context_or_a_window_of_it(lengths: list[int], window: int | None) -> None:
    batch = make_batch(lengths)
    tables, hidden = visible_keys(batch, BLOCK_SIZE, window)
    assert hidden.shape == (len(lengths), 1, 1, tables.shape[1] * BLOCK_SIZE)
    assert tables.is_contiguous()
    for row, length in enumerate(lengths):
        slots = tables[row, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        seen = slots.flatten()[~hidden[row].flatten()].tolist()
        first = 0 if window is None else max(0, length - window)
        start = (1 + row * WIDTH) * BLOCK_SIZE
        assert seen == list(range(start + first, start + length))


@given(st.integers(1, CAPACITY), st.integers(1, CAPACITY), st.integers(0, CAPACITY))
def test_a_bound_of_the_context_is_one_of_a_window_too(
    length: int, window: int, excess: int
) -> None:
    """Cut to the window's blocks, it lies behind the last visible key."""
    _, hidden = visible_keys(make_batch([length]), BLOCK_SIZE, window)
    seen = torch.nonzero(~hidden.flatten()).flatten()
    assert int(seen[-1]) < min(length + excess, hidden.shape[-1])
