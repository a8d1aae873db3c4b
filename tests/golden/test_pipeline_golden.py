"""The whole pipeline gives the tokens of transformers' `generate`, whatever happens on the way.

Batched, in chunks, from the prefix cache, after preemption, in both sampling placements, with and
without overlap, with clients that leave, and with any stage killed in between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from executor_svc.models.model import Model
from stages.messages import FinishReason, SamplingParams
from stages.topology import EXECUTOR, SAMPLER, SCHEDULER, TOKENIZER
from tests.golden.conftest import MAX_TOKENS, Golden
from tests.golden.tiny_models import FAMILIES
from tests.pipeline import Outcome, Pipeline, load_test_model, make_config

GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
# Room for the longest prompt and its outputs, and little more.
TINY_POOL = {"num_blocks": 56, "max_num_seqs": 20}

SETTINGS: dict[str, dict[str, Any]] = {
    "together": {},
    "no overlap": {"overlap": False},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 12},
    "preemption": TINY_POOL,
    "sampled in its own process": {"sampling_placement": "process"},
}

GoldenOf = Callable[[str], Golden]


@cache
def model_of(folder: Path) -> Model:
    """A model keeps no state between steps, so pipelines can share one."""
    return load_test_model(make_config(folder))


def make_pipeline(golden: Golden, seed: int = 0, **changes: Any) -> Pipeline:
    return Pipeline(make_config(golden.folder, **changes), seed, model_of(golden.folder))


def check(outcomes: list[Outcome], golden: Golden) -> None:
    for outcome, expected in zip(outcomes, golden.expected, strict=True):
        assert outcome.rejected is None
        assert outcome.token_ids == expected
        assert (outcome.finish_reason, outcome.num_terminals) == (FinishReason.LENGTH, 1)


def check_at_rest(pipeline: Pipeline) -> None:
    """Nothing is held once nothing is open."""
    stats = pipeline.scheduler.stats()
    assert stats["kv_cache_usage_perc"] == 0
    assert stats["num_requests_running"] == stats["num_requests_waiting"] == 0
    assert pipeline.gateway.num_open == 0


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_generate(family: str, name: str, golden: GoldenOf) -> None:
    wanted = golden(family)
    pipeline = make_pipeline(wanted, **SETTINGS[name])
    check(pipeline.generate(wanted.prompts, GREEDY), wanted)
    check_at_rest(pipeline)
    if SETTINGS[name] is TINY_POOL:
        assert pipeline.scheduler.stats()["num_preemptions_total"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_from_the_prefix_cache(family: str, golden: GoldenOf) -> None:
    wanted = golden(family)
    pipeline = make_pipeline(wanted)
    pipeline.generate(wanted.prompts, GREEDY)
    again = pipeline.generate(wanted.prompts, GREEDY)
    check(again, wanted)
    for outcome, prompt in zip(again, wanted.prompts, strict=True):
        assert outcome.started is not None
        # At least one token is computed, and blocks are shared whole.
        assert outcome.started.num_cached_tokens == (len(prompt) - 1) // 16 * 16


@pytest.mark.parametrize("placement", ["device", "process"])
@pytest.mark.parametrize("stage", [TOKENIZER, SCHEDULER, EXECUTOR, SAMPLER])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_equal_after_a_kill(family: str, stage: str, placement: str, golden: GoldenOf) -> None:
    wanted = golden(family)
    for turn_of_death in (3, 150, 400):
        pipeline = make_pipeline(wanted, seed=turn_of_death, sampling_placement=placement)
        request_ids = [pipeline.open(prompt, GREEDY) for prompt in wanted.prompts]
        pipeline.run(lambda turn, p=pipeline, n=turn_of_death: p.kill(stage) if turn == n else None)
        check([pipeline.outcomes[request_id] for request_id in request_ids], wanted)
        check_at_rest(pipeline)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_after_every_stage_has_died(family: str, golden: GoldenOf) -> None:
    wanted = golden(family)
    pipeline = make_pipeline(wanted, seed=5)
    deaths = {60: SAMPLER, 150: TOKENIZER, 240: EXECUTOR, 330: SCHEDULER}
    request_ids = [pipeline.open(prompt, GREEDY) for prompt in wanted.prompts]
    pipeline.run(lambda turn: pipeline.kill(deaths[turn]) if turn in deaths else None)
    check([pipeline.outcomes[request_id] for request_id in request_ids], wanted)
    check_at_rest(pipeline)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_equal_with_random_aborts_and_arrivals(golden: GoldenOf, data: st.DataObject) -> None:
    """Clients come and leave at any time; those that stay get what they would have got alone."""
    wanted = golden("qwen3")
    changes = data.draw(st.sampled_from(list(SETTINGS.values())))
    pipeline = make_pipeline(wanted, data.draw(st.integers(0, 2**32)), **changes)
    arrivals = data.draw(st.lists(st.integers(0, 300), min_size=20, max_size=20))
    leaves = data.draw(st.lists(st.integers(0, 600) | st.none(), min_size=20, max_size=20))
    opened: dict[int, int] = {}

    def on_turn(turn: int) -> None:
        for index, (arrival, leave) in enumerate(zip(arrivals, leaves, strict=True)):
            if index not in opened and (turn == arrival or (turn == 0 and index == 0)):
                opened[index] = pipeline.open(wanted.prompts[index], GREEDY)
            if index in opened and turn == leave:
                pipeline.close(opened[index])

    on_turn(0)
    pipeline.run(on_turn)
    for index, request_id in opened.items():
        outcome, expected = pipeline.outcomes[request_id], wanted.expected[index]
        if outcome.num_terminals:
            assert outcome.token_ids == expected
        else:
            assert (
                leaves[index] is not None
                and outcome.token_ids == expected[: len(outcome.token_ids)]
            )
    check_at_rest(pipeline)
