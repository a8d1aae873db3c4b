"""The sampler of both placements: choices, truncation, state of rows, log-probabilities."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from sampler_svc import draw, sampling_head
from sampler_svc.host_sampler import HostSampler
from sampler_svc.native.library import load_library
from sampler_svc.sampling import RowSampler, prompt_logprobs
from sampler_svc.sampling_rows import SamplingRows
from stages.columns import f32, f32_bytes, i32, i32_bytes
from stages.messages import SamplingParams, StepLogits
from stages.native_library import LibraryUnavailable
from tests.sampling_reference import new_row

VOCAB = 1003  # no multiple of any vector width
GREEDY = SamplingParams(temperature=0.0)

torch.set_num_threads(1)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on the compiled sampling head and on torch, as without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(sampling_head, "load_library", _no_library)
        return
    try:
        load_library()
    except LibraryUnavailable as unavailable:
        pytest.skip(str(unavailable))


def _no_library(**_: object) -> None:
    raise LibraryUnavailable("no library here")


def make_logits(num_rows: int, seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_rows, vocab), generator=generator) * scale


def make_sampler(*params: SamplingParams, vocab: int = VOCAB) -> RowSampler:
    """Rows 0, 1, ... with the given parameters, behind a prompt of three tokens."""
    sampler = RowSampler(max(64, len(params)), vocab, "cpu")
    for row, each in enumerate(params):
        sampler.admit(new_row(row, each, [1, 2, 3]))
    return sampler


def sample(sampler: RowSampler, logits: Tensor, rows: list[int] | None = None) -> list[int]:
    chosen = list(range(len(logits))) if rows is None else rows
    token_ids: list[int] = sampler.sample(
        logits, np.array(chosen, dtype=np.int32)
    ).token_ids.tolist()
    return token_ids


def mixed_params(n: int) -> list[SamplingParams]:
    """n different requests, every feature among them."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05, "temperature": 1.5},
        {"top_k": 40, "top_p": 0.5, "temperature": 2.0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
        {"top_p": 0.9999, "temperature": 3.0, "logprobs": 3},
        {"logit_bias_ids": i32_bytes([7]), "logit_bias_values": f32_bytes([4.0]), "top_k": 2},
        {"min_tokens": 4, "stop_token_ids": i32_bytes([5, 6]), "frequency_penalty": 0.1},
    ]
    return [SamplingParams(seed=1000 + i, **kinds[i % len(kinds)]) for i in range(n)]


# ── choices ──────────────────────────────────────────────────────────────────────────────────


def test_greedy_takes_the_likeliest_token() -> None:
    logits = make_logits(8)
    assert sample(make_sampler(*[GREEDY] * 8), logits) == logits.argmax(-1).tolist()


def test_greedy_rows_stay_greedy_beside_random_ones() -> None:
    logits = make_logits(4)
    sampler = make_sampler(GREEDY, SamplingParams(seed=1), GREEDY, SamplingParams(seed=2, top_k=3))
    tokens = sample(sampler, logits)
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()


@pytest.mark.parametrize("temperature", [1e-6, 0.0])
def test_a_temperature_of_almost_zero_is_greedy(temperature: float) -> None:
    logits = make_logits(1, scale=1000.0)
    assert sample(make_sampler(SamplingParams(temperature=temperature)), logits) == [
        int(logits.argmax())
    ]


def test_top_k_of_one_is_greedy_even_among_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 17] = logits[:, 400] = 2.0
    sampler = make_sampler(*[SamplingParams(seed=i, top_k=1) for i in range(3)])
    assert sample(sampler, logits) == [17, 17, 17]


def test_a_token_does_not_depend_on_the_batch() -> None:
    params = mixed_params(64)
    together = make_sampler(*params)
    steps = [make_logits(64, seed=step) for step in range(4)]
    expected = [sample(together, logits) for logits in steps]
    for row in range(64):
        alone = RowSampler(64, VOCAB, "cpu")
        alone.admit(new_row(row, params[row], [1, 2, 3]))
        for step, logits in enumerate(steps):
            assert sample(alone, logits[row : row + 1], [row]) == [expected[step][row]]


