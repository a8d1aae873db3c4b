"""Continuous batching: plans steps, one ahead of the device, and learns their tokens later.

Decides who runs, waits, pauses or is preempted. It must not free anything itself (`Allocator`
does) and knows no channel, epoch or clock (`SchedulerStage` does).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.allocator import Allocator, KVCache
from scheduler_svc.counters import Counters
from scheduler_svc.lag import LagReason, lag_reason, samples_ahead
from scheduler_svc.policy import WaitingQueue, sort_by_rank
from scheduler_svc.request import NO_ROW, Request
from scheduler_svc.rows import FINISHED, PREEMPTED, RUNNING, RowTable
from stages.columns import Int32Array, i32, i32_bytes
from stages.config import ServerConfig
from stages.messages import ExecuteStep, NewRow, StepTokens


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was sent: who gets a token from it, and how far its prefills come.

    sampled_rows [n] int32, sampled_request_ids [n] uint64; prefill_rows [m] int32,
    prefill_ends [m] int32: their `num_computed` after the step.
    """

    step_id: int
    sampled_rows: Int32Array
    sampled_request_ids: NDArray[np.uint64]
    prefill_rows: Int32Array
    prefill_ends: Int32Array


@dataclass(frozen=True, slots=True)
class Prefill:
    """The prefill part of a step: rows and chunk lengths, int32 [n] each."""

    rows: Int32Array
    lens: Int32Array


