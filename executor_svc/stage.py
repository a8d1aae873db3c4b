"""The executor: applies plans to its rows, runs the forward pass, gives tokens or logits.

Holds weights and KV cache; knows no text, no client, and no reason why a row is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from executor_svc.kv_cache import KvCache
from executor_svc.models.model import GreedyModel, Model
from executor_svc.rows import PromptSpan, RowTable, StepInputs
from sampler_svc.sampling import RowSampler, SampledTokens, prompt_logprobs
from stages.columns import Int32Array, i32, i32_bytes
from stages.config import ServerConfig
from stages.messages import (
    BeginEpoch,
    ExecuteStep,
    Message,
    StepLogits,
    StepPromptLogprobs,
    StepTokens,
)


class ExecutorStage:
    """Placement `device`: samples right behind the logits and publishes `StepTokens`.

    Placement `process`: publishes `StepLogits`; the sampler answers with `StepTokens`, and a step
    starts when the tokens of its decoding rows are there. The scheduler alternates two halves of
    the batch, so that the next step's mostly are.
    """

    def __init__(self, config: ServerConfig, model: Model, kv_cache: KvCache) -> None:
        self._config = config
        self._model = model
        self._greedy_model = model if isinstance(model, GreedyModel) else None
        self._kv_cache = kv_cache
        self._vocab_size = config.facts.vocab_size
        self._samples_here = config.sampling_placement == "device"
        self._num_steps = 0
        self._num_tokens = 0
        self._waiting: deque[ExecuteStep] = deque()
        self._rows, self._sampler = self._make_rows()

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Free every row; the KV cache keeps its content, which the scheduler may still use."""
        self._waiting.clear()
        self._rows, self._sampler = self._make_rows()

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Run the steps that can run; see `Stage.handle`."""
        said: list[Message] = []
        for message in messages:
            if isinstance(message, ExecuteStep):
                self._waiting.append(message)
            elif isinstance(message, StepTokens) and not self._samples_here:
                self._rows.receive_tokens(message)
            while self._waiting and self._can_run(self._waiting[0]):
                said += self._execute(self._waiting.popleft())
        return said

    def progress(self) -> int:
        """Steps done."""
        return self._num_steps

    def queue_len(self) -> int:
        """Steps that wait for tokens of the one before."""
        return len(self._waiting)

    def stats(self) -> dict[str, float]:
        """See `Stage.stats`."""
        return {
            "executor_steps_total": self._num_steps,
            "executor_tokens_total": self._num_tokens,
        }

    def _can_run(self, step: ExecuteStep) -> bool:
        return self._samples_here or self._rows.has_inputs(step)

    def _make_rows(self) -> tuple[RowTable, RowSampler]:
        config = self._config
        rows = RowTable(config.max_num_seqs, config.max_model_len, self._kv_cache.block_size)
        kernels = config.cpu_kernels
        return rows, RowSampler(config.max_num_seqs, self._vocab_size, "cpu", kernels=kernels)

    @torch.inference_mode()
    def _execute(self, step: ExecuteStep) -> list[Message]:
        inputs = self._rows.apply(step)
        self._num_steps += 1
        self._num_tokens += inputs.batch.num_tokens
        if self._samples_here:
            return self._execute_and_sample(step, inputs)
        logits = self._model.forward(inputs.batch, self._kv_cache)
        self._rows.await_tokens(step.step_id, inputs.sampled_rows)
        rows, data = i32_bytes(inputs.sampled_rows), _to_sample(inputs, logits).numpy().tobytes()
        step_logits = StepLogits(step.step_id, rows, self._vocab_size, data)
        return [*_prompt_records(step, inputs, logits), step_logits]

    def _execute_and_sample(self, step: ExecuteStep, inputs: StepInputs) -> list[Message]:
        rows = inputs.sampled_rows
        self._sampler.release(i32(step.released_rows))
        for new in step.new_rows:
            self._sampler.admit(new)
        needs_logits = inputs.prompt_spans or self._sampler.needs_logits(rows)
        if self._greedy_model is not None and not needs_logits:
            chosen = self._greedy_model.forward_greedy(inputs.batch, self._kv_cache)
            return self._publish(step, rows, self._sampler.take_greedy(chosen, rows))
        logits = self._model.forward(inputs.batch, self._kv_cache)
        sampled = self._sampler.sample(_to_sample(inputs, logits), rows)
        return [*_prompt_records(step, inputs, logits), *self._publish(step, rows, sampled)]

    def _publish(
        self, step: ExecuteStep, rows: Int32Array, sampled: SampledTokens
    ) -> list[Message]:
        token_ids = sampled.token_ids.numpy().astype(np.int32)
        self._rows.set_last_tokens(rows, token_ids)
        self._sampler.note_tokens(rows, token_ids)
        tokens = StepTokens(step.step_id, i32_bytes(rows), i32_bytes(token_ids))
        if sampled.logprobs is None:
            return [tokens]
        return [sampled.logprobs.to_message(step.step_id), tokens]


def _to_sample(inputs: StepInputs, logits: Tensor) -> Tensor:
    return logits[: len(inputs.sampled_rows)]


def _prompt_records(
    step: ExecuteStep, inputs: StepInputs, logits: Tensor
) -> list[StepPromptLogprobs]:
    return [_prompt_record(step.step_id, span, logits) for span in inputs.prompt_spans]


def _prompt_record(step_id: int, span: PromptSpan, logits: Tensor) -> StepPromptLogprobs:
    count = len(span.next_token_ids)
    next_token_ids = torch.from_numpy(span.next_token_ids.astype(np.int64))
    own = logits[span.first_logit : span.first_logit + count]
    columns = prompt_logprobs(own, next_token_ids, span.num_top)
    return span.to_message(step_id, columns)
