"""`bad_words` give the tokens of transformers' `bad_words_ids`: on the CPU, and where rows lag.

transformers looks for words in the prompt too, vLLM and Headrace in the outputs alone; so no word
here begins with the token that a prompt ends with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from executor_svc.model_config import load_model_config
from executor_svc.models.model import Model
from executor_svc.models.registry import load_model
from stages.columns import i32_bytes
from stages.messages import ChatMessage, ChatPrompt, SamplingParams
from stages.model_folder import embedded_model
from stages.topology import EXECUTOR, SAMPLER, SCHEDULER
from tests.accelerator_cpu import TensorLengthOps, stage_maker
from tests.golden.conftest import Golden
from tests.pipeline import Pipeline, load_test_model, make_config

FAMILY = "qwen3"
MAX_TOKENS = 24
NUM_PROMPTS = 14  # the shorter ones
COUNTER = "lagging_row_steps_bad_words_total"
GoldenOf = Callable[[str], Golden]
Words = list[list[int]]

CPU: dict[str, Any] = {}
PROCESS = {"sampling_placement": "process"}
# What the scheduler is told; the accelerator is the CPU in its place.
ACCELERATOR = {"device": "cuda"}
SEQUENTIAL = {"overlap": False}
SMALL_POOL = {"block_size": 4, "num_blocks": 90, "max_num_seqs": 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": CPU,
    "cpu, no overlap": SEQUENTIAL,
    "cpu, preemption": SMALL_POOL,
    "process": PROCESS,
    "process, no overlap": PROCESS | SEQUENTIAL,
    "accelerator": ACCELERATOR,
    "accelerator, no overlap": ACCELERATOR | SEQUENTIAL,
    "accelerator, chunks": ACCELERATOR | {"max_num_batched_tokens": 16, "max_num_seqs": 12},
    "accelerator, preemption": ACCELERATOR | SMALL_POOL,
    "accelerator, process": ACCELERATOR | PROCESS,
}


def words_of(index: int, golden: Golden) -> Words:
    """Words that prompt `index` would say, of one to four tokens; none for every third."""
    said = golden.expected[index]
    spans = {0: [], 1: [(2, 4), (5, 8), (9, 10)], 2: [(3, 7), (0, 2), (12, 14), (15, 17)]}
    words = [said[start:end] for start, end in spans[index % 3]]
    return [word for word in words if golden.prompts[index][-1] not in word[:-1]]


def params_of(words: Words) -> SamplingParams:
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        bad_word_ids=i32_bytes([token_id for word in words for token_id in word]),
        bad_word_lens=i32_bytes([len(word) for word in words]),
    )


@cache
def generate_without_words(golden: GoldenOf) -> list[list[int]]:
    """What transformers generates for each prompt without its words."""
    from transformers import AutoModelForCausalLM

    wanted = golden(FAMILY)
    network = AutoModelForCausalLM.from_pretrained(wanted.folder, attn_implementation="eager")
    network.generation_config.eos_token_id = None
    outputs = []
    for index, prompt in enumerate(wanted.prompts[:NUM_PROMPTS]):
        ids = torch.tensor([prompt])
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            bad_words_ids=words_of(index, wanted) or None,
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture
def expected(golden: GoldenOf, _one_thread: None) -> list[list[int]]:
    return generate_without_words(golden)


@cache
def cpu_model(folder: Path) -> Model:
    return load_test_model(make_config(folder))


@cache
def accelerator_model(folder: Path) -> Model:
    return load_model(folder, load_model_config(folder), "float32", TensorLengthOps())


def make_pipeline(golden: Golden, seed: int, settings: dict[str, Any]) -> Pipeline:
    config = make_config(golden.folder, **settings)
    if config.device == "cpu":
        return Pipeline(config, seed, cpu_model(golden.folder))
    make_executor = stage_maker(accelerator_model(golden.folder))
    return Pipeline(config, seed, make_executor=make_executor)


def run(pipeline: Pipeline, golden: Golden, deaths: dict[int, str]) -> list[list[int]]:
    ids = [
        pipeline.open(prompt, params_of(words_of(index, golden)))
        for index, prompt in enumerate(golden.prompts[:NUM_PROMPTS])
    ]
    pipeline.run(lambda turn: pipeline.kill(deaths[turn]) if turn in deaths else None)
    return [pipeline.outcomes[request_id].token_ids for request_id in ids]


def test_the_words_matter(golden: GoldenOf, expected: list[list[int]]) -> None:
    wanted = golden(FAMILY)
    for index, tokens in enumerate(expected):
        is_changed = tokens != wanted.expected[index][:MAX_TOKENS]
        assert is_changed == bool(words_of(index, wanted))


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_generate(name: str, golden: GoldenOf, expected: list[list[int]]) -> None:
    pipeline = make_pipeline(golden(FAMILY), 2, SETTINGS[name])
    assert run(pipeline, golden(FAMILY), {}) == expected
    stats = pipeline.scheduler.stats()
    lags = SETTINGS[name].get("device") == "cuda" and not SETTINGS[name].keys() & (
        PROCESS.keys() | SEQUENTIAL.keys()
    )
    assert (stats[COUNTER] > 0) == lags
    assert (stats["num_preemptions_total"] > 0) == ("preemption" in name)


@pytest.mark.parametrize("settings", [CPU, PROCESS, ACCELERATOR], ids=["cpu", "process", "device"])
@pytest.mark.parametrize("seed", [1, 2])
def test_equal_after_deaths(
    settings: dict[str, Any], seed: int, golden: GoldenOf, expected: list[list[int]]
) -> None:
    """A recovered request brings outputs, which may end in the middle of a word."""
    pipeline = make_pipeline(golden(FAMILY), seed, settings)
    deaths = {90: SCHEDULER, 160: EXECUTOR, 230: SAMPLER}
    assert run(pipeline, golden(FAMILY), deaths) == expected


@pytest.mark.parametrize("settings", [CPU, PROCESS], ids=["cpu", "process"])
def test_a_client_does_not_read_the_word(settings: dict[str, Any]) -> None:
    """Words as a client sends them, which the tokenizer stage encodes."""
    question = ChatPrompt([ChatMessage("user", "What is 12 plus 34?")])
    pipeline = Pipeline(make_config(embedded_model(), **settings))
    asked = SamplingParams(max_tokens=24, temperature=0.0)
    ids = [
        pipeline.open(question, msgspec.structs.replace(asked, bad_words=words))
        for words in ([], ["46"], ["4"])
    ]
    pipeline.run()
    free, without_46, without_4 = (pipeline.outcomes[request_id].text for request_id in ids)
    assert "46" in free
    assert "46" not in without_46 and "4" in without_46
    assert "4" not in without_4
