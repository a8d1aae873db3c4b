"""Gives log-probability columns their tokens' text and bytes; no torch, no state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sampler_svc.detokenizer import Detokenizer
from stages.columns import Int32Array, f32, i32
from stages.messages import StepLogprobs, StepPromptLogprobs, TokenLogprob, TopLogprob


def sampled_logprobs(
    record: StepLogprobs, token_of_row: dict[int, int], detokenizer: Detokenizer
) -> Iterator[tuple[int, TokenLogprob]]:
    """Yield (row, its sampled token's log-probabilities) for each row of the record.

    token_of_row: the tokens of the step; rows that are not in it are left out.
    """
    ends = np.cumsum(i32(record.num_top)).tolist()
    starts = [0, *ends[:-1]]
    top_ids, top_logprobs = i32(record.top_ids).tolist(), f32(record.top_logprobs).tolist()
    columns = zip(
        i32(record.rows).tolist(),
        f32(record.logprobs).tolist(),
        i32(record.ranks).tolist(),
        starts,
        ends,
        strict=True,
    )
    for row, logprob, rank, start, end in columns:
        if row in token_of_row:
            top = _alternatives(top_ids[start:end], top_logprobs[start:end], detokenizer)
            yield row, _token_logprob(token_of_row[row], logprob, rank, top, detokenizer)


def prompt_logprobs_of(
    record: StepPromptLogprobs, prompt_token_ids: Int32Array, detokenizer: Detokenizer
) -> list[TokenLogprob]:
    """Give the log-probabilities of prompt tokens `record.start`, ... with their texts."""
    width = record.num_top
    top_ids, top_logprobs = i32(record.top_ids).tolist(), f32(record.top_logprobs).tolist()
    logprobs, ranks = f32(record.logprobs).tolist(), i32(record.ranks).tolist()
    token_ids = prompt_token_ids[record.start : record.start + len(logprobs)].tolist()
    tokens = []
    for i, (token_id, logprob, rank) in enumerate(zip(token_ids, logprobs, ranks, strict=True)):
        span = slice(i * width, (i + 1) * width)
        top = _alternatives(top_ids[span], top_logprobs[span], detokenizer)
        tokens.append(_token_logprob(token_id, logprob, rank, top, detokenizer))
    return tokens


def first_token_logprob(prompt_token_ids: Int32Array, detokenizer: Detokenizer) -> TokenLogprob:
    """Give the entry of a prompt's first token, which nothing predicts."""
    return _token_logprob(int(prompt_token_ids[0]), 0.0, 0, [], detokenizer)


def _token_logprob(
    token_id: int, logprob: float, rank: int, top: list[TopLogprob], detokenizer: Detokenizer
) -> TokenLogprob:
    text, token_bytes = detokenizer.token_text_and_bytes(token_id)
    return TokenLogprob(text, token_bytes, token_id, logprob, rank, top)


def _alternatives(
    token_ids: list[int], logprobs: list[float], detokenizer: Detokenizer
) -> list[TopLogprob]:
    return [
        TopLogprob(*detokenizer.token_text_and_bytes(token_id), token_id, logprob)
        for token_id, logprob in zip(token_ids, logprobs, strict=True)
    ]
