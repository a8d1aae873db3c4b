"""The blocks of the paged KV cache: who is free, who is used, in which order the free are taken.

Knows block ids and reference counts; it must not know requests or tokens.
"""

from __future__ import annotations

import numpy as np

from stages.columns import Int32Array

_NOT_QUEUED = -1


class FreeQueue:
    """First-in first-out queue of block ids, any of which may also leave from the middle.

    Invariant: the entry at index i is valid if and only if `_position[entry] == i`; a block that
    leaves from the middle only loses its position. So every operation is vectorized, and
    compaction (once a capacity of twice the number of blocks is used up) is amortized O(1).
    """

    def __init__(self, num_blocks: int) -> None:
        self._entries = np.zeros(2 * num_blocks, dtype=np.int32)
        self._position = np.full(num_blocks, _NOT_QUEUED, dtype=np.int64)
        self._head = 0
        self._tail = 0
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def push(self, block_ids: Int32Array) -> None:
        """Append distinct blocks that are not queued, in order."""
        if self._tail + len(block_ids) > len(self._entries):
            self._compact()
        self._write(block_ids)
        self._len += len(block_ids)

    def pop(self, count: int) -> Int32Array:
        """Take the `count` oldest blocks: int32 [count]."""
        assert count <= self._len, "more blocks than there are"
        taken = [np.zeros(0, dtype=np.int32)]
        missing = count
        while missing:
            end = min(self._head + missing, self._tail)
            entries = self._valid_entries(self._head, end)
            self._head = end
            missing -= len(entries)
            taken.append(entries)
        block_ids = np.concatenate(taken)
        self.remove(block_ids)
        return block_ids

    def remove(self, block_ids: Int32Array) -> None:
        """Let queued blocks leave, wherever they stand."""
        self._position[block_ids] = _NOT_QUEUED
        self._len -= len(block_ids)

    def _valid_entries(self, start: int, end: int) -> Int32Array:
        entries = self._entries[start:end]
        is_valid = self._position[entries] == np.arange(start, end)
        return entries.compress(is_valid)

    def _compact(self) -> None:
        entries = self._valid_entries(self._head, self._tail)
        self._head = self._tail = 0
        self._write(entries)

    def _write(self, block_ids: Int32Array) -> None:
        end = self._tail + len(block_ids)
        self._entries[self._tail : end] = block_ids
        self._position[block_ids] = np.arange(self._tail, end)
        self._tail = end


class BlockPool:
    """Reference-counted blocks.

    Invariant: `num_free + num_used == num_blocks - 1` (block 0, the null block, is never given
    out); a block is queued if and only if nobody holds it; no reference count is negative.
    A freed block keeps its content until it is taken: blank blocks go first, then cached ones,
    the least recently freed first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_refs = np.zeros(num_blocks, dtype=np.int32)
        self.is_cached = np.zeros(num_blocks, dtype=np.bool_)
        self._blank = FreeQueue(num_blocks)
        self._cached = FreeQueue(num_blocks)
        self._blank.push(np.arange(1, num_blocks, dtype=np.int32))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - 1 - self.num_free

    def take(self, count: int) -> Int32Array:
        """Give `count` blocks to a first holder; what they held is forgotten. int32 [count]."""
        num_blank = min(count, len(self._blank))
        block_ids = np.concatenate(
            [self._blank.pop(num_blank), self._cached.pop(count - num_blank)]
        )
        self.is_cached[block_ids] = False
        self.num_refs[block_ids] = 1
        return block_ids

    def share(self, block_ids: Int32Array) -> None:
        """Add one holder to each of these distinct cached blocks, free or used."""
        assert self.is_cached[block_ids].all(), "only cached blocks are shared"
        self._cached.remove(block_ids[self.num_refs[block_ids] == 0])
        self.num_refs[block_ids] += 1

    def release(self, block_ids: Int32Array) -> None:
        """Drop one holder of each of these distinct blocks; the first freed is taken first."""
        assert (self.num_refs[block_ids] > 0).all(), "released more often than held"
        self.num_refs[block_ids] -= 1
        self._push_free(block_ids[self.num_refs[block_ids] == 0])

    def release_all(self) -> None:
        """Drop every holder of every block; what is cached stays so."""
        used = np.flatnonzero(self.num_refs).astype(np.int32)
        self.num_refs[used] = 0
        self._push_free(used)

    def count_free(self, block_ids: Int32Array) -> int:
        """How many of these blocks nobody holds."""
        return int(np.count_nonzero(self.num_refs[block_ids] == 0))

    def _push_free(self, block_ids: Int32Array) -> None:
        is_cached = self.is_cached[block_ids]
        self._blank.push(block_ids[~is_cached])
        self._cached.push(block_ids[is_cached])
