"""When a step gives logits to the sampler, and when the model names the likeliest tokens itself."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, KvSpec, allocate_kv_cache
from executor_svc.stage import ExecutorStage
from stages.columns import i32, i32_bytes
from stages.config import ModelFacts, ServerConfig
from stages.messages import ExecuteStep, Message, NewRow, SamplingParams, StepTokens

PROMPT = [3, 1, 4]
VOCAB_SIZE = 50


class CountingModel:
    """Its next token is always the current one plus one; counts which way it was asked."""

    kv_spec = KvSpec(1, 1, 2, torch.float32)

    def __init__(self) -> None:
        self.asked: list[str] = []

    def forward(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        self.asked.append("logits")
        logits = torch.zeros(len(batch.logits_indices), VOCAB_SIZE)
        logits[torch.arange(len(logits)), self._next_tokens(batch)] = 9.0
        return logits

    def _next_tokens(self, batch: ForwardBatch) -> Tensor:
        return batch.token_ids[batch.logits_indices] + 1


class ChoosingModel(CountingModel):
    def forward_greedy(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        self.asked.append("tokens")
        return self._next_tokens(batch)


def _stage(model: CountingModel, **changes: object) -> ExecutorStage:
    config = ServerConfig(
        model="m",
        served_model_name="m",
        facts=ModelFacts("", VOCAB_SIZE, 512, [2]),
        run_dir="/nowhere",
        max_num_seqs=4,
        max_model_len=64,
    )
    config = msgspec.structs.replace(config, **changes)
    return ExecutorStage(config, model, allocate_kv_cache(model.kv_spec, 8, 16))


def _admit(row: int, params: SamplingParams) -> NewRow:
    return NewRow(
        row, row + 100, i32_bytes(PROMPT), len(PROMPT), 0, 0, i32_bytes([1 + row]), params
    )


def _prefill(stage: ExecutorStage, *params: SamplingParams) -> list[Message]:
    """The step that computes the prompts of new rows 0, 1, ..."""
    rows = [*range(len(params))]
    step = ExecuteStep(
        1,
        new_rows=[_admit(row, own) for row, own in enumerate(params)],
        prefill_rows=i32_bytes(rows),
        prefill_lens=i32_bytes([len(PROMPT)] * len(rows)),
    )
    return stage.handle([step], 0)


def _tokens(said: list[Message]) -> list[int]:
    return [id for one in said if isinstance(one, StepTokens) for id in i32(one.token_ids).tolist()]


GREEDY = SamplingParams(temperature=0.0)


def test_a_greedy_step_asks_the_model_for_tokens() -> None:
    model = ChoosingModel()
    stage = _stage(model)
    assert _tokens(_prefill(stage, GREEDY, GREEDY)) == [5, 5]
    decode = ExecuteStep(2, started_rows=i32_bytes([0, 1]))
    assert _tokens(stage.handle([decode], 0)) == [6, 6]
    assert model.asked == ["tokens", "tokens"]


def test_a_model_that_cannot_choose_gives_logits() -> None:
    model = CountingModel()
    assert _tokens(_prefill(_stage(model), GREEDY)) == [5]
    assert model.asked == ["logits"]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=0.0, logprobs=1),
        SamplingParams(temperature=0.0, prompt_logprobs=0),
        SamplingParams(temperature=0.0, presence_penalty=1.0),
        SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=i32_bytes([7])),
    ],
)
def test_one_row_that_needs_logits_gets_them_for_all(params: SamplingParams) -> None:
    model = ChoosingModel()
    assert _tokens(_prefill(_stage(model), GREEDY, params)) == [5, 5]
    assert model.asked == ["logits"]


def test_tokens_chosen_by_the_model_count_as_outputs() -> None:
    """Row 1 may end after two tokens: its ban is over when the model has chosen two."""
    model = ChoosingModel()
    stage = _stage(model)
    until_two = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=i32_bytes([40]))
    _prefill(stage, GREEDY, until_two)
    decode = ExecuteStep(2, started_rows=i32_bytes([0, 1]))
    for step_id in (2, 3):
        stage.handle([decode if step_id == 2 else ExecuteStep(step_id)], 0)
    assert model.asked == ["logits", "logits", "tokens"]


def test_the_sampler_process_always_gets_logits() -> None:
    model = ChoosingModel()
    _prefill(_stage(model, sampling_placement="process"), GREEDY)
    assert model.asked == ["logits"]
