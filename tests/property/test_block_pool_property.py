"""The block pool against a model of plain lists, under any sequence of operations."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_svc.block_pool import BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """Holders take, share, cache and release; the model knows who must come next."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.holders: list[list[int]] = []
        self.blank = list(range(1, num_blocks))
        self.cached: list[int] = []

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        queue = self.blank + self.cached
        block_ids = self.pool.take(count).tolist()
        assert block_ids == queue[:count]
        self.blank = [b for b in self.blank if b not in block_ids]
        self.cached = [b for b in self.cached if b not in block_ids]
        self.holders.append(block_ids)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        held = sorted({b for block_ids in self.holders for b in block_ids})
        self.pool.is_cached[data.draw(st.sampled_from(held))] = True

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        cached = np.flatnonzero(self.pool.is_cached).tolist()
        block_ids = data.draw(st.lists(st.sampled_from(cached), unique=True)) if cached else []
        self.pool.share(np.array(block_ids, dtype=np.int32))
        self.cached = [b for b in self.cached if b not in block_ids]
        self.holders.append(block_ids)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_ids = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(np.array(block_ids, dtype=np.int32))
        self._free(block_ids)

    @rule()
    def release_all(self) -> None:
        held = sorted({b for block_ids in self.holders for b in block_ids})
        self.holders = []
        self.pool.release_all()
        self._free(held)

    @invariant()
    def is_consistent(self) -> None:
        num_refs = np.zeros(self.pool.num_blocks, dtype=np.int32)
        for block_ids in self.holders:
            num_refs[block_ids] += 1
        assert (self.pool.num_refs == num_refs).all()
        assert self.pool.num_free == len(self.blank) + len(self.cached)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks - 1
        assert self.pool.num_used == np.count_nonzero(num_refs)

    def _free(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            if not any(block_id in held for held in self.holders):
                queue = self.cached if self.pool.is_cached[block_id] else self.blank
                queue.append(block_id)


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
