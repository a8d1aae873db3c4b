"""`--device npu` gives the tokens of transformers' `generate`: real torch_npu, emulated card.

Every family, eager and captured; overlapped and not, in chunks, after preemption and deaths, in
both placements, with and without fused operators. One process runs all cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.messages import SamplingParams
from stages.topology import EXECUTOR, SCHEDULER
from tests.emulated_cann.build import unavailable
from tests.golden.conftest import MAX_TOKENS, Golden
from tests.golden.tiny_models import NATIVE_FAMILIES
from tests.pipeline import Pipeline, make_config

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.timeout(900),
]

GREEDY = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
SAMPLED: dict[str, Any] = {
    "max_tokens": 12,
    "temperature": 0.9,
    "top_p": 0.9,
    "seed": 7,
    "logprobs": 2,
}
EAGER = {"enforce_eager": True}
# Gemma 2's soft cap is beyond the fused attention, so its steps cannot be captured.
CAPTURED_FAMILIES = [family for family in NATIVE_FAMILIES if family != "gemma2"]
# Not gpt_neox: one prompt differs after some 32 tokens, perhaps since torch_npu computes exact gelu
# by the tanh approximation; the cause has not been shown.
ADAPTED_FAMILIES = ("gpt2", "olmo2", "phi3")
WAYS: dict[str, dict[str, Any]] = {
    "captured, no overlap": {"overlap": False},
    "eager, no overlap": {"overlap": False, **EAGER},
    "captured, chunks": {"max_num_batched_tokens": 48, "max_num_seqs": 12},
    "captured, preemption": {"num_blocks": 18},
    "captured, own process": {"sampling_placement": "process"},
    "captured, no side stream": {"parallel_streams": 0},
    "captured, one side stream": {"parallel_streams": 1},
    "no fusion": {"operator_fusion": "off"},
}
DEATHS = {"executor dies": {60: EXECUTOR}, "scheduler dies": {90: SCHEDULER, 140: SCHEDULER}}

Results = dict[str, dict[str, Any]]


def _case(golden: Golden, settings: dict[str, Any], **others: Any) -> dict[str, Any]:
    defaults = {"prompts": golden.prompts, "params": GREEDY, "deaths": {}}
    return {"folder": str(golden.folder), "settings": settings, **(defaults | others)}


def _cases(golden: Callable[[str], Golden]) -> dict[str, dict[str, Any]]:
    qwen3 = golden("qwen3")
    return {
        **{f"{f}, eager": _case(golden(f), EAGER) for f in NATIVE_FAMILIES},
        **{f"{f}, captured": _case(golden(f), {}) for f in CAPTURED_FAMILIES},
        **{f"{f}, adapted": _case(golden(f), EAGER) for f in ADAPTED_FAMILIES},
        **{way: _case(qwen3, settings) for way, settings in WAYS.items()},
        **{name: _case(qwen3, {}, deaths=deaths) for name, deaths in DEATHS.items()},
        "sampled": _case(qwen3, {}, params=SAMPLED),
    }


@pytest.fixture(scope="module")
def results(golden: Callable[[str], Golden], tmp_path_factory: pytest.TempPathFactory) -> Results:
    from tests.emulated_cann.load import environment

    folder = tmp_path_factory.mktemp("npu_golden")
    cases, results = folder / "cases.json", folder / "results.json"
    cases.write_text(json.dumps(_cases(golden)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.npu_golden", str(cases), str(results)],
        cwd=Path(__file__).parents[2],
        env=environment(allow_float32=1),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    parsed: Results = json.loads(results.read_text())
    return parsed


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_eager(family: str, golden: Callable[[str], Golden], results: Results) -> None:
    result = results[f"{family}, eager"]
    assert result["tokens"] == golden(family).expected
    assert result["stats"]["executor_graph_steps_total"] == 0


@pytest.mark.parametrize("family", CAPTURED_FAMILIES)
def test_captured(family: str, golden: Callable[[str], Golden], results: Results) -> None:
    result = results[f"{family}, captured"]
    assert result["tokens"] == golden(family).expected
    assert result["stats"]["executor_graph_steps_total"] >= MAX_TOKENS - 1


@pytest.mark.parametrize("family", ADAPTED_FAMILIES)
def test_adapted(family: str, golden: Callable[[str], Golden], results: Results) -> None:
    assert results[f"{family}, adapted"]["tokens"] == golden(family).expected


@pytest.mark.parametrize("way", [*WAYS, *DEATHS])
def test_any_way(way: str, golden: Callable[[str], Golden], results: Results) -> None:
    assert results[way]["tokens"] == golden("qwen3").expected


def test_sampled(golden: Callable[[str], Golden], results: Results) -> None:
    """The sampler draws there what it draws here."""
    wanted = golden("qwen3")
    config = make_config(wanted.folder, max_num_seqs=20)
    outcomes = Pipeline(config).generate(wanted.prompts, SamplingParams(**SAMPLED))
    assert results["sampled"]["tokens"] == [outcome.token_ids for outcome in outcomes]
    for there, here in zip(results["sampled"]["logprobs"], outcomes, strict=True):
        assert there == pytest.approx([token.logprob for token in here.logprobs], abs=1e-3)


def test_nothing_falls_back_unsaid(results: Results) -> None:
    """All that runs as plain torch is counted, and of Qwen 3 nothing does."""
    assert results["qwen3, captured"]["fallbacks"] == []
    assert any("attention_soft_cap" in name for name in results["gemma2, eager"]["fallbacks"])
