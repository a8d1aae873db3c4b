"""The sampling rule in plain NumPy, one row at a time: the oracle of the sampler's tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.columns import f32, i32, i32_bytes
from stages.messages import NewRow, SamplingParams

Floats = NDArray[np.floating]


def new_row(
    row: int, params: SamplingParams, prompt: list[int], outputs: list[int] | None = None
) -> NewRow:
    """A request in a row, with the fields that the sampler reads."""
    return NewRow(
        row=row,
        request_id=row + 1,
        token_ids=i32_bytes([*prompt, *(outputs or [])]),
        num_prompt_tokens=len(prompt),
        num_computed_tokens=0,
        num_cached_tokens=0,
        block_ids=b"",
        params=params,
    )


def edited_logits(
    logits: Floats, params: SamplingParams, prompt: list[int], outputs: list[int]
) -> Floats:
    """Logit bias, min_tokens, bad words, repetition, frequency and presence penalty, in order."""
    logits = logits.astype(np.float64).copy()
    for token, value in zip(i32(params.logit_bias_ids), f32(params.logit_bias_values), strict=True):
        logits[token] += value
    if len(outputs) < params.min_tokens:
        logits[i32(params.stop_token_ids)] = -np.inf
    start = 0
    for length in i32(params.bad_word_lens).tolist():
        *prefix, last = i32(params.bad_word_ids)[start : start + length].tolist()
        if outputs[len(outputs) - len(prefix) :] == prefix:
            logits[last] = -np.inf
        start += length
    for token in set(prompt) | set(outputs):
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token in set(outputs):
        logits[token] -= params.frequency_penalty * outputs.count(token)
        logits[token] -= params.presence_penalty
    return logits


def distribution(
    logits: Floats,
    params: SamplingParams,
    prompt: list[int] | None = None,
    outputs: list[int] | None = None,
) -> Floats:
    """The probability of each token: temperature, min_p, top_k, top_p, in this order."""
    logits = edited_logits(logits, params, prompt or [], outputs or [])
    scaled = logits / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0.0
    likeliest_first = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[likeliest_first[params.top_k :]] = 0.0
    probs /= probs.sum()
    reached = 0.0
    for token in likeliest_first:
        if reached >= params.top_p:
            probs[token] = 0.0
        reached += probs[token]
    kept: Floats = probs / probs.sum()
    return kept