class Scheduler:
    """The requests of one epoch.

    Invariant: a row and its blocks change hands only in `_retire`, when no step in flight
    contains the row. Each request catches up from `num_computed` to `num_known` tokens; there is
    no other difference between prefill and decode than who knows the tokens' values.
    """

    def __init__(
        self, config: ServerConfig, kv_cache: KVCache, counters: Counters, first_step_id: int
    ) -> None:
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_preemptions = config.max_preemptions
        self._alternates_halves = config.overlap and config.sampling_placement == "process"
        self._samples_ahead = samples_ahead(config)
        self._counters = counters
        self._pool = kv_cache.pool
        self._rows = RowTable(config.max_num_seqs, config.max_model_len, kv_cache.block_size)
        self._allocator = Allocator(self._rows, kv_cache, counters, config.enable_prefix_caching)
        self._requests: dict[int, Request] = {}
        self._waiting = WaitingQueue()
        self._released_rows: list[int] = []
        self._in_flight: deque[StepInFlight] = deque()
        self.next_step_id = first_step_id

    # ── what arrives ─────────────────────────────────────────────────────────────────────────

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    @property
    def num_in_flight(self) -> int:
        """Steps that were sent and have not come back."""
        return len(self._in_flight)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a row and go on."""
        return self._rows.num_running()

    def add(self, request: Request) -> None:
        """Let a new request wait."""
        request.is_protected = self._max_preemptions <= 0
        if self._samples_ahead:
            request.lag_reason = lag_reason(request.params)
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def end(self, request_id: int) -> bool:
        """End a request from outside; only marks it if it has a row. Says whether it was open."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        if request.row == NO_ROW:
            self._waiting.remove(request)
            del self._requests[request_id]
            return True
        was_open = bool(self._rows.status[request.row] != FINISHED)
        self._rows.status[request.row] = FINISHED
        self._retire()
        return was_open

    def apply(self, message: StepTokens) -> bool:
        """Take the tokens of the oldest step in flight; False if they are not that step's."""
        if not self._in_flight or self._in_flight[0].step_id != message.step_id:
            return False
        step = self._in_flight.popleft()
        rows = i32(message.rows)
        assert np.array_equal(rows, step.sampled_rows), "tokens of other rows than planned"
        owners = self._rows.request_ids[rows]
        assert np.array_equal(owners, step.sampled_request_ids), "a row was freed too early"
        for row, end in zip(step.prefill_rows.tolist(), step.prefill_ends.tolist(), strict=True):
            self._allocator.publish_computed(row, end)
        self._counters.generation_tokens += self._rows.append_tokens(rows, i32(message.token_ids))
        self._counters.steps += 1
        self._retire()
        return True

    # ── what follows ─────────────────────────────────────────────────────────────────────────

    def plan(self) -> ExecuteStep | None:
        """Plan the next step and count it as sent; None if there is nothing to compute."""
        decoding, grown_rows, grown_blocks = self._plan_decoding()
        budget = self._max_num_batched_tokens - len(decoding)
        running = self._plan_prefill(budget)
        new_rows, admitted = self._admit(budget - int(running.lens.sum()))
        prefill = Prefill(
            np.concatenate([running.rows, admitted.rows]),
            np.concatenate([running.lens, admitted.lens]),
        )
        if not len(decoding) and not len(prefill.rows):
            return None
        started_rows, stopped_rows = self._change_decoding(decoding)
        step = ExecuteStep(
            step_id=self._send(decoding, prefill),
            released_rows=i32_bytes(self._released_rows),
            new_rows=new_rows,
            block_rows=i32_bytes(grown_rows),
            block_ids=i32_bytes(grown_blocks),
            stopped_rows=i32_bytes(stopped_rows),
            started_rows=i32_bytes(started_rows),
            prefill_rows=i32_bytes(prefill.rows),
            prefill_lens=i32_bytes(prefill.lens),
        )
        self._released_rows = []
        return step

    def _plan_decoding(self) -> tuple[Int32Array, Int32Array, Int32Array]:
        """Choose the decoding rows, ascending, and give a block to those that want one.

        Returns the rows, and those that grow with their new blocks.
        """
        rows = self._rows
        decoding = rows.decodable()
        if self._alternates_halves:
            decoding = self._idle_half(decoding)
        if len(decoding) > self._max_num_batched_tokens:
            decoding = np.sort(self._sort(decoding)[: self._max_num_batched_tokens])
        full_rows = decoding[rows.is_full(decoding)]
        if len(full_rows) > self._pool.num_free:
            self._make_room(full_rows)
            still_running = rows.status[full_rows] == RUNNING
            full_rows = self._sort(full_rows[still_running])[: self._pool.num_free]
            decoding = decoding[rows.status[decoding] == RUNNING]
            decoding = decoding[~rows.is_full(decoding) | np.isin(decoding, full_rows)]
        return decoding, full_rows, self._allocator.grow(full_rows)

    def _idle_half(self, decoding: Int32Array) -> Int32Array:
        """Choose up to half of the rows, none with a token in flight.

        In placement `process` a row's token comes back before its next step can begin. So steps
        alternate between two halves of the batch: while the host samples one, the device runs
        the other.
        """
        half = -(-len(decoding) // 2)
        return decoding[~self._rows.awaits_token(decoding)][:half]

    def _make_room(self, full_rows: Int32Array) -> None:
        """Preempt the worst-ranked rows until each of `full_rows` can count on a block.

        A victim's blocks come back with its steps in flight; until then the rows that have none
        pause. The best-ranked row is no victim, so it goes on: when no other can be one, all
        that is missing is held by protected rows, which never ask, or by rows about to leave.
        """
        rows = self._rows
        while True:
            num_wanted = np.count_nonzero(rows.status[full_rows] == RUNNING)
            victims = self._sort(rows.preemptible())[1:]
            if num_wanted <= self._pool.num_free + rows.num_blocks_leaving() or not len(victims):
                return
            self._preempt(int(victims[-1]))
            self._retire()

    def _preempt(self, row: int) -> None:
        request = self._rows.requests[row]
        assert request is not None
        request.num_preemptions += 1
        request.is_protected = request.num_preemptions >= self._max_preemptions
        self._rows.status[row] = PREEMPTED
        self._counters.preemptions += 1

    def _plan_prefill(self, budget: int) -> Prefill:
        """Share the budget among rows in prefill, the best-ranked first."""
        prefilling = self._rows.prefilling()
        if not len(prefilling):  # most steps
            return Prefill(prefilling, prefilling)
        rows = self._sort(prefilling)
        missing = self._rows.num_known[rows] - self._rows.num_computed[rows]
        lens = np.clip(budget - (np.cumsum(missing) - missing), 0, missing).astype(np.int32)
        return Prefill(rows[lens > 0], lens[lens > 0])

    def _admit(self, budget: int) -> tuple[list[NewRow], Prefill]:
        """Admit waiting requests in order, until budget, rows or blocks do not suffice."""
        new_rows: list[NewRow] = []
        lens: list[int] = []
        while budget > 0 and (new_row := self._admit_next()) is not None:
            missing = len(new_row.token_ids) // 4 - new_row.num_computed_tokens
            new_rows.append(new_row)
            lens.append(min(budget, missing))
            budget -= lens[-1]
        taken = np.array([new_row.row for new_row in new_rows], dtype=np.int32)
        return new_rows, Prefill(taken, np.array(lens, dtype=np.int32))

    def _admit_next(self) -> NewRow | None:
        request = self._waiting.head()
        if request is None or (row := self._rows.first_free()) == NO_ROW:
            return None
        new_row = self._allocator.admit(request, row)
        if new_row is not None:
            self._waiting.remove(request)
        return new_row

    def _change_decoding(self, decoding: Int32Array) -> tuple[Int32Array, Int32Array]:
        """Make `decoding` the set that the executor decodes; return who joins and who leaves."""
        was_decoding = self._rows.is_decoding
        is_decoding = np.zeros_like(was_decoding)
        is_decoding[decoding] = True
        self._rows.is_decoding = is_decoding
        started = np.flatnonzero(is_decoding & ~was_decoding).astype(np.int32)
        stopped = np.flatnonzero(was_decoding & ~is_decoding).astype(np.int32)
        return started, stopped

    def _send(self, decoding: Int32Array, prefill: Prefill) -> int:
        """Count a step as in flight; return its id."""
        step_id = self.next_step_id
        self.next_step_id += 1
        if self._rows.num_lagging:
            reasons = self._rows.lag_reason[decoding]
            counts = np.bincount(reasons[reasons > 0], minlength=len(LagReason))
            self._counters.lagging_row_steps += counts
        sampled = self._rows.advance(step_id, decoding, prefill.rows, prefill.lens)
        self._in_flight.append(
            StepInFlight(
                step_id=step_id,
                sampled_rows=sampled,
                sampled_request_ids=self._rows.request_ids[sampled],
                prefill_rows=prefill.rows,
                prefill_ends=self._rows.num_computed[prefill.rows],
            )
        )
        return step_id

    def _retire(self) -> None:
        """Release marked rows that no step in flight contains; the preempted wait again."""
        returned = self._in_flight[0].step_id - 1 if self._in_flight else self.next_step_id - 1
        for row in self._rows.ended_by(returned).tolist():
            is_preempted = self._rows.status[row] == PREEMPTED
            request = self._allocator.release(row)
            self._released_rows.append(row)
            if is_preempted:
                self._waiting.push(request)
            else:
                del self._requests[request.request_id]

    def _sort(self, rows: Int32Array) -> Int32Array:
        return sort_by_rank(rows, self._rows.priority, self._rows.arrival)
