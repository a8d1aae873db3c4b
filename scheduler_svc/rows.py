"""What the running requests are, as struct-of-arrays over rows.

Owns the columns and the questions one may ask of all rows at once; resources (blocks, the prefix
cache) and decisions (whom to plan, whom to preempt) are elsewhere.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.lag import LagReason
from scheduler_svc.request import NO_ROW, Request
from stages.columns import Int32Array
from stages.finish import NO_TOKEN, finish_reasons

# Status of a row; PREEMPTED and FINISHED rows are only marked and wait for their release. Plain
# integers, since looking up a member of an enum costs as much as comparing a whole column.
FREE: Final = 0
RUNNING: Final = 1
PREEMPTED: Final = 2
FINISHED: Final = 3


class RowTable:
    """All rows, one column per fact, int32 [num_rows] where nothing else is said.

    num_known: tokens whose place is known, those in flight included; num_computed: tokens with
    KV, those in flight included; num_output: outputs that have come back. last_step: id of the
    last step sent that contains the row. is_decoding: what the executor was told. lag_reason:
    int8 `LagReason`; num_lagging: how many rows have one. Invariant: a
    running row is either in prefill (all tokens known by value) or has
    `num_known == num_computed + 1`, the newest token being on the device.
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        self.requests: list[Request | None] = [None] * num_rows
        self.request_ids = np.zeros(num_rows, dtype=np.uint64)
        self.status = np.zeros(num_rows, dtype=np.int8)
        self.priority = np.zeros(num_rows, dtype=np.int64)
        self.arrival = np.zeros(num_rows, dtype=np.int64)
        self.last_step = np.zeros(num_rows, dtype=np.int64)
        self.is_protected = np.zeros(num_rows, dtype=np.bool_)
        self.is_prefilling = np.zeros(num_rows, dtype=np.bool_)
        self.is_decoding = np.zeros(num_rows, dtype=np.bool_)
        self.lag_reason = np.zeros(num_rows, dtype=np.int8)
        self.num_lagging = 0
        self.num_prompt = np.zeros(num_rows, dtype=np.int32)
        self.num_known = np.zeros(num_rows, dtype=np.int32)
        self.num_computed = np.zeros(num_rows, dtype=np.int32)
        self.num_output = np.zeros(num_rows, dtype=np.int32)
        self.max_tokens = np.zeros(num_rows, dtype=np.int32)
        self.num_blocks = np.zeros(num_rows, dtype=np.int32)
        self.max_blocks = np.zeros(num_rows, dtype=np.int32)
        self.stop_token_ids = np.full((num_rows, 1), NO_TOKEN, dtype=np.int32)
        # Zeroed memory is committed when it is first written, so long contexts cost nothing yet.
        self.token_ids = np.zeros((num_rows, max_model_len), dtype=np.int32)
        self.block_table = np.zeros((num_rows, -(-max_model_len // block_size)), dtype=np.int32)

    # ── questions ────────────────────────────────────────────────────────────────────────────

    def first_free(self) -> int:
        """The lowest row that nobody has, or `NO_ROW`."""
        free = np.flatnonzero(self.status == FREE)
        return int(free[0]) if len(free) else NO_ROW

    def decodable(self) -> Int32Array:
        """Rows that may be given one more token, ascending.

        Not those whose last is surely in flight, nor lagging rows that have any in flight.
        """
        wants_token = (self.status == RUNNING) & ~self.is_prefilling & ~self._has_all_planned()
        if self.num_lagging:
            wants_token &= ~(self.lag_reason.astype(np.bool_) & self._awaits_token())
        return _indices(wants_token)

    def prefilling(self) -> Int32Array:
        """Rows that have known tokens to catch up with, ascending."""
        return _indices((self.status == RUNNING) & self.is_prefilling)

    def ended_by(self, step_id: int) -> Int32Array:
        """Marked rows that no step after `step_id` contains, ascending."""
        is_marked = (self.status == FINISHED) | (self.status == PREEMPTED)
        return _indices(is_marked & (self.last_step <= step_id))

    def preemptible(self) -> Int32Array:
        """Running rows that may be victims; those about to end give their blocks anyway."""
        return _indices((self.status == RUNNING) & ~self.is_protected & ~self._has_all_planned())

    def awaits_token(self, rows: Int32Array) -> NDArray[np.bool_]:
        """Which of these rows have a token in flight: bool [n]."""
        return self._awaits_token()[rows]

    def is_full(self, rows: Int32Array) -> NDArray[np.bool_]:
        """Which of these rows have no slot for their next token: bool [n]."""
        num_slots = self.num_blocks[rows] * self._block_size
        is_full: NDArray[np.bool_] = self.num_computed[rows] == num_slots
        return is_full

    def num_blocks_leaving(self) -> int:
        """Blocks of rows that go as soon as their steps in flight have come back."""
        is_leaving = (self.status != RUNNING) | self._has_all_planned()
        return int(self.num_blocks[is_leaving].sum())

    def num_growing(self) -> int:
        """Running rows that may still want blocks."""
        is_running = self.status == RUNNING
        return int(np.count_nonzero(is_running & (self.num_blocks < self.max_blocks)))

    def num_running(self) -> int:
        """Running rows."""
        return int(np.count_nonzero(self.status == RUNNING))

    def _awaits_token(self) -> NDArray[np.bool_]:
        awaits: NDArray[np.bool_] = self.num_known - self.num_prompt > self.num_output
        return awaits

    def _has_all_planned(self) -> NDArray[np.bool_]:
        return self.num_known - self.num_prompt >= self.max_tokens

    # ── changes ──────────────────────────────────────────────────────────────────────────────

    def take(self, row: int, request: Request, num_computed: int, block_ids: Int32Array) -> None:
        """Give a free row to a request whose first `num_computed` tokens have KV in `block_ids`."""
        num_known = len(request.token_ids)
        request.row = row
        self.requests[row] = request
        self.request_ids[row] = request.request_id
        self.status[row] = RUNNING
        self.priority[row] = request.priority
        self.arrival[row] = request.arrival
        self.is_protected[row] = request.is_protected
        self.is_prefilling[row] = True
        self._set_lag_reason(row, request.lag_reason)
        self.num_prompt[row] = request.num_prompt_tokens
        self.num_known[row] = num_known
        self.num_computed[row] = num_computed
        self.num_output[row] = request.num_output_tokens
        self.max_tokens[row] = request.params.max_tokens
        self.num_blocks[row] = len(block_ids)
        self.max_blocks[row] = -(-request.max_kv_tokens // self._block_size)
        self.block_table[row, : len(block_ids)] = block_ids
        self.token_ids[row, :num_known] = request.token_ids
        self._set_stop_token_ids(row, request.stop_token_ids)

    def free_row(self, row: int) -> None:
        """Make a row free; its request goes on without it."""
        request = self.requests[row]
        assert request is not None
        request.row = NO_ROW
        self.requests[row] = None
        self.status[row] = FREE
        self.is_decoding[row] = False  # the executor learns it from `released_rows`
        self.num_blocks[row] = 0
        self._set_lag_reason(row, LagReason.NONE)

    def append_blocks(self, rows: Int32Array, block_ids: Int32Array) -> None:
        """Append one block to the block table of each row."""
        self.block_table[rows, self.num_blocks[rows]] = block_ids
        self.num_blocks[rows] += 1

    def advance(
        self, step_id: int, decoding: Int32Array, prefill_rows: Int32Array, prefill_lens: Int32Array
    ) -> Int32Array:
        """Count a step as sent; return its sampled rows, in the order of its batch."""
        self.num_computed[decoding] += 1
        self.num_computed[prefill_rows] += prefill_lens
        caught_up = prefill_rows[self.num_computed[prefill_rows] == self.num_known[prefill_rows]]
        self.is_prefilling[caught_up] = False
        sampled = np.concatenate([decoding, caught_up])
        self.num_known[sampled] += 1
        self.last_step[decoding] = step_id
        self.last_step[prefill_rows] = step_id
        return sampled

    def append_tokens(self, rows: Int32Array, token_ids: Int32Array) -> int:
        """Append the token that came back for each row [n]; mark rows that it ends as finished.

        Rows that have finished take none. Returns how many tokens were taken.
        """
        status = self.status[rows]
        is_open = (status == RUNNING) | (status == PREEMPTED)
        rows, token_ids = rows[is_open], token_ids[is_open]
        num_output = self.num_output[rows]
        self.token_ids[rows, self.num_prompt[rows] + num_output] = token_ids
        num_output += 1
        self.num_output[rows] = num_output
        reasons = finish_reasons(
            token_ids, num_output, self.max_tokens[rows], self.stop_token_ids[rows]
        )
        self.status[rows[reasons != 0]] = FINISHED
        return len(rows)

    def _set_lag_reason(self, row: int, reason: LagReason) -> None:
        self.num_lagging += bool(reason) - bool(self.lag_reason[row])
        self.lag_reason[row] = reason

    def _set_stop_token_ids(self, row: int, stop_token_ids: Int32Array) -> None:
        missing = len(stop_token_ids) - self.stop_token_ids.shape[1]
        if missing > 0:
            self.stop_token_ids = np.pad(
                self.stop_token_ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN
            )
        self.stop_token_ids[row] = NO_TOKEN
        self.stop_token_ids[row, : len(stop_token_ids)] = stop_token_ids


def _indices(mask: NDArray[np.bool_]) -> Int32Array:
    return np.flatnonzero(mask).astype(np.int32)
