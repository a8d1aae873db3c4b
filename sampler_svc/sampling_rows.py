"""The sampling parameters of all rows as columns, and what one set of rows needs of them.

Lives on the host; `SamplingBatch` carries to the device what does not change while the rows stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.bad_words import BadWordRows, BadWords, split_bad_words
from sampler_svc.noise import seed_bits
from sampler_svc.penalties import PenaltyRows
from sampler_svc.uploads import Upload
from stages.columns import FloatArray, Int32Array, f32, i32
from stages.messages import NewRow, SamplingParams

NO_SLOT = -1
_GREEDY_BELOW = 1e-5  # a smaller temperature overflows the logits and changes nothing

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class ChoiceColumns:
    """How the token of each row of a batch is chosen from its edited logits: host columns [m].

    temperatures: float32, 0 for a greedy row; min_p: float32, 0 for none; top_k: int64, 0 for
    none; top_p: float64, 1 for none; is_seeded: bool, the client gave the seed.
    """

    temperatures: NDArray[np.float32]
    min_p: NDArray[np.float32]
    top_k: Int64Array
    top_p: NDArray[np.float64]
    is_seeded: NDArray[np.bool_]
    is_greedy: bool


@dataclass(frozen=True)
class TokenBias:
    """Logit biases of a batch as parallel columns: index (place in the batch), id, value."""

    index: Tensor
    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class MinTokens:
    """Stop tokens that must not come yet, as parallel host columns [n].

    `ids[i]` is banned from `rows[i]`, at place `index[i]` of the batch, until it has `until[i]`
    outputs.
    """

    index: Int64Array
    rows: Int64Array
    ids: Int64Array
    until: Int64Array


@dataclass(frozen=True)
class SamplingBatch:
    """What sampling one set of rows needs; None where no row has the feature.

    with_logprobs: places of rows that want log-probabilities; num_top: how many alternatives.
    """

    rows: Int32Array
    columns: ChoiceColumns
    penalties: PenaltyRows | None
    bias: TokenBias | None
    min_tokens: MinTokens | None
    bad_words: BadWords | None
    with_logprobs: Int64Array
    num_top: Int32Array


class SamplingRows:
    """Struct-of-arrays over rows; a row's entries are those of the request admitted last."""

    def __init__(self, max_num_rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.seeds = np.zeros(max_num_rows, dtype=np.uint64)
        self._is_seeded = np.zeros(max_num_rows, dtype=np.bool_)
        self.num_output = np.zeros(max_num_rows, dtype=np.int64)
        self.penalty_slots = np.full(max_num_rows, NO_SLOT, dtype=np.int64)
        self._temperature = np.zeros(max_num_rows, dtype=np.float32)
        self._min_p = np.zeros(max_num_rows, dtype=np.float32)
        self._top_k = np.zeros(max_num_rows, dtype=np.int64)
        self._top_p = np.ones(max_num_rows, dtype=np.float64)
        self._penalties = np.zeros((max_num_rows, 3), dtype=np.float32)
        self._num_logprobs = np.full(max_num_rows, -1, dtype=np.int32)
        self._min_tokens = np.zeros(max_num_rows, dtype=np.int64)
        self._banned_ids: dict[int, Int32Array] = {}
        self._bias: dict[int, tuple[Int32Array, FloatArray]] = {}
        self.bad_words = BadWordRows(max_num_rows)

    def admit(self, new_row: NewRow) -> None:
        """Fill a row's entries; its penalty slot stays as it is."""
        row, params = new_row.row, new_row.params
        self.seeds[row] = seed_bits(params.seed)
        self._is_seeded[row] = not params.is_seed_drawn
        self.num_output[row] = len(new_row.token_ids) // 4 - new_row.num_prompt_tokens
        is_greedy = params.temperature < _GREEDY_BELOW
        self._temperature[row] = 0.0 if is_greedy else params.temperature
        self._min_p[row] = params.min_p
        self._top_k[row] = params.top_k if 0 < params.top_k < self._vocab_size else 0
        self._top_p[row] = params.top_p
        self._penalties[row] = _penalties(params)
        self._num_logprobs[row] = min(params.logprobs, self._vocab_size)
        self._min_tokens[row] = params.min_tokens
        single_ids, words = split_bad_words(params)
        self._admit_id_columns(row, params, single_ids)
        known_words = [word for word in words if self._is_known(word).all()]
        self.bad_words.admit(row, known_words, i32(new_row.token_ids)[new_row.num_prompt_tokens :])

    def _admit_id_columns(self, row: int, params: SamplingParams, bad_ids: Int32Array) -> None:
        self._banned_ids.pop(row, None)
        self._bias.pop(row, None)
        if params.min_tokens and params.stop_token_ids:
            ids = i32(params.stop_token_ids)
            self._banned_ids[row] = ids[self._is_known(ids)]
        if params.logit_bias_ids or len(bad_ids):
            ids = np.concatenate([i32(params.logit_bias_ids), bad_ids])
            never = np.full(len(bad_ids), -np.inf, dtype=np.float32)
            values = np.concatenate([f32(params.logit_bias_values), never])
            is_known = self._is_known(ids)
            self._bias[row] = (ids[is_known], values[is_known])

    def _is_known(self, ids: Int32Array) -> NDArray[np.bool_]:
        """An id that the model does not have must fail nobody: it is left out."""
        return (ids >= 0) & (ids < self._vocab_size)

    # ── what a set of rows needs ─────────────────────────────────────────────────────────────

    def batch(self, rows: Int32Array, upload: Upload) -> SamplingBatch:
        """Gather what the rows int32 [m] need; `upload` makes the tensors."""
        with_logprobs = np.flatnonzero(self._num_logprobs[rows] >= 0)
        return SamplingBatch(
            rows=rows.copy(),
            columns=self._choice_columns(rows),
            penalties=self._penalty_rows(rows, upload),
            bias=self._token_bias(rows, upload),
            min_tokens=self._min_tokens_of(rows),
            bad_words=self.bad_words.batch(rows),
            with_logprobs=with_logprobs,
            num_top=self._num_logprobs[rows[with_logprobs]],
        )

    def _choice_columns(self, rows: Int32Array) -> ChoiceColumns:
        temperatures = self._temperature[rows]
        return ChoiceColumns(
            temperatures=temperatures,
            min_p=self._min_p[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            is_seeded=self._is_seeded[rows],
            is_greedy=not temperatures.any(),
        )

    def _penalty_rows(self, rows: Int32Array, upload: Upload) -> PenaltyRows | None:
        index = np.flatnonzero(self.penalty_slots[rows] != NO_SLOT)
        if not len(index):
            return None
        repetition, frequency, presence = self._penalties[rows[index]].T
        return PenaltyRows(
            index=upload(index),
            slots=self.penalty_slots[rows[index]],
            repetition=upload(repetition)[:, None],
            frequency=upload(frequency)[:, None],
            presence=upload(presence)[:, None],
        )

    def _token_bias(self, rows: Int32Array, upload: Upload) -> TokenBias | None:
        entries = [
            (i, *self._bias[row]) for i, row in enumerate(rows.tolist()) if row in self._bias
        ]
        if not entries:
            return None
        return TokenBias(
            index=upload(np.concatenate([np.full(len(ids), i) for i, ids, _ in entries])),
            ids=upload(np.concatenate([ids for _, ids, _ in entries]).astype(np.int64)),
            values=upload(np.concatenate([values for _, _, values in entries])),
        )

    def _min_tokens_of(self, rows: Int32Array) -> MinTokens | None:
        is_young = self.num_output[rows] < self._min_tokens[rows]
        places = [i for i in np.flatnonzero(is_young).tolist() if int(rows[i]) in self._banned_ids]
        if not places:
            return None
        ids = [self._banned_ids[int(rows[i])] for i in places]
        index = np.repeat(np.array(places, dtype=np.int64), [len(column) for column in ids])
        return MinTokens(
            index=index,
            rows=rows[index].astype(np.int64),
            ids=np.concatenate(ids).astype(np.int64),
            until=self._min_tokens[rows[index]],
        )


def uses_penalties(params: SamplingParams) -> bool:
    """Whether a request needs token counts."""
    return _penalties(params) != (1.0, 0.0, 0.0)


def _penalties(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.frequency_penalty, params.presence_penalty