def test_rows_may_come_in_any_order_and_any_number() -> None:
    params = mixed_params(20)
    logits = make_logits(20)
    expected = sample(make_sampler(*params), logits)
    order = np.random.default_rng(3).permutation(20)
    sampler = make_sampler(*params)
    for part in (order[:7], order[7:8], order[8:]):
        tokens = sample(sampler, logits[torch.from_numpy(part)], part.tolist())
        assert tokens == [expected[row] for row in part]


def test_a_resumed_row_draws_what_it_would_have_drawn() -> None:
    params = mixed_params(10)
    straight = make_sampler(*params)
    steps = [make_logits(10, seed=step) for step in range(8)]
    tokens = np.array([sample(straight, logits) for logits in steps])
    resumed = RowSampler(64, VOCAB, "cpu")
    for row, each in enumerate(params):
        resumed.admit(new_row(row, each, [1, 2, 3], tokens[:5, row].tolist()))
    for step in range(5, 8):
        assert sample(resumed, steps[step]) == tokens[step].tolist()


def test_a_released_row_leaves_nothing_to_the_next_request() -> None:
    heavy = SamplingParams(temperature=0.0, repetition_penalty=5.0, presence_penalty=2.0, seed=1)
    logits = make_logits(1).abs()
    best, second = logits[0].topk(2).indices.tolist()
    sampler = RowSampler(4, VOCAB, "cpu")
    sampler.admit(new_row(2, heavy, [best]))
    assert sample(sampler, logits, [2]) == [second]
    sampler.release(np.array([2], dtype=np.int32))
    sampler.admit(new_row(2, GREEDY, [best]))
    assert sample(sampler, logits, [2]) == [best]
    sampler.release(np.array([2], dtype=np.int32))
    sampler.admit(new_row(2, heavy, [0]))
    assert sample(sampler, logits, [2]) == [best]


def test_the_callers_rows_may_change_between_steps() -> None:
    logits = make_logits(2)
    sampler = make_sampler(SamplingParams(seed=1), SamplingParams(seed=2), GREEDY)
    rows = np.array([0, 1], dtype=np.int32)
    sampler.sample(logits, rows)
    rows[1] = 2
    assert sampler.sample(logits, rows).token_ids[1] == logits[1].argmax()


def test_steady_rows_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(*mixed_params(10))
    sample(sampler, make_logits(10))
    monkeypatch.delattr(SamplingRows, "batch")
    sampler.release(np.array([], dtype=np.int32))
    assert len(sample(sampler, make_logits(10))) == 10


def test_logits_are_not_written_to() -> None:
    logits = make_logits(20)
    before = logits.clone()
    sample(make_sampler(*mixed_params(20)), logits)
    assert torch.equal(logits, before)


def test_an_empty_step_gives_nothing() -> None:
    assert sample(make_sampler(GREEDY), make_logits(0)) == []


def test_logits_that_are_not_numbers_still_give_a_token() -> None:
    logits = torch.full((4, VOCAB), float("nan"))
    params = [SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.5), GREEDY]
    assert all(0 <= token < VOCAB for token in sample(make_sampler(*params), logits))


def test_a_seed_of_any_size_or_sign_is_taken() -> None:
    params = [SamplingParams(seed=seed) for seed in (-1, 2**64 - 1, 0, 2**70)]
    tokens = sample(make_sampler(*params), make_logits(1).expand(4, -1))
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3]


# ── tokens that the model chose itself ───────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=0.0, presence_penalty=0.1),
        SamplingParams(
            temperature=0.0, logit_bias_ids=i32_bytes([1]), logit_bias_values=f32_bytes([1.0])
        ),
    ],
)
def test_whoever_is_not_plainly_greedy_needs_logits(params: SamplingParams) -> None:
    sampler = make_sampler(GREEDY, params)
    assert not sampler.needs_logits(np.array([0], dtype=np.int32))
    assert sampler.needs_logits(np.array([0, 1], dtype=np.int32))


