"""Log-probabilities of the model's own distribution: before penalties, bias and temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stages.columns import Int32Array, f32_bytes, i32_bytes
from stages.messages import StepLogprobs


class LogprobColumns(NamedTuple):
    """Log-probabilities of n tokens with k alternatives each, the most likely first.

    logprobs float32 [n], ranks int32 [n] (1 = most likely), top_ids int32 [n, k],
    top_logprobs float32 [n, k].
    """

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class SampledLogprobs:
    """Log-probabilities of the rows of a step that asked for them.

    rows, num_top: int32 [n] on the host; a row wants the first `num_top` of its k alternatives.
    """

    rows: Int32Array
    num_top: Int32Array
    columns: LogprobColumns

    def to_message(self, step_id: int) -> StepLogprobs:
        """Pack the columns; waits for the device."""
        columns = LogprobColumns(*(column.cpu() for column in self.columns))
        num_columns = columns.top_ids.shape[1]
        wanted = torch.arange(num_columns) < torch.tensor(self.num_top)[:, None]
        return StepLogprobs(
            step_id=step_id,
            rows=i32_bytes(self.rows),
            logprobs=f32_bytes(columns.logprobs.numpy()),
            ranks=i32_bytes(columns.ranks.numpy()),
            num_top=i32_bytes(self.num_top),
            top_ids=i32_bytes(columns.top_ids[wanted].numpy()),
            top_logprobs=f32_bytes(columns.top_logprobs[wanted].numpy()),
        )


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobColumns:
    """Give the log-probabilities of `token_ids` int64 [n] under raw logits float32 [n, vocab]."""
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(-1, token_ids[:, None])
    ranks = (logits > chosen).sum(dim=-1, dtype=torch.int32) + 1
    top = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
    return LogprobColumns(
        (chosen - log_total).squeeze(-1),
        ranks,
        top.indices.to(torch.int32),
        top.values - log_total,
    )


def prompt_logprobs(logits: Tensor, next_token_ids: Tensor, num_top: int) -> LogprobColumns:
    """Give the log-probability of each prompt token under the logits of the one before it.

    logits: float32 [n, vocab] of consecutive prompt positions; next_token_ids: int64 [n], the
    tokens that follow them.
    """
    return token_logprobs(logits, next_token_ids, num_top)
