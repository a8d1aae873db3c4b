"""`bad_words` in the sampler: against a plain reading of the rule, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler_svc.bad_words import BadWordRows
from sampler_svc.host_sampler import HostSampler
from sampler_svc.sampling import RowSampler
from sampler_svc.sampling_rows import SamplingRows
from stages.columns import f32_bytes, i32, i32_bytes
from stages.messages import SamplingParams, StepLogits
from tests.sampling_reference import edited_logits, new_row

VOCAB = 5
NUM_ROWS = 4
PROMPT = [0, 1, 2, 3, 4, 0]

torch.set_num_threads(1)

token_ids = st.integers(0, VOCAB - 1)
# Not every token, alone: something must be left to sample.
words = st.lists(
    st.lists(token_ids, min_size=2, max_size=4) | st.just([0]) | st.just([1]), max_size=5
)


def params_of(words: Sequence[Sequence[int]], **fields: object) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        bad_word_ids=i32_bytes([token_id for word in words for token_id in word]),
        bad_word_lens=i32_bytes([len(word) for word in words]),
        **fields,  # type: ignore[arg-type]
    )


class Reference:
    """One greedy row, sampled alone by the plain rule."""

    def __init__(self, row: int, params: SamplingParams, outputs: list[int]) -> None:
        self.row, self.params, self.outputs = row, params, outputs

    def take(self, logits: torch.Tensor) -> int:
        edited = edited_logits(logits.numpy(), self.params, PROMPT, self.outputs)
        self.outputs.append(int(edited.argmax()))
        return self.outputs[-1]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_greedy_rows_follow_the_plain_rule(data: st.DataObject) -> None:
    """Rows come, go, come back with outputs, and take part in any steps."""
    sampler = RowSampler(NUM_ROWS, VOCAB, "cpu")
    rows: dict[int, Reference] = {}
    for step in range(data.draw(st.integers(1, 14))):
        for row in range(NUM_ROWS):
            if row in rows and data.draw(st.integers(0, 9)) == 0:
                sampler.release(np.array([row], dtype=np.int32))
                del rows[row]
            if row not in rows:
                outputs = data.draw(st.lists(token_ids, max_size=5))
                params = params_of(data.draw(words))
                rows[row] = Reference(row, params, outputs)
                sampler.admit(new_row(row, params, PROMPT, outputs))
        chosen = sorted(data.draw(st.sets(st.integers(0, NUM_ROWS - 1), min_size=1)))
        logits = torch.randn(
            (len(chosen), VOCAB), generator=torch.Generator().manual_seed(data.draw(token_ids))
        )
        column = np.array(chosen, dtype=np.int32)
        sampled = sampler.sample(logits, column).token_ids
        expected = [rows[row].take(logits[place]) for place, row in enumerate(chosen)]
        assert sampled.tolist() == expected, step
        sampler.note_tokens(column, sampled.numpy().astype(np.int32))


@settings(max_examples=60, deadline=None)
@given(outputs=st.lists(token_ids, max_size=6), word=st.lists(token_ids, min_size=2, max_size=4))
def test_logits_are_needed_exactly_where_a_word_would_be_completed(
    outputs: list[int], word: list[int]
) -> None:
    """All other steps may take the model's own argmax."""
    sampler = RowSampler(1, VOCAB, "cpu")
    sampler.admit(new_row(0, params_of([word]), PROMPT, outputs))
    is_near = len(outputs) >= len(word) - 1 and outputs[1 - len(word) :] == word[:-1]
    assert sampler.needs_logits(np.zeros(1, dtype=np.int32)) == is_near


def test_the_prompt_does_not_count() -> None:
    """As in vLLM, and unlike transformers' `bad_words_ids`."""
    sampler = RowSampler(1, VOCAB, "cpu")
    sampler.admit(new_row(0, params_of([[0, 3]]), PROMPT))
    logits = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0]])
    assert sampler.sample(logits, np.zeros(1, dtype=np.int32)).token_ids.tolist() == [3]


