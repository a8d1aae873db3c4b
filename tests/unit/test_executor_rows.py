"""The executor's rows: a batch made by differences equals one made from scratch."""

from __future__ import annotations

from dataclasses import fields
from random import Random

import numpy as np
import pytest
import torch

from executor_svc.batch import ForwardBatch, Span
from executor_svc.rows import RowTable
from stages.columns import i32_bytes
from stages.messages import ExecuteStep, NewRow, SamplingParams, StepTokens

BLOCK_SIZE = 4
MAX_LEN = 64


def new_row(
    row: int, tokens: list[int], blocks: list[int], computed: int = 0, prompt_logprobs: int = -1
) -> NewRow:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    return NewRow(
        row, row + 100, i32_bytes(tokens), len(tokens), computed, 0, i32_bytes(blocks), params
    )


def assert_equal(batch: ForwardBatch, expected: ForwardBatch) -> None:
    for field in fields(ForwardBatch):
        got, want = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(want, torch.Tensor):
            assert got.dtype == want.dtype, field.name
            if field.name == "block_tables":  # blocks that no token reaches yet are left out
                assert got.shape[1] == -(-expected.max_seq_len // BLOCK_SIZE)
                want = want[:, : got.shape[1]]
            assert torch.equal(got, want), field.name
        else:
            assert got == want, field.name


@pytest.mark.parametrize("seed", range(20))
def test_random_plans_equal_batches_from_scratch(seed: int) -> None:
    """Rows come, grow, catch up in chunks, decode and go, as a scheduler may ask for it."""
    random = Random(seed)
    table = RowTable(8, MAX_LEN, BLOCK_SIZE)
    tokens: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    num_prompt: dict[int, int] = {}
    blocks: dict[int, list[int]] = {}
    decoding: set[int] = set()
    released: list[int] = []
    free_blocks = list(range(1, 500))
    for step_id in range(1, 40):
        news, grown = [], []
        for row in set(range(8)) - tokens.keys() - set(released):
            if random.random() < 0.3:
                tokens[row] = [random.randrange(50) for _ in range(random.randint(1, 20))]
                blocks[row] = [free_blocks.pop() for _ in range(-(-len(tokens[row]) // BLOCK_SIZE))]
                computed[row], num_prompt[row] = 0, len(tokens[row])
                news.append(new_row(row, tokens[row], list(blocks[row])))
        started = [r for r in tokens if r not in decoding and computed[r] == num_prompt[r]]
        started = [row for row in started if random.random() < 0.8]
        decoding |= set(started)
        spans: list[tuple[int, Span]] = []
        prefills: list[tuple[int, int]] = []
        for row in sorted(decoding):
            if computed[row] // BLOCK_SIZE == len(blocks[row]):
                blocks[row].append(free_blocks.pop())
                grown.append((row, blocks[row][-1]))
            spans.append((row, Span(tokens[row][computed[row] :], computed[row], blocks[row])))
        for row in sorted(tokens.keys() - decoding):
            missing = num_prompt[row] - computed[row]
            if missing and (computed[row] == 0 or random.random() < 0.7):
                length = random.randint(1, missing)
                prefills.append((row, length))
                chunk = tokens[row][computed[row] : computed[row] + length]
                spans.append((row, Span(chunk, computed[row], blocks[row])))
        if not spans:
            continue
        step = ExecuteStep(
            step_id,
            i32_bytes(released),
            news,
            i32_bytes(row for row, _ in grown),
            i32_bytes(block for _, block in grown),
            b"",
            i32_bytes(started),
            i32_bytes(row for row, _ in prefills),
            i32_bytes(length for _, length in prefills),
        )
        inputs = table.apply(step)
        sampled: list[int] = []
        for row, span in spans:
            computed[row] += len(span.token_ids)
            if computed[row] == len(tokens[row]):
                sampled.append(row)
        assert inputs.sampled_rows.tolist() == sampled
        expected = ForwardBatch.from_spans([span for _, span in spans], BLOCK_SIZE)
        is_sampled = torch.tensor([row in sampled for row, _ in spans])
        wanted = {"logits_indices": expected.logits_indices[is_sampled]}
        values = {f.name: getattr(expected, f.name) for f in fields(ForwardBatch)} | wanted
        assert_equal(inputs.batch, ForwardBatch(**values))
        next_tokens = [random.randrange(50) for _ in sampled]
        table.set_last_tokens(inputs.sampled_rows, np.array(next_tokens, dtype=np.int32))
        released = []
        for row, token in zip(sampled, next_tokens, strict=True):
            tokens[row].append(token)
            if len(tokens[row]) > 40 or random.random() < 0.05:
                released.append(row)
        for row in released:
            decoding.discard(row)
            for table_of in (tokens, computed, blocks):
                del table_of[row]


def test_prompt_logprobs_of_chunks_cover_the_prompt_once() -> None:
    table = RowTable(2, MAX_LEN, BLOCK_SIZE)
    prompt = [7, 8, 9, 10, 11]
    first = ExecuteStep(
        1,
        new_rows=[new_row(1, prompt, [3, 4], prompt_logprobs=2)],
        prefill_rows=i32_bytes([1]),
        prefill_lens=i32_bytes([3]),
    )
    inputs = table.apply(first)
    (span,) = inputs.prompt_spans
    assert (span.row, span.start, span.first_logit, span.num_top) == (1, 1, 0, 2)
    assert span.next_token_ids.tolist() == [8, 9, 10]
    assert inputs.batch.logits_indices.tolist() == [0, 1, 2]
    second = ExecuteStep(2, prefill_rows=i32_bytes([1]), prefill_lens=i32_bytes([2]))
    inputs = table.apply(second)
    (span,) = inputs.prompt_spans
    assert (span.start, span.first_logit) == (4, 1)
    assert span.next_token_ids.tolist() == [11]
    # The last position's logits are sampled from, and its successor is no prompt token.
    assert inputs.batch.logits_indices.tolist() == [1, 0]


def test_a_row_can_grow_by_several_blocks_at_once() -> None:
    table = RowTable(2, MAX_LEN, BLOCK_SIZE)
    step = ExecuteStep(
        1,
        new_rows=[new_row(0, list(range(12)), [5]), new_row(1, [1], [6])],
        block_rows=i32_bytes([0, 1, 0]),
        block_ids=i32_bytes([7, 8, 9]),
        prefill_rows=i32_bytes([0]),
        prefill_lens=i32_bytes([12]),
    )
    assert table.apply(step).batch.block_tables.tolist() == [[5, 7, 9]]


def test_tokens_of_a_rows_former_owner_are_ignored() -> None:
    """In placement `process` they may come after the row has been given away."""
    table = RowTable(2, MAX_LEN, BLOCK_SIZE)

    def prefill(step_id: int, released: list[int]) -> ExecuteStep:
        row = new_row(0, [1, 2], [3])
        lens = i32_bytes([2])
        return ExecuteStep(
            step_id, i32_bytes(released), [row], prefill_rows=i32_bytes([0]), prefill_lens=lens
        )

    def tokens(step_id: int, token: int) -> StepTokens:
        return StepTokens(step_id, i32_bytes([0]), i32_bytes([token]))

    for step_id, released in ((1, []), (2, [0])):
        table.apply(prefill(step_id, released))
        table.await_tokens(step_id, np.array([0], dtype=np.int32))
    decode = ExecuteStep(3, started_rows=i32_bytes([0]))
    table.receive_tokens(tokens(1, 40))
    assert not table.has_inputs(decode)
    table.receive_tokens(tokens(2, 41))
    assert table.has_inputs(decode)
    assert table.apply(decode).batch.token_ids.tolist() == [41]
