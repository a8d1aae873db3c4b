"""What a step gives, on its way down: tensors that a device still computes, then messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from torch import Tensor

from executor_svc.accelerator.transfers import Transfers
from executor_svc.rows import PromptSpan
from sampler_svc.sampling import LogprobColumns, SampledLogprobs
from stages.columns import Int32Array, i32_bytes
from stages.messages import Message, StepLogits, StepTokens


@dataclass(frozen=True)
class StepResult:
    """Of `token_ids` int64 [m] and `logits` float32 [m, vocab] one is there, by placement."""

    step_id: int
    rows: Int32Array
    token_ids: Tensor | None = None
    logits: Tensor | None = None
    logprobs: SampledLogprobs | None = None
    prompts: Sequence[tuple[PromptSpan, LogprobColumns]] = ()

    def to_messages(self) -> list[Message]:
        """Pack what has arrived in host memory; log-probabilities come before the tokens."""
        said: list[Message] = [
            span.to_message(self.step_id, columns) for span, columns in self.prompts
        ]
        if self.logprobs is not None:
            said.append(self.logprobs.to_message(self.step_id))
        rows = i32_bytes(self.rows)
        if self.token_ids is not None:
            token_ids = i32_bytes(self.token_ids.numpy().astype(np.int32))
            said.append(StepTokens(self.step_id, rows, token_ids))
        elif self.logits is not None:
            vocab_size = self.logits.shape[1]
            said.append(StepLogits(self.step_id, rows, vocab_size, self.logits.numpy().tobytes()))
        return said


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device has been given.

    `result` lies in host memory from the moment of `arrived` on; until then `on_device` keeps what
    it is copied from. `started` and `ended`: timing events around its kernels.
    """

    result: StepResult
    num_tokens: int
    started: Any
    ended: Any
    arrived: Any
    on_device: Sequence[Tensor] = field(repr=False)


def bring_down(
    result: StepResult, num_tokens: int, started: Any, ended: Any, transfers: Transfers
) -> LaunchedStep:
    """Start copying a result to host memory."""
    tensors = _tensors(result)
    copies, arrived = transfers.download(tensors)
    said = _with_tensors(result, copies)
    return LaunchedStep(said, num_tokens, started, ended, arrived, tensors)


def _tensors(result: StepResult) -> list[Tensor]:
    tensors = [part for part in (result.token_ids, result.logits) if part is not None]
    if result.logprobs is not None:
        tensors += result.logprobs.columns
    return [*tensors, *chain.from_iterable(columns for _, columns in result.prompts)]


def _with_tensors(result: StepResult, tensors: Iterable[Tensor]) -> StepResult:
    """The same result with other tensors, in the order of `_tensors`."""
    left = iter(tensors)

    def columns() -> LogprobColumns:
        return LogprobColumns(*islice(left, len(LogprobColumns._fields)))

    return StepResult(
        step_id=result.step_id,
        rows=result.rows,
        token_ids=None if result.token_ids is None else next(left),
        logits=None if result.logits is None else next(left),
        logprobs=result.logprobs and replace(result.logprobs, columns=columns()),
        prompts=[(span, columns()) for span, _ in result.prompts],
    )