def test_logits_are_needed_until_min_tokens_are_out() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=i32_bytes([5]))
    sampler, rows = make_sampler(params), np.array([0], dtype=np.int32)
    needed = []
    for step in range(4):
        needed.append(sampler.needs_logits(rows))
        if needed[-1]:
            sampler.sample(make_logits(1, seed=step), rows)
        else:
            assert sampler.take_greedy(torch.tensor([step]), rows).token_ids.tolist() == [step]
    assert needed == [True, True, False, False]


def test_tokens_that_were_taken_count_as_outputs() -> None:
    """A row that is greedy beside it changes nothing; the noise depends on the position alone."""
    rows = np.array([0], dtype=np.int32)
    straight, mixed = make_sampler(GREEDY), make_sampler(GREEDY)
    for step in range(3):
        expected = straight.sample(make_logits(1, seed=step), rows).token_ids
        assert mixed.take_greedy(expected, rows).logprobs is None
    assert straight._rows.num_output[0] == mixed._rows.num_output[0] == 3


# ── truncation ───────────────────────────────────────────────────────────────────────────────


def tokens_drawn(probs: list[float], params: SamplingParams, n: int = 400) -> set[int]:
    """Which tokens n seeds draw from these probabilities."""
    logits = torch.tensor(probs).log().expand(n, -1)
    sampler = make_sampler(
        *[msgspec.structs.replace(params, seed=seed) for seed in range(n)], vocab=len(probs)
    )
    return set(sample(sampler, logits))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), {0, 1, 2, 3}),
        (SamplingParams(top_k=2), {1, 2}),
        (SamplingParams(top_k=100), {0, 1, 2, 3}),
        (SamplingParams(top_p=0.39), {1}),
        (SamplingParams(top_p=0.45), {1, 2}),  # the token that crosses p is in
        (SamplingParams(top_p=0.75), {1, 2, 3}),
        (SamplingParams(top_p=1e-9), {1}),  # at least one
        (SamplingParams(min_p=0.6), {1, 2}),
        (SamplingParams(min_p=1.0), {1}),
        (SamplingParams(top_k=2, top_p=0.55), {1}),  # p of what top_k left: 0.4 of 0.7
        (SamplingParams(min_p=0.6, top_p=0.55), {1}),  # and of what min_p left
        (SamplingParams(min_p=0.3, temperature=0.5), {1, 2}),  # behind the temperature
    ],
)
def test_truncation_keeps_the_right_tokens(params: SamplingParams, kept: set[int]) -> None:
    assert tokens_drawn([0.1, 0.4, 0.3, 0.2], params) == kept


