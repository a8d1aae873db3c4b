"""Penalties against the plain rule, and the slots of the count table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sampler_svc.penalties import PenaltyCounts, PenaltyRows
from sampler_svc.sampling import RowSampler
from stages.messages import SamplingParams
from tests.sampling_reference import edited_logits, new_row

VOCAB = 50

torch.set_num_threads(1)


def ids(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def penalty_rows(slots: list[int], params: list[SamplingParams]) -> PenaltyRows:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None]

    return PenaltyRows(
        index=torch.arange(len(slots)),
        slots=np.array(slots),
        repetition=column([each.repetition_penalty for each in params]),
        frequency=column([each.frequency_penalty for each in params]),
        presence=column([each.presence_penalty for each in params]),
    )


@pytest.mark.parametrize("seed", range(5))
def test_penalties_follow_the_plain_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(frequency_penalty=0.8),
        SamplingParams(frequency_penalty=-0.5, presence_penalty=1.1),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=-0.7),
    ]
    prompts = [rng.integers(0, VOCAB, 20).tolist() for _ in params]
    outputs = [rng.integers(0, VOCAB, 12).tolist() for _ in params]
    counts = PenaltyCounts(VOCAB, torch.device("cpu"))
    slots = [
        counts.take(ids(prompt), ids(output[:8]))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    for i in range(8, 12):
        counts.count(np.array(slots), torch.tensor([output[i] for output in outputs]))
    logits = torch.from_numpy(rng.normal(0, 3, (len(params), VOCAB)).astype(np.float32))
    penalized = logits.clone()
    counts.penalize(penalized, penalty_rows(slots, params))
    for i, each in enumerate(params):
        expected = edited_logits(logits[i].numpy(), each, prompts[i], outputs[i])
        np.testing.assert_allclose(penalized[i], expected, rtol=1e-5, atol=1e-5)


def test_banned_tokens_stay_banned() -> None:
    counts = PenaltyCounts(VOCAB, torch.device("cpu"))
    slot = counts.take(ids([3]), ids([3]))
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = float("-inf")
    params = SamplingParams(repetition_penalty=0.5, frequency_penalty=-2.0)
    counts.penalize(logits, penalty_rows([slot], [params]))
    assert logits[0].tolist() == [*[0.0] * 3, float("-inf"), *[0.0] * (VOCAB - 4)]


def test_slots_are_taken_on_demand_and_reused_clean() -> None:
    counts = PenaltyCounts(VOCAB, torch.device("cpu"))
    slots = [counts.take(ids([i]), ids([i, i])) for i in range(9)]
    assert len(set(slots)) == 9
    counts.release(slots[4])
    assert counts.take(ids([]), ids([])) == slots[4]
    logits = torch.ones(2, VOCAB)
    params = SamplingParams(frequency_penalty=1.0)
    counts.penalize(logits, penalty_rows([slots[4], slots[8]], [params] * 2))
    assert logits[0].tolist() == [1.0] * VOCAB  # the new request has no outputs
    assert logits[1, 8] == -1.0  # the table grew without losing its counts


def test_a_reused_slot_forgets_the_prompt() -> None:
    counts = PenaltyCounts(VOCAB, torch.device("cpu"))
    counts.release(counts.take(ids([0, 5]), ids([0])))
    slot = counts.take(ids([7]), ids([]))
    logits = torch.ones(1, VOCAB)
    counts.penalize(logits, penalty_rows([slot], [SamplingParams(repetition_penalty=2.0)]))
    assert logits[0].tolist() == [*[1.0] * 7, 0.5, *[1.0] * (VOCAB - 8)]


def test_a_long_output_outgrows_the_first_list() -> None:
    counts = PenaltyCounts(VOCAB, torch.device("cpu"))
    slot = counts.take(ids([7]), ids([]))
    for i in range(600):
        counts.count(np.array([slot]), torch.tensor([i % 3]))
    logits = torch.zeros(1, VOCAB)
    counts.penalize(logits, penalty_rows([slot], [SamplingParams(frequency_penalty=0.5)]))
    assert logits[0].tolist() == [-100.0] * 3 + [0.0] * (VOCAB - 3)


def test_sampled_tokens_are_counted() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    sampler = RowSampler(2, VOCAB, "cpu")
    params = SamplingParams(temperature=0.0, presence_penalty=10.0)
    sampler.admit(new_row(1, params, [0, 1, 2]))
    rows = np.array([1], dtype=np.int32)
    assert [int(sampler.sample(logits, rows).token_ids) for _ in range(3)] == [0, 1, 2]
