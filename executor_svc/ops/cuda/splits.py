"""Cuts the contexts of a decode batch into splits of a fixed number of tokens, on the device.

A split begins at a multiple of `SPLIT_TOKENS`, whatever the batch: a sequence's result depends on
nothing but the sequence. No length comes from the host, so a captured graph serves all lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# A split of the 8B shape reads 128 KiB for each key/value head: enough to hide the start of a
# program, and at batch 1 a context of 4096 tokens still gives nearly all processors of an H200
# work.
SPLIT_TOKENS = 256
_COPY_TILE = 128
# Of the number of sequences only few values may compile a kernel of their own.
_MIN_ROWS = 128


@dataclass(frozen=True)
class Splits:
    """first: int32 [n + 1], each sequence's first split; rows: int32, each split's sequence."""

    first: Tensor
    rows: Tensor


@triton.jit(do_not_specialize=["num_rows"])
def _split_kernel(
    seq_lens: tl.tensor,
    first: tl.tensor,
    split_rows: tl.tensor,
    num_rows: tl.tensor,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program a sequence; each counts the splits in front of its own."""
    row = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    lengths = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    counts = (lengths + SPLIT - 1) // SPLIT
    start = tl.sum(tl.where(rows < row, counts, 0))
    end = start + tl.sum(tl.where(rows == row, counts, 0))
    tl.store(first + row, start)
    if row == num_rows - 1:
        tl.store(first + num_rows, end)
    for index in range(start, end, TILE):
        place = index + tl.arange(0, TILE)
        tl.store(split_rows + place, tl.zeros((TILE,), tl.int32) + row, mask=place < end)


def plan_splits(seq_lens: Tensor, max_seq_len: int) -> Splits:
    """seq_lens: int32 [n], n > 0, none above `max_seq_len`."""
    num_rows = len(seq_lens)
    max_splits = num_rows * triton.cdiv(max_seq_len, SPLIT_TOKENS)
    splits = Splits(seq_lens.new_empty(num_rows + 1), seq_lens.new_empty(max_splits))
    _split_kernel[(num_rows,)](
        seq_lens,
        splits.first,
        splits.rows,
        num_rows,
        SPLIT=SPLIT_TOKENS,
        ROWS=max(triton.next_power_of_2(num_rows), _MIN_ROWS),
        TILE=_COPY_TILE,
    )
    return splits