def test_a_single_token_stays_forbidden_under_the_largest_bias() -> None:
    bias = {"logit_bias_ids": i32_bytes([3]), "logit_bias_values": f32_bytes([100.0])}
    sampler = RowSampler(1, VOCAB, "cpu")
    sampler.admit(new_row(0, params_of([[3]], **bias), PROMPT))
    logits = torch.tensor([[0.0, 0.0, 1.0, 9.0, 0.0]])
    for _ in range(2):
        assert sampler.sample(logits, np.zeros(1, dtype=np.int32)).token_ids.tolist() == [2]


def test_ids_that_the_model_does_not_have_fail_nobody() -> None:
    sampler = RowSampler(1, VOCAB, "cpu")
    sampler.admit(new_row(0, params_of([[VOCAB], [1, VOCAB], [VOCAB, 1], [1, 2]]), PROMPT, [1]))
    logits = torch.tensor([[0.0, 0.0, 9.0, 1.0, 0.0]])
    assert sampler.sample(logits, np.zeros(1, dtype=np.int32)).token_ids.tolist() == [3]


def test_the_host_sampler_knows_its_own_tokens() -> None:
    sampler = HostSampler(2, VOCAB)
    sampler.admit(new_row(1, params_of([[3, 3, 2], [3, 3]]), PROMPT))
    logits = f32_bytes([0.0, 0.0, 1.0, 9.0, 0.0])
    said = [
        i32(sampler.sample(StepLogits(step, i32_bytes([1]), VOCAB, logits))[0].token_ids).tolist()
        for step in range(4)
    ]
    assert said == [[3], [2], [3], [2]]


@pytest.mark.parametrize("longest_first", [True, False])
def test_a_longer_word_widens_the_table_and_keeps_the_outputs(longest_first: bool) -> None:
    rows = BadWordRows(2)
    words = [np.array([1, 2], dtype=np.int32), np.array([3, 1, 4, 0, 2], dtype=np.int32)]
    outputs = np.array([3, 1, 4, 0], dtype=np.int32)
    order = (1, 0) if longest_first else (0, 1)
    for row in order:
        rows.admit(row, [words[row]], outputs)
    rows.note(np.array([0], dtype=np.int32), np.array([1], dtype=np.int32))
    batch = rows.batch(np.array([0, 1], dtype=np.int32))
    assert batch is not None
    ban = rows.ban(batch)
    assert (ban.places.tolist(), ban.ids.tolist()) == ([0, 1], [2, 2])


def test_rows_without_words_have_none() -> None:
    rows = BadWordRows(2)
    column = np.array([0, 1], dtype=np.int32)
    assert rows.batch(column) is None
    rows.admit(0, [np.array([1, 2], dtype=np.int32)], np.zeros(0, dtype=np.int32))
    assert rows.batch(column[1:]) is None
    rows.release(column)
    assert rows.batch(column) is None


def test_sets_of_rows_that_take_turns_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with the rows that lag and one without them: neither may loop over its rows again."""
    gathered = []
    gather = SamplingRows.batch
    monkeypatch.setattr(
        SamplingRows, "batch", lambda *a: gathered.append(a[1].tolist()) or gather(*a)
    )
    sampler = RowSampler(NUM_ROWS, VOCAB, "cpu")
    for row in range(NUM_ROWS):
        sampler.admit(new_row(row, params_of([[3, row]] if row < 2 else []), PROMPT))
    sets = [np.arange(NUM_ROWS, dtype=np.int32), np.array([2, 3], dtype=np.int32)]
    logits = torch.randn((NUM_ROWS, VOCAB), generator=torch.Generator().manual_seed(0))
    for step in range(6):
        rows = sets[step % 2]
        token_ids = sampler.sample(logits[: len(rows)], rows).token_ids
        sampler.note_tokens(rows, token_ids.numpy().astype(np.int32))
    assert gathered == [[0, 1, 2, 3], [2, 3]]
