"""Gives rows and blocks to requests and takes them back.

Owns every change of who holds what: rows, blocks and the prefix cache change together, here and
nowhere else. It decides nothing: whom to admit, pause or preempt is the scheduler's.
"""

from __future__ import annotations

import numpy as np

from scheduler_svc.block_pool import BlockPool
from scheduler_svc.counters import Counters
from scheduler_svc.prefix_cache import PrefixCache, extend_block_keys
from scheduler_svc.request import Request
from scheduler_svc.rows import PREEMPTED, RowTable
from stages.columns import Int32Array, i32_bytes
from stages.messages import NewRow


class KVCache:
    """The KV cache of one incarnation of the executor: its blocks and what they hold."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.prefix_cache = PrefixCache(self.pool)


class Allocator:
    """Invariant: a row that is not free holds one reference to each block of its block table."""

    def __init__(
        self, rows: RowTable, kv_cache: KVCache, counters: Counters, enable_prefix_caching: bool
    ) -> None:
        self._rows = rows
        self._pool = kv_cache.pool
        self._prefix_cache = kv_cache.prefix_cache
        self._block_size = kv_cache.block_size
        self._counters = counters
        self._enable_prefix_caching = enable_prefix_caching

    def admit(self, request: Request, row: int) -> NewRow | None:
        """Give a free row and the blocks of all known tokens, or None if too few are free.

        A newcomer leaves each growing row its next block, so that it is not preempted for it at
        once; a protected request takes the blocks of its whole length and never asks again.
        """
        cached = self._find_cached(request)
        num_tokens = request.max_kv_tokens if request.is_protected else len(request.token_ids)
        num_new = -(-num_tokens // self._block_size) - len(cached)
        num_free = self._pool.num_free - self._pool.count_free(cached)
        if num_new + self._rows.num_growing() > num_free:
            return None
        self._pool.share(cached)
        block_ids = np.concatenate([cached, self._pool.take(num_new)])
        num_computed = len(cached) * self._block_size
        if request.num_cached_tokens < 0:
            self._count_first_admission(request, num_computed)
        request.num_published_blocks = len(cached)
        self._rows.take(row, request, num_computed, block_ids)
        return NewRow(
            row=row,
            request_id=request.request_id,
            token_ids=i32_bytes(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=num_computed,
            num_cached_tokens=request.num_cached_tokens,
            block_ids=i32_bytes(block_ids),
            params=request.params,
        )

    def grow(self, rows: Int32Array) -> Int32Array:
        """Append one block to each row; there must be as many. Returns the blocks: int32 [n]."""
        if not len(rows):  # most steps
            return np.zeros(0, dtype=np.int32)
        block_ids = self._pool.take(len(rows))
        self._rows.append_blocks(rows, block_ids)
        return block_ids

    def publish_computed(self, row: int, num_computed: int) -> None:
        """Make the full blocks of a row's first tokens findable; their step has come back."""
        request = self._request_of(row)
        first, last = request.num_published_blocks, num_computed // self._block_size
        if self._enable_prefix_caching and last > first:
            block_ids = self._rows.block_table[row, first:last]
            self._extend_keys(request, self._rows.token_ids[row, :num_computed])
            self._prefix_cache.publish(request.block_keys[first:last], block_ids)
            request.num_published_blocks = last

    def release(self, row: int) -> Request:
        """Take row and blocks back: the one place that frees. Returns the request, rowless.

        Who holds what, and until when:

        ==============  =====================================================================
        row             the request, until here; the executor keeps a stale copy until it reads
                        `released_rows`, in the plan in which a new owner comes at the earliest
        block           each row whose table names it, one reference each, until here; then the
                        prefix cache may find it, without a reference, until the pool takes it
        steps in flight none may contain the row: the device writes to its blocks until they end
        ==============  =====================================================================
        """
        rows = self._rows
        request = self._request_of(row)
        # Outputs are hashed only now, off the hot path. Of these positions the value is known
        # and the KV is written: all steps of the row have come back.
        num_tokens = int(rows.num_prompt[row] + rows.num_output[row])
        self.publish_computed(row, min(num_tokens, int(rows.num_computed[row])))
        if rows.status[row] == PREEMPTED:
            request.token_ids = rows.token_ids[row, :num_tokens].copy()
        # The tail goes first, so it is evicted first: a prefix is worth more than what follows.
        self._pool.release(rows.block_table[row, : rows.num_blocks[row]][::-1])
        rows.free_row(row)
        return request

    def _find_cached(self, request: Request) -> Int32Array:
        """Blocks that need no computing; at least one token does, to have logits."""
        if not self._may_hit(request):
            return np.zeros(0, dtype=np.int32)
        self._extend_keys(request, request.token_ids)
        max_blocks = (len(request.token_ids) - 1) // self._block_size
        return self._prefix_cache.find(request.block_keys[:max_blocks])

    def _may_hit(self, request: Request) -> bool:
        # Logprobs of the prompt need the logits of every position.
        return self._enable_prefix_caching and request.params.prompt_logprobs < 0

    def _extend_keys(self, request: Request, token_ids: Int32Array) -> None:
        extend_block_keys(request.block_keys, token_ids, self._block_size, request.cache_salt)

    def _count_first_admission(self, request: Request, num_computed: int) -> None:
        request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
        self._counters.prompt_tokens += request.num_prompt_tokens
        if self._may_hit(request):
            self._counters.prefix_cache_queries += request.num_prompt_tokens
            self._counters.prefix_cache_hits += request.num_cached_tokens

    def _request_of(self, row: int) -> Request:
        request = self._rows.requests[row]
        assert request is not None, "a free row was asked for its request"
        return request
