"""The accelerator's executor gives the tokens of transformers' `generate`, on a CPU in its place.

Graphs or none, overlapped or not, sampled on the device or in the sampler's process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from executor_svc.model_config import load_model_config
from executor_svc.models.model import Model
from executor_svc.models.registry import load_model
from stages.messages import FinishReason, SamplingParams
from stages.topology import EXECUTOR, SCHEDULER
from tests.accelerator_cpu import TensorLengthOps, stage_maker
from tests.golden.conftest import MAX_TOKENS, Golden
from tests.pipeline import Pipeline, make_config

GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
GoldenOf = Callable[[str], Golden]

SETTINGS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "no overlap": {"overlap": False},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 12},
    "preemption": {"num_blocks": 56, "max_num_seqs": 20},
    "sampled in its own process": {"sampling_placement": "process"},
    "no side stream": {"parallel_streams": 0},
}


@cache
def model_of(folder: Path) -> Model:
    return load_model(folder, load_model_config(folder), "float32", TensorLengthOps())


def make_pipeline(golden: Golden, no_graphs_because: str | None = None, **changes: Any) -> Pipeline:
    config = make_config(golden.folder, **changes)
    make_executor = stage_maker(model_of(golden.folder), no_graphs_because)
    return Pipeline(config, seed=1, make_executor=make_executor)


def check(pipeline: Pipeline, golden: Golden, request_ids: list[int]) -> None:
    outcomes = [pipeline.outcomes[request_id] for request_id in request_ids]
    assert [outcome.token_ids for outcome in outcomes] == golden.expected
    assert {outcome.finish_reason for outcome in outcomes} == {FinishReason.LENGTH}


@pytest.mark.parametrize("no_graphs_because", [None, "enforce_eager"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_generate(name: str, no_graphs_because: str | None, golden: GoldenOf) -> None:
    wanted = golden("qwen3")
    pipeline = make_pipeline(wanted, no_graphs_because, **SETTINGS[name])
    request_ids = [pipeline.open(prompt, GREEDY) for prompt in wanted.prompts]
    pipeline.run()
    check(pipeline, wanted, request_ids)


@pytest.mark.parametrize("stage", [EXECUTOR, SCHEDULER])
@pytest.mark.parametrize("turn_of_death", [30, 151, 402])
def test_equal_after_an_epoch_begins(stage: str, turn_of_death: int, golden: GoldenOf) -> None:
    """With a scheduler's death the executor lives on, and has steps in flight."""
    wanted = golden("qwen3")
    pipeline = make_pipeline(wanted)
    request_ids = [pipeline.open(prompt, GREEDY) for prompt in wanted.prompts]
    pipeline.run(lambda turn: pipeline.kill(stage) if turn == turn_of_death else None)
    check(pipeline, wanted, request_ids)