def test_a_draw_is_the_inverse_of_the_cdf() -> None:
    weights = torch.tensor([[0, 3, 0, 1, 0]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.74, 0.75, 0.99, 1 - 2.0**-53], dtype=torch.float64)
    assert draw.draw_from_all(weights, uniforms).tolist() == [1, 1, 3, 3, 3]
    huge = weights * 2**46  # beyond what float64 holds exactly
    assert draw.draw_from_all(huge, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_among_equals_the_smallest_set_is_kept() -> None:
    assert tokens_drawn([0.25] * 4, SamplingParams(top_p=0.5)) == {0, 1}
    assert tokens_drawn([0.25] * 4, SamplingParams(top_k=3)) == {0, 1, 2}


def test_a_nucleus_is_drawn_on_the_host_as_by_a_full_sort() -> None:
    """Wide and narrow nuclei, many equals, and the same token with and without a sort."""
    logits = make_logits(48, vocab=5000, scale=0.5)
    logits[::3] *= 20.0
    logits[1::3] = logits[1::3].round()
    weights = draw.token_weights(logits, torch.ones(48, 1), None)
    uniforms = torch.from_numpy(np.random.default_rng(1).random(48))
    top_p = torch.tensor([0.8, 0.5, 1e-9, 0.999999] * 12, dtype=torch.float64)[:, None]
    all_of_them = torch.full((48, 1), 5000)
    expected = draw.draw_from_top_k(weights, uniforms, all_of_them, top_p, 5000)
    assert draw.draw_from_top_p(weights, uniforms, top_p).tolist() == expected.tolist()


# ── logit bias and min_tokens ────────────────────────────────────────────────────────────────


def test_logit_bias_forces_and_bans() -> None:
    logits = make_logits(1)
    best, second = logits[0].topk(2).indices.tolist()

    def biased(token: int, value: float) -> SamplingParams:
        return SamplingParams(
            temperature=0.0, logit_bias_ids=i32_bytes([token]), logit_bias_values=f32_bytes([value])
        )

    assert sample(make_sampler(biased(9, 100.0)), logits) == [9]
    assert sample(make_sampler(biased(best, -100.0)), logits) == [second]
    assert sample(make_sampler(biased(VOCAB + 5, 100.0)), logits) == [best]  # no such token


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = make_logits(1)
    best, second, third = logits[0].topk(3).indices.tolist()
    params = SamplingParams(
        temperature=0.0, min_tokens=3, stop_token_ids=i32_bytes([best, second, VOCAB + 1])
    )
    sampler = make_sampler(params)
    assert [sample(sampler, logits)[0] for _ in range(5)] == [third, third, third, best, best]


# ── log-probabilities ────────────────────────────────────────────────────────────────────────


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = make_logits(3)
    best = int(logits[0].argmax())
    params = SamplingParams(temperature=0.7, seed=5, top_p=0.9, logprobs=4, repetition_penalty=1.5)
    sampler = make_sampler(
        params,
        SamplingParams(seed=6),
        SamplingParams(
            temperature=0.0,
            logprobs=0,
            logit_bias_ids=i32_bytes([best]),
            logit_bias_values=f32_bytes([100.0]),
        ),
    )
    sampled = sampler.sample(logits, np.array([0, 1, 2], dtype=np.int32))
    assert sampled.logprobs is not None
    message = sampled.logprobs.to_message(step_id=9)
    expected = logits.double().log_softmax(-1)
    tokens = sampled.token_ids.tolist()
    assert message.step_id == 9
    assert i32(message.rows).tolist() == [0, 2]
    assert i32(message.num_top).tolist() == [4, 0]
    np.testing.assert_allclose(
        f32(message.logprobs), [expected[0, tokens[0]], expected[2, tokens[2]]], atol=1e-5
    )
    top = expected[0].topk(4)
    assert i32(message.top_ids).tolist() == top.indices.tolist()
    np.testing.assert_allclose(f32(message.top_logprobs), top.values, atol=1e-5)
    ranks = [int((expected[i] > expected[i, tokens[i]]).sum()) + 1 for i in (0, 2)]
    assert i32(message.ranks).tolist() == ranks


def test_no_logprobs_where_none_are_wanted() -> None:
    sampled = make_sampler(GREEDY).sample(make_logits(1), np.array([0], dtype=np.int32))
    assert sampled.logprobs is None


def test_prompt_logprobs_are_those_of_the_next_tokens() -> None:
    logits = make_logits(5)
    next_ids = torch.tensor([4, 0, 1002, 7, int(logits[4].argmax())])
    columns = prompt_logprobs(logits, next_ids, 2)
    expected = logits.double().log_softmax(-1)
    np.testing.assert_allclose(columns.logprobs, expected[range(5), next_ids], atol=1e-5)
    assert columns.ranks[4] == 1
    assert columns.top_ids.tolist() == expected.topk(2).indices.tolist()
    np.testing.assert_allclose(columns.top_logprobs, expected.topk(2).values, atol=1e-5)


# ── placement `process` ──────────────────────────────────────────────────────────────────────


def test_both_placements_draw_the_same_tokens() -> None:
    params = mixed_params(30)
    device = make_sampler(*params)
    host = HostSampler(64, VOCAB)
    for row, each in enumerate(params):
        host.admit(new_row(row, each, [1, 2, 3]))
    rows = np.arange(30, dtype=np.int32)
    for step in range(5):
        logits = make_logits(30, seed=step)
        sampled = device.sample(logits, rows)
        record = StepLogits(step, i32_bytes(rows), VOCAB, logits.numpy().tobytes())
        tokens, logprobs = host.sample(record)
        assert tokens.step_id == step and tokens.rows == i32_bytes(rows)
        assert i32(tokens.token_ids).tolist() == sampled.token_ids.tolist()
        assert sampled.logprobs is not None
        assert logprobs == sampled.logprobs.to_message(step)
