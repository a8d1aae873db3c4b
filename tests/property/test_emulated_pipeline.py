"""Random arrivals, departures and deaths: every client gets the tokens that were predicted.

The emulated device makes this cheap enough to try many orders, and its tokens hang on each other,
so that one lost, doubled or computed from the wrong row shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.emulated import load_choices, predict_tokens
from stages.columns import Int32Array, i32_bytes
from stages.launch import load
from stages.messages import FinishReason, SamplingParams
from stages.model_folder import embedded_model
from stages.replay import replay
from stages.topology import EXECUTOR, SAMPLER, SCHEDULER, STAGES, TOKENIZER
from tests.pipeline import Outcome, Pipeline, make_config

CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"emulated_step_ms": 0.0, "emulated_token_us": 0.0},
    {"overlap": False},
    {"sampling_placement": "process"},
    {"sampling_placement": "process", "overlap": False},
    {"max_num_batched_tokens": 8, "max_num_seqs": 4},
    {"num_blocks": 9, "max_num_seqs": 6},  # room for two or three of them: preemption
)


@dataclass(frozen=True)
class Visit:
    """A client: what it asks, when it comes, when it leaves. `stop_at`: the end it asks for.

    `lags`: it has a bad word of two tokens, which the device never says.
    """

    prompt: list[int]
    max_tokens: int
    stop_at: int | None
    arrival: int
    leaves: int | None
    lags: bool = False

    def expected(self) -> list[int]:
        tokens = predict_tokens(self.prompt, self.max_tokens, choices())
        stops = [i for i, token in enumerate(tokens, start=1) if token in self.stop_token_ids()]
        return tokens[: stops[0]] if stops else tokens

    def stop_token_ids(self) -> list[int]:
        if self.stop_at is None:
            return []
        return predict_tokens(self.prompt, self.stop_at, choices())[-1:]

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=i32_bytes(self.stop_token_ids()),
            bad_word_ids=i32_bytes([unsaid(), unsaid()] if self.lags else []),
            bad_word_lens=i32_bytes([2] if self.lags else []),
        )


visits = st.builds(
    Visit,
    prompt=st.lists(st.integers(3, 2000), min_size=1, max_size=40),
    max_tokens=st.integers(1, 30),
    stop_at=st.none() | st.integers(1, 30),
    arrival=st.integers(0, 150),
    leaves=st.none() | st.none() | st.integers(0, 200),
    lags=st.booleans(),
)
deaths = st.tuples(st.integers(0, 250), st.sampled_from([TOKENIZER, SCHEDULER, EXECUTOR, SAMPLER]))


@cache
def choices() -> Int32Array:
    return load_choices(make_config(embedded_model()))


@cache
def unsaid() -> int:
    """A token that the device never gives."""
    return next(token_id for token_id in range(len(choices()) + 1) if token_id not in choices())


def run(
    clients: list[Visit],
    kills: list[tuple[int, str]],
    seed: int,
    config: dict[str, Any],
    record_to: Path | None = None,
) -> list[Outcome | None]:
    """What each client got; None for those that came after all others had gone."""
    changes = {"device": "emulated", "max_recoveries": 10} | config
    pipeline = Pipeline(make_config(embedded_model(), **changes), seed, record_to=record_to)
    ids: dict[int, int] = {}

    def on_turn(turn: int) -> None:
        for index, visit in enumerate(clients):
            if index not in ids and visit.arrival <= turn:
                ids[index] = pipeline.open(visit.prompt, visit.params())
            if index in ids and visit.leaves == turn:
                pipeline.close(ids[index])
        for at, stage in kills:
            if at == turn:
                pipeline.kill(stage)

    on_turn(0)
    pipeline.run(on_turn)
    pipeline.close_recordings()
    assert pipeline.gateway.num_open == 0
    stats = pipeline.scheduler.stats()
    assert stats["num_requests_running"] == stats["num_requests_waiting"] == 0
    return [pipeline.outcomes[ids[i]] if i in ids else None for i in range(len(clients))]


@settings(max_examples=150, deadline=None)
@given(
    clients=st.lists(visits, min_size=1, max_size=10),
    kills=st.lists(deaths, max_size=3),
    seed=st.integers(0, 2**32),
    config=st.sampled_from(CONFIGS),
)
def test_every_client_gets_the_predicted_tokens(
    clients: list[Visit], kills: list[tuple[int, str]], seed: int, config: dict[str, Any]
) -> None:
    for visit, outcome in zip(clients, run(clients, kills, seed, config), strict=True):
        if outcome is None:
            continue
        expected = visit.expected()
        assert outcome.rejected is None
        if outcome.num_terminals == 0:
            assert visit.leaves is not None
            assert outcome.token_ids == expected[: len(outcome.token_ids)]
            continue
        assert outcome.num_terminals == 1
        assert outcome.token_ids == expected
        is_stopped = expected[-1] in visit.stop_token_ids()
        reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
        assert outcome.finish_reason == reason


def test_recordings_of_every_stage_replay(tmp_path: Path) -> None:
    clients = [Visit([5 + i, 6], 8, None, i, None) for i in range(4)]
    run(clients, [], 3, {}, record_to=tmp_path)
    for stage, spec in STAGES.items():
        result = replay(stage, tmp_path / stage, load(spec.core))
        assert result.num_outbound > 0
