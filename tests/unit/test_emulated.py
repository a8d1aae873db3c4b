"""The emulated device: its timeline, its tokens, what a step waits for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from executor_svc.emulated import (
    EmulatedExecutorStage,
    Timeline,
    emulated_facts,
    load_choices,
    predict_tokens,
    token_choices,
)
from stages.columns import f32, i32, i32_bytes
from stages.config import ModelFacts, ServerConfig
from stages.errors import ConfigError
from stages.messages import (
    BeginEpoch,
    ExecuteStep,
    ExecutorFacts,
    NewRow,
    SamplingParams,
    StepLogits,
    StepLogprobs,
    StepTokens,
)
from stages.model_folder import embedded_model, read_model_facts
from stages.settings import build_config
from stages.trace import Trace, What

MS = 1_000_000
VOCAB_SIZE = 100
CHOICES = token_choices(VOCAB_SIZE, [0, 1, 2])
PROMPT = [11, 12, 13, 14, 15]


def make_config(**changes: object) -> ServerConfig:
    config = ServerConfig(
        model="m",
        served_model_name="m",
        facts=ModelFacts("", VOCAB_SIZE, 512, [2]),
        run_dir="/nowhere",
        device="emulated",
        emulated_step_ms=10,
        emulated_token_us=0,
        max_num_seqs=8,
    )
    return msgspec.structs.replace(config, **changes)


def make_stage(trace: Trace | None = None, **changes: object) -> EmulatedExecutorStage:
    return EmulatedExecutorStage(make_config(**changes), CHOICES, trace or Trace())


def new_row(
    row: int, prompt: Sequence[int] = PROMPT, outputs: Sequence[int] = (), logprobs: int = -1
) -> NewRow:
    token_ids = i32_bytes([*prompt, *outputs])
    params = SamplingParams(logprobs=logprobs)
    return NewRow(row, row + 100, token_ids, len(prompt), 0, 0, b"", params)


def prefill(step_id: int, *new: NewRow) -> ExecuteStep:
    rows = i32_bytes([row.row for row in new])
    lens = i32_bytes([len(row.token_ids) // 4 for row in new])
    return ExecuteStep(step_id, new_rows=list(new), prefill_rows=rows, prefill_lens=lens)


def decode(step_id: int, *started: int) -> ExecuteStep:
    return ExecuteStep(step_id, started_rows=i32_bytes(started))


def run(stage: EmulatedExecutorStage, steps: Sequence[ExecuteStep]) -> list[StepTokens]:
    """Run steps to their ends, however long that takes."""
    said = stage.handle(steps, 0)
    while (at_ns := stage.wakeup_ns()) is not None:
        said += stage.handle([], at_ns)
    assert all(isinstance(message, StepTokens) for message in said)
    return said  # type: ignore[return-value]


def tokens_of_row(results: Sequence[StepTokens], row: int) -> list[int]:
    pairs = [
        pair
        for result in results
        for pair in zip(i32(result.rows).tolist(), i32(result.token_ids).tolist(), strict=True)
    ]
    return [token_id for owner, token_id in pairs if owner == row]


# ── time ─────────────────────────────────────────────────────────────────────────────────────


def test_a_step_begins_when_it_is_launched_or_when_the_one_before_it_ends() -> None:
    timeline = Timeline(step_ms=10, token_us=2)
    assert timeline.launch(100, 5 * MS) == (5 * MS, 15 * MS + 200_000)
    assert timeline.launch(0, 6 * MS) == (15 * MS + 200_000, 25 * MS + 200_000)
    assert timeline.launch(0, 40 * MS) == (40 * MS, 50 * MS)


def test_results_come_when_their_time_is_over_not_before() -> None:
    stage = make_stage()
    assert stage.handle([prefill(1, new_row(0)), decode(2, 0)], 0) == []
    assert stage.wakeup_ns() == 10 * MS
    assert stage.handle([], 10 * MS - 1) == []
    (first,) = stage.handle([], 10 * MS)
    assert isinstance(first, StepTokens) and first.step_id == 1
    assert stage.wakeup_ns() == 20 * MS
    (second,) = stage.handle([], 99 * MS)
    assert isinstance(second, StepTokens) and second.step_id == 2
    assert stage.wakeup_ns() is None


def test_a_late_wakeup_does_not_delay_the_device() -> None:
    trace = Trace()
    stage = make_stage(trace)
    stage.handle([prefill(1, new_row(0)), decode(2, 0)], 0)
    stage.handle([decode(3)], 14 * MS)
    intervals = [(int(e["start_ns"]), int(e["end_ns"])) for e in trace.events()]
    assert intervals == [(0, 10 * MS), (10 * MS, 20 * MS), (20 * MS, 30 * MS)]
    assert set(trace.events()["what"]) == {What.DEVICE}


def test_the_device_stands_still_while_no_plan_comes() -> None:
    trace = Trace()
    stage = make_stage(trace)
    stage.handle([prefill(1, new_row(0))], 0)
    stage.handle([], 10 * MS)
    stage.handle([decode(2, 0)], 13 * MS)
    assert [int(e["start_ns"]) for e in trace.events()] == [0, 13 * MS]


def test_a_device_without_a_time_answers_at_once() -> None:
    stage = make_stage(emulated_step_ms=0)
    (tokens,) = stage.handle([prefill(1, new_row(0))], 7)
    assert isinstance(tokens, StepTokens)
    assert stage.wakeup_ns() is None


def test_a_new_epoch_says_nothing_of_the_old_one() -> None:
    stage = make_stage()
    stage.handle([prefill(1, new_row(0))], 0)
    stage.begin_epoch(BeginEpoch(2, ExecutorFacts()))
    assert stage.wakeup_ns() is None
    assert stage.handle([], 99 * MS) == []
    assert stage.queue_len() == 0


# ── tokens ───────────────────────────────────────────────────────────────────────────────────


def test_tokens_are_those_predicted() -> None:
    steps = [prefill(1, new_row(0), new_row(3, [40])), decode(2, 0, 3), decode(3), decode(4)]
    results = run(make_stage(), steps)
    assert tokens_of_row(results, 0) == predict_tokens(PROMPT, 4, CHOICES)
    assert tokens_of_row(results, 3) == predict_tokens([40], 4, CHOICES)


def test_chunks_of_a_prompt_change_nothing() -> None:
    row = new_row(0)
    steps = [
        ExecuteStep(1, new_rows=[row], prefill_rows=i32_bytes([0]), prefill_lens=i32_bytes([2])),
        ExecuteStep(2, prefill_rows=i32_bytes([0]), prefill_lens=i32_bytes([3])),
        decode(3, 0),
    ]
    results = run(make_stage(), steps)
    assert [len(i32(result.rows)) for result in results] == [0, 1, 1]
    assert tokens_of_row(results, 0) == predict_tokens(PROMPT, 2, CHOICES)


def test_a_resumed_request_goes_on_as_it_would_have() -> None:
    whole = predict_tokens(PROMPT, 8, CHOICES)
    assert predict_tokens(PROMPT, 5, CHOICES, outputs=whole[:3]) == whole[3:]
    results = run(make_stage(), [prefill(1, new_row(2, outputs=whole[:3])), decode(2, 2)])
    assert tokens_of_row(results, 2) == whole[3:5]


@pytest.mark.parametrize("disturb", [lambda t: t[:-1], lambda t: t[::-1], lambda t: [*t, t[-1]]])
def test_a_token_lost_doubled_or_out_of_order_shows_in_those_that_follow(
    disturb: Callable[[list[int]], list[int]],
) -> None:
    whole = predict_tokens(PROMPT, 12, CHOICES)
    assert predict_tokens(PROMPT, 8, CHOICES, outputs=disturb(whole[:4])) != whole[4:]


def test_prompts_that_end_alike_give_different_tokens() -> None:
    assert predict_tokens([1, 5], 4, CHOICES) != predict_tokens([2, 5], 4, CHOICES)


def test_tokens_are_spread_over_all_choices() -> None:
    tokens = predict_tokens(PROMPT, 2000, CHOICES)
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    assert set(np.flatnonzero(counts)) == set(CHOICES.tolist())
    assert counts.max() < 60  # 20.6 expected of each


def test_a_released_row_is_taken_by_another_request() -> None:
    steps = [
        prefill(1, new_row(0)),
        msgspec.structs.replace(prefill(2, new_row(0, [77])), released_rows=i32_bytes([0])),
    ]
    results = run(make_stage(), steps)
    assert tokens_of_row(results, 0) == [
        *predict_tokens(PROMPT, 1, CHOICES),
        *predict_tokens([77], 1, CHOICES),
    ]


def test_rows_that_ask_get_logprobs_ahead_of_their_tokens() -> None:
    stage = make_stage(emulated_step_ms=0)
    rows = (new_row(0), new_row(1, [9], logprobs=0), new_row(2, [8], logprobs=5))
    logprobs, tokens = stage.handle([prefill(1, *rows)], 0)
    assert isinstance(logprobs, StepLogprobs) and isinstance(tokens, StepTokens)
    assert i32(logprobs.rows).tolist() == [1, 2]
    assert i32(logprobs.num_top).tolist() == [0, 1]
    assert i32(logprobs.top_ids).tolist() == tokens_of_row([tokens], 2)
    assert f32(logprobs.logprobs).tolist() == [0, 0]


# ── placement `process` ──────────────────────────────────────────────────────────────────────


def answer(message: object) -> StepTokens:
    """As a greedy sampler does."""
    assert isinstance(message, StepLogits)
    logits = f32(message.logits).reshape(-1, message.vocab_size)
    return StepTokens(message.step_id, message.rows, i32_bytes(logits.argmax(axis=1)))


def test_a_step_waits_for_the_tokens_that_it_reads() -> None:
    stage = make_stage(sampling_placement="process")
    stage.handle([prefill(1, new_row(0)), decode(2, 0)], 0)
    (first,) = stage.handle([], 10 * MS)
    assert stage.wakeup_ns() is None
    assert stage.handle([answer(first)], 12 * MS) == []
    assert stage.wakeup_ns() == 22 * MS
    (second,) = stage.handle([], 22 * MS)
    tokens = tokens_of_row([answer(first), answer(second)], 0)
    assert tokens == predict_tokens(PROMPT, 2, CHOICES)


def test_the_token_that_came_is_the_one_that_is_read() -> None:
    stage = make_stage(sampling_placement="process", emulated_step_ms=0)
    (first,) = stage.handle([prefill(1, new_row(0))], 0)
    right = answer(first)
    wrong = StepTokens(1, right.rows, i32_bytes(i32(right.token_ids) + 1))
    (second,) = stage.handle([wrong, decode(2, 0)], 0)
    assert tokens_of_row([answer(second)], 0) != predict_tokens(PROMPT, 2, CHOICES)[1:]


def test_one_half_batch_runs_while_the_other_is_sampled() -> None:
    stage = make_stage(sampling_placement="process")
    first_half = prefill(1, new_row(0))
    other_half = prefill(2, new_row(1, [9]))
    stage.handle([first_half, other_half], 0)
    (first,) = stage.handle([], 10 * MS)
    assert isinstance(first, StepLogits) and first.step_id == 1
    assert stage.wakeup_ns() == 20 * MS


# ── around it ────────────────────────────────────────────────────────────────────────────────


def test_each_token_has_a_text_of_its_own() -> None:
    facts = read_model_facts(embedded_model())
    choices = load_choices(make_config(model="embedded", facts=facts))
    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    texts = [tokenizer.decode([token_id], skip_special_tokens=True) for token_id in choices]
    assert len(texts) > 500
    assert all(text.strip().isalnum() for text in texts)


@pytest.mark.parametrize(
    ("vocab", "expected"),
    [
        ({"a": 0, "<s>": 1, "b": 2, "é": 3, "\u2581c": 4}, [0, 4]),
        ([["a", -1.0], ["<s>", 0], ["b", 0]], [0]),
    ],
)
def test_choices_of_both_kinds_of_vocabulary(
    vocab: object, expected: list[int], tmp_path: Path
) -> None:
    tokenizer = {"model": {"vocab": vocab}, "added_tokens": [{"id": 2, "content": "b"}]}
    (tmp_path / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    choices = load_choices(make_config(model=str(tmp_path)))
    assert choices.tolist() == expected


def test_without_a_tokenizer_only_the_ends_are_excluded(tmp_path: Path) -> None:
    choices = load_choices(make_config(model=str(tmp_path)))
    assert choices.tolist() == [0, 1, *range(3, VOCAB_SIZE)]


def test_there_are_blocks_for_every_row() -> None:
    facts = emulated_facts(make_config(max_model_len=100, block_size=16), incarnation=4)
    assert facts == ExecutorFacts(8 * 7 + 1, 16, VOCAB_SIZE, 4)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, executor_svc.main, scheduler_svc.main, sampler_svc.main;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_context_longer_than_the_models_is_for_the_emulated_device_only() -> None:
    settings = {"max_model_len": "100000", "run_dir": "/nowhere"}
    config = build_config({**settings, "device": "emulated", "emulated_step_ms": "0.5"}, {})
    assert (config.max_model_len, config.emulated_step_ms) == (100_000, 0.5)
    with pytest.raises(ConfigError, match="--max-model-len"):
        build_config(settings, {})
    with pytest.raises(ConfigError, match="--emulated-step-ms is at least 0"):
        build_config({**settings, "device": "emulated", "emulated_step_ms": "-1"}, {})
