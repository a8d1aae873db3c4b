"""The executor's row tables: what each row holds, and a step's ragged batch made from them.

Struct of arrays, advanced by differences; a steady decode step loops over no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_svc.batch import ForwardBatch
from sampler_svc.sampling import LogprobColumns
from stages.columns import Int32Array, f32_bytes, i32, i32_bytes
from stages.messages import ExecuteStep, NewRow, StepPromptLogprobs, StepTokens
from stages.persistent_batch import PersistentBatch, StepRows

# A row that wants no prompt log-probabilities.
NO_PROMPT_LOGPROBS = -1
# A row that awaits no token.
NO_STEP = 0


@dataclass(frozen=True)
class PromptSpan:
    """Prompt tokens of one row whose log-probabilities a step gives.

    `start`: position of the first of them; `next_token_ids` int32 [n] are the tokens themselves.
    Their logits are rows `first_logit .. first_logit + n` of the step's logits.
    """

    row: int
    start: int
    first_logit: int
    next_token_ids: Int32Array
    num_top: int

    def to_message(self, step_id: int, columns: LogprobColumns) -> StepPromptLogprobs:
        """Pack what `columns`, in host memory, says of these tokens."""
        return StepPromptLogprobs(
            step_id=step_id,
            row=self.row,
            start=self.start,
            logprobs=f32_bytes(columns.logprobs.numpy()),
            ranks=i32_bytes(columns.ranks.numpy()),
            num_top=columns.top_ids.shape[1],
            top_ids=i32_bytes(columns.top_ids.numpy().ravel()),
            top_logprobs=f32_bytes(columns.top_logprobs.numpy().ravel()),
        )


@dataclass(frozen=True)
class StepInputs:
    """What one forward pass takes, and what its logits are for.

    The first `len(sampled_rows)` rows of the logits are sampled from; the rest belong to
    `prompt_spans`.
    """

    batch: ForwardBatch
    sampled_rows: Int32Array
    prompt_spans: list[PromptSpan]


class TableChanges(NamedTuple):
    """Block table entries that a step has set: flat places int64 [k], block ids int32 [k]."""

    places: NDArray[np.int64]
    block_ids: Int32Array


NO_CHANGES = TableChanges(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32))


class RowTable:
    """Invariant: row r's first `num_blocks[r]` block table entries are its blocks, the rest 0."""

    def __init__(self, max_num_rows: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self._block_size = block_size
        self._rows = PersistentBatch(max_num_rows)
        self._block_tables = np.zeros((max_num_rows, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_rows, dtype=np.int32)
        # Zeroed pages cost nothing until a long prompt touches them.
        self._token_ids = np.zeros((max_num_rows, max_model_len), dtype=np.int32)
        self._num_prompt_tokens = np.zeros(max_num_rows, dtype=np.int32)
        self._num_prompt_logprobs = np.full(max_num_rows, NO_PROMPT_LOGPROBS, dtype=np.int32)
        self._last_token_ids = np.zeros(max_num_rows, dtype=np.int32)
        self._awaited_step = np.zeros(max_num_rows, dtype=np.int64)
        self._counting = np.arange(max_num_rows + 1, dtype=np.int32)

    def apply(self, step: ExecuteStep) -> StepInputs:
        """Advance to `step` and lay out its batch."""
        rows, _ = self.advance(step)
        return self.inputs(rows)

    def advance(self, step: ExecuteStep) -> tuple[StepRows, TableChanges]:
        """Advance to `step`; also gives what it sets in the tables, for a copy of them."""
        if step.released_rows:
            self._release(i32(step.released_rows))
        if not (step.new_rows or step.block_rows):
            return self._rows.apply(step), NO_CHANGES
        places = [self._admit(new) for new in step.new_rows]
        places.append(self._append_blocks(i32(step.block_rows), i32(step.block_ids)))
        all_places = np.concatenate(places)
        changes = TableChanges(all_places, self._block_tables.reshape(-1)[all_places])
        return self._rows.apply(step), changes

    def has_inputs(self, step: ExecuteStep) -> bool:
        """Whether the token that each decoding row of `step` starts from has come."""
        return not self._awaited_step[self._rows.decoding_after(step)].any()

    def await_tokens(self, step_id: int, rows: Int32Array) -> None:
        """Note that these rows' tokens of a step are being sampled elsewhere."""
        self._awaited_step[rows] = step_id

    def receive_tokens(self, message: StepTokens) -> None:
        """Take tokens that were sampled elsewhere; those of a row's former owner are ignored."""
        rows, token_ids = i32(message.rows), i32(message.token_ids)
        is_awaited = self._awaited_step[rows] == message.step_id
        self.set_last_tokens(rows[is_awaited], token_ids[is_awaited])
        self._awaited_step[rows[is_awaited]] = NO_STEP

    def set_last_tokens(self, rows: Int32Array, token_ids: Int32Array) -> None:
        """Note the sampled tokens: the next decode step of these rows starts from them."""
        self._last_token_ids[rows] = token_ids

    def _release(self, rows: Int32Array) -> None:
        self._block_tables[rows] = 0
        self._num_blocks[rows] = 0
        self._num_prompt_logprobs[rows] = NO_PROMPT_LOGPROBS
        self._awaited_step[rows] = NO_STEP

    def last_token_ids(self, rows: Int32Array) -> Int32Array:
        """The token that the next decode step of each row starts from: int32 [n]."""
        return self._last_token_ids[rows]

    def _admit(self, new: NewRow) -> NDArray[np.int64]:
        token_ids, block_ids = i32(new.token_ids), i32(new.block_ids)
        self._token_ids[new.row, : len(token_ids)] = token_ids
        self._num_prompt_tokens[new.row] = new.num_prompt_tokens
        self._block_tables[new.row, : len(block_ids)] = block_ids
        self._num_blocks[new.row] = len(block_ids)
        # A row that comes back after a preemption has told its prompt's already.
        is_fresh = len(token_ids) == new.num_prompt_tokens
        wanted = new.params.prompt_logprobs if is_fresh else NO_PROMPT_LOGPROBS
        self._num_prompt_logprobs[new.row] = wanted
        return new.row * self._block_tables.shape[1] + np.arange(len(block_ids))

    def _append_blocks(self, rows: Int32Array, block_ids: Int32Array) -> NDArray[np.int64]:
        """Append each block to its row's table; a row may get several, in order."""
        if len(rows) == 0:
            return np.zeros(0, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        unique, first, counts = np.unique(sorted_rows, return_index=True, return_counts=True)
        place = np.arange(len(rows)) - np.repeat(first, counts)
        places = sorted_rows * self._block_tables.shape[1] + self._num_blocks[sorted_rows] + place
        self._block_tables.reshape(-1)[places] = block_ids[order]
        self._num_blocks[unique] += counts.astype(np.int32)
        return places

    def inputs(self, rows: StepRows) -> StepInputs:
        """Lay out the batch of a step that `advance` has given, before the next is applied."""
        if rows.num_decoding == len(rows.rows):
            return self._decode_inputs(rows)
        lens = rows.num_scheduled
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        token_rows = np.repeat(rows.rows, lens)
        offsets = np.arange(starts[-1], dtype=np.int32) - np.repeat(starts[:-1], lens)
        positions = np.repeat(rows.num_computed, lens) + offsets
        sampled_at = starts[1:][rows.sampled] - 1
        spans, prompt_at = self._prompt_spans(rows, starts, len(sampled_at))
        return StepInputs(
            batch=self._batch(
                rows, starts, token_rows, positions, np.concatenate([sampled_at, *prompt_at])
            ),
            sampled_rows=rows.sampled_rows,
            prompt_spans=spans,
        )

    def _decode_inputs(self, rows: StepRows) -> StepInputs:
        """One token of each row, the one behind all that it has computed."""
        num_rows = len(rows.rows)
        starts = self._counting[: num_rows + 1]
        batch = self._batch(rows, starts, rows.rows, rows.num_computed, starts[:-1])
        return StepInputs(batch, rows.rows, [])

    def _batch(
        self,
        rows: StepRows,
        starts: Int32Array,
        token_rows: Int32Array,
        positions: Int32Array,
        logits_at: NDArray[np.integer],
    ) -> ForwardBatch:
        size = self._block_size
        blocks = self._block_tables[token_rows, positions // size].astype(np.int64)
        token_ids = self._token_ids[token_rows, positions]
        token_ids[: rows.num_decoding] = self._last_token_ids[rows.rows[: rows.num_decoding]]
        seq_lens = rows.num_computed + rows.num_scheduled
        max_seq_len = int(seq_lens.max())
        width = -(-max_seq_len // size)
        num_leading = _num_single_token_rows(rows)
        return ForwardBatch(
            token_ids=_int64(token_ids),
            positions=_int64(positions),
            slot_mapping=_int64(blocks * size + positions % size),
            query_start=torch.from_numpy(starts),
            seq_lens=torch.from_numpy(seq_lens),
            block_tables=torch.from_numpy(self._block_tables[rows.rows, :width]),
            logits_indices=_int64(logits_at),
            query_lens_host=tuple(rows.num_scheduled.tolist()),
            seq_lens_host=tuple(seq_lens.tolist()),
            max_query_len=int(rows.num_scheduled.max()),
            max_seq_len=max_seq_len,
            num_decode_rows=num_leading,
        )

    def _prompt_spans(
        self, rows: StepRows, starts: Int32Array, first_logit: int
    ) -> tuple[list[PromptSpan], list[NDArray[np.integer]]]:
        """The prompt log-probabilities that this step gives, and the tokens they come from."""
        spans: list[PromptSpan] = []
        token_indices: list[NDArray[np.integer]] = []
        for index in self._rows_with_prompt_logprobs(rows):
            row, start = int(rows.rows[index]), int(rows.num_computed[index])
            end = start + int(rows.num_scheduled[index])
            # The logits at position p are about the token at p + 1.
            last = min(end, int(self._num_prompt_tokens[row]) - 1)
            count = last - start
            if count <= 0:
                continue
            next_token_ids = self._token_ids[row, start + 1 : last + 1].copy()
            num_top = int(self._num_prompt_logprobs[row])
            spans.append(PromptSpan(row, start + 1, first_logit, next_token_ids, num_top))
            token_indices.append(np.arange(starts[index], starts[index] + count))
            first_logit += count
        return spans, token_indices

    def _rows_with_prompt_logprobs(self, rows: StepRows) -> Iterator[int]:
        wanted = self._num_prompt_logprobs[rows.rows] != NO_PROMPT_LOGPROBS
        wanted[: rows.num_decoding] = False
        return iter(np.flatnonzero(wanted).tolist())


def _num_single_token_rows(rows: StepRows) -> int:
    """How many leading rows have one token: decoding rows, and chunks of one behind them."""
    longer = np.flatnonzero(rows.num_scheduled != 1)
    return int(longer[0]) if len(longer) else len(rows.rows)


def _int64(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
