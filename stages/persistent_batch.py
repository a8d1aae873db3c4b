"""The persistent batch: which row holds what, kept by applying one difference a step.

Executor and sampler each keep one and so agree on the rows of every step without asking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.columns import Int32Array, i32
from stages.messages import ExecuteStep


@dataclass(frozen=True)
class StepRows:
    """The rows of one step in the order of its ragged batch: decoding rows, then prefill rows.

    rows, num_scheduled, num_computed (before the step): int32 [n]. `sampled`: bool [n], rows whose
    known tokens are all computed by this step, so that it gives them a token.
    """

    rows: Int32Array
    num_decoding: int
    num_scheduled: Int32Array
    num_computed: Int32Array
    sampled: NDArray[np.bool_]

    @property
    def sampled_rows(self) -> Int32Array:
        """The rows that get a token, in order: int32 [m]."""
        return self.rows[self.sampled]


class PersistentBatch:
    """Struct-of-arrays state of all rows.

    Invariant: for a live row `num_computed <= num_known`, and a decoding row has exactly one
    known token that is not computed. `num_known` counts tokens whose place is known; the value
    of the newest may still be on the device.
    """

    def __init__(self, max_num_rows: int) -> None:
        self.request_ids = np.zeros(max_num_rows, dtype=np.uint64)
        self.num_known = np.zeros(max_num_rows, dtype=np.int32)
        self.num_computed = np.zeros(max_num_rows, dtype=np.int32)
        self.is_decoding = np.zeros(max_num_rows, dtype=np.bool_)
        self._ones = np.ones(max_num_rows, dtype=np.int32)

    def apply(self, step: ExecuteStep) -> StepRows:
        """Advance to `step` and return its rows."""
        self._take_and_free_rows(step)
        rows = decoding = np.flatnonzero(self.is_decoding).astype(np.int32)
        lens = self._ones[: len(decoding)]
        if step.prefill_rows:
            rows = np.concatenate([decoding, i32(step.prefill_rows)])
            lens = np.concatenate([lens, i32(step.prefill_lens)])
        num_computed = self.num_computed[rows]
        self.num_computed[rows] += lens
        sampled = self.num_computed[rows] == self.num_known[rows]
        self.num_known[rows[sampled]] += 1
        return StepRows(rows, len(decoding), lens, num_computed, sampled)

    def decoding_after(self, step: ExecuteStep) -> NDArray[np.bool_]:
        """The decoding rows as `step` leaves them, without applying it: bool [max_num_rows]."""
        is_decoding = self.is_decoding.copy()
        is_decoding[i32(step.released_rows)] = False
        is_decoding[i32(step.stopped_rows)] = False
        is_decoding[i32(step.started_rows)] = True
        return is_decoding

    def _take_and_free_rows(self, step: ExecuteStep) -> None:
        if step.released_rows:
            released = i32(step.released_rows)
            self.is_decoding[released] = False
            self.request_ids[released] = 0
        for new in step.new_rows:
            self.request_ids[new.row] = new.request_id
            self.num_known[new.row] = len(new.token_ids) // 4
            self.num_computed[new.row] = new.num_computed_tokens
            self.is_decoding[new.row] = False
        if step.stopped_rows:
            self.is_decoding[i32(step.stopped_rows)] = False
        if step.started_rows:
            self.is_decoding[i32(step.started_rows)] = True
