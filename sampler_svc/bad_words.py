"""Words that must not be generated: which token would complete one, by a row's last outputs.

Lives on the host, and is told a row's tokens by whoever has them there before the row's next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.columns import Int32Array, i32
from stages.messages import SamplingParams

_NO_TOKEN = -1  # in the place of an output that is not there; no prefix has it

Int64Array = NDArray[np.int64]


class Ban(NamedTuple):
    """Tokens that must not come, parallel int64 [n]: of the rows at these places of a batch."""

    places: Int64Array
    ids: Int64Array


@dataclass(frozen=True)
class BadWords:
    """The words of a batch: host columns.

    Word i [n] forbids `ban.ids[i]` at `ban.places[i]` where the outputs of its row end in its
    prefix: the entries from `starts[i]` on of the parallel columns [k] `prefix_ids`,
    `prefix_rows` and `prefix_columns`, the last being -1 for a prefix's last token.
    """

    ban: Ban
    starts: Int64Array
    prefix_ids: Int32Array
    prefix_rows: Int32Array
    prefix_columns: Int64Array


class _RowWords(NamedTuple):
    """The words of one row, columns as in `BadWords`; prefix_lens: int64 [n]."""

    last_ids: Int64Array
    prefix_lens: Int64Array
    prefix_ids: Int32Array
    prefix_columns: Int64Array


class BadWordRows:
    """The words of several tokens and the last outputs of the rows that have any.

    Invariant: for such a row `_recent[row]` ends in its outputs, as many as its longest prefix
    has; `_NO_TOKEN` stands before its first. As in vLLM, the prompt does not count.
    """

    def __init__(self, max_num_rows: int) -> None:
        self._words: dict[int, _RowWords] = {}
        self._is_watched = np.zeros(max_num_rows, dtype=np.bool_)
        self._recent = np.full((max_num_rows, 1), _NO_TOKEN, dtype=np.int32)

    def admit(self, row: int, words: list[Int32Array], outputs: Int32Array) -> None:
        """Give a row its words, each of two tokens or more, and its outputs so far."""
        self.release(np.array([row], dtype=np.int32))
        if not words:
            return
        own = self._words[row] = _columns_of(words)
        self._widen(int(own.prefix_lens.max()))
        self._is_watched[row] = True
        width = self._recent.shape[1]
        last = outputs[-width:]
        self._recent[row] = _NO_TOKEN
        self._recent[row, width - len(last) :] = last

    def release(self, rows: Int32Array) -> None:
        """Forget the words of these rows."""
        if self._words:
            for row in rows[self._is_watched[rows]].tolist():
                del self._words[row]
            self._is_watched[rows] = False

    def note(self, rows: Int32Array, token_ids: Int32Array) -> None:
        """Append one output to each row: int32 [m] both, no row twice."""
        if not self._words:  # most steps
            return
        is_watched = self._is_watched[rows]
        rows, token_ids = rows[is_watched], token_ids[is_watched]
        self._recent[rows] = np.column_stack([self._recent[rows, 1:], token_ids])

    def batch(self, rows: Int32Array) -> BadWords | None:
        """Gather the words of the rows int32 [m]; None if they have none."""
        if not self._words:
            return None
        places = np.flatnonzero(self._is_watched[rows])
        if not len(places):
            return None
        words = [self._words[row] for row in rows[places].tolist()]
        last_ids, prefix_lens, prefix_ids, prefix_columns = map(
            np.concatenate, zip(*words, strict=True)
        )
        word_places = np.repeat(places, [len(own.last_ids) for own in words])
        return BadWords(
            ban=Ban(word_places, last_ids),
            starts=np.cumsum(prefix_lens) - prefix_lens,
            prefix_ids=prefix_ids,
            prefix_rows=np.repeat(rows[word_places], prefix_lens),
            prefix_columns=prefix_columns,
        )

    def ban(self, words: BadWords) -> Ban:
        """What the words forbid now."""
        recent = self._recent[words.prefix_rows, words.prefix_columns]
        is_banned = np.logical_and.reduceat(recent == words.prefix_ids, words.starts)
        return Ban(words.ban.places[is_banned], words.ban.ids[is_banned])

    def _widen(self, width: int) -> None:
        missing = width - self._recent.shape[1]
        if missing > 0:
            pads = ((0, 0), (missing, 0))
            self._recent = np.pad(self._recent, pads, constant_values=_NO_TOKEN)


def split_bad_words(params: SamplingParams) -> tuple[Int32Array, list[Int32Array]]:
    """The words of a single token, int32 [n], and those of several, int32 [2 or more] each."""
    if not params.bad_word_lens:
        return np.zeros(0, dtype=np.int32), []
    ids, lens = i32(params.bad_word_ids), i32(params.bad_word_lens)
    words = np.split(ids, np.cumsum(lens)[:-1])
    return ids[np.repeat(lens == 1, lens)], [word for word in words if len(word) > 1]


def _columns_of(words: list[Int32Array]) -> _RowWords:
    lens = [len(word) - 1 for word in words]
    return _RowWords(
        last_ids=np.array([word[-1] for word in words], dtype=np.int64),
        prefix_lens=np.array(lens, dtype=np.int64),
        prefix_ids=np.concatenate([word[:-1] for word in words]),
        prefix_columns=np.concatenate([np.arange(-length, 0) for length in lens]),
    )
