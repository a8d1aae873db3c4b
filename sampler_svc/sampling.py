"""Turns the logits of a step into its tokens: the sampler of both placements.

Owns each row's sampling state (outputs so far, penalty counts) and nothing of requests or text.
Same seed, same tokens: on the device next to the logits and in the sampler stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sampler_svc.draw import draw_from_all, draw_from_top_k, draw_from_top_p, token_weights
from sampler_svc.logprobs import (
    LogprobColumns,
    SampledLogprobs,
    prompt_logprobs,
    token_logprobs,
)
from sampler_svc.noise import uniform
from sampler_svc.penalties import PenaltyCounts
from sampler_svc.sampling_rows import (
    NO_SLOT,
    DrawGroup,
    MinTokens,
    RandomRows,
    SamplingBatch,
    SamplingRows,
    uses_penalties,
)
from stages.columns import Int32Array, i32
from stages.messages import NewRow

__all__ = ["LogprobColumns", "RowSampler", "SampledLogprobs", "SampledTokens", "prompt_logprobs"]


@dataclass(frozen=True)
class SampledTokens:
    """token_ids: int64 [m] on the sampler's device. logprobs: None where no row asked."""

    token_ids: Tensor
    logprobs: SampledLogprobs | None


class RowSampler:
    """Samples rows of a persistent batch, each by its own parameters.

    The order of operations is vLLM's: logit_bias, min_tokens, repetition, frequency and presence
    penalty; then argmax where the temperature is 0, else temperature, min_p, top_k, top_p and one
    draw whose noise is a function of (seed, number of outputs so far) alone. Never reads a device
    tensor back, except that on the CPU it may.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._rows = SamplingRows(max_num_rows, vocab_size)
        self._counts = PenaltyCounts(vocab_size, self._device)
        self._batch: SamplingBatch | None = None

    def admit(self, new_row: NewRow) -> None:
        """Take a request into a free row and rebuild its state from its tokens so far."""
        self._batch = None
        self._rows.admit(new_row)
        if uses_penalties(new_row.params):
            token_ids = i32(new_row.token_ids)
            prompt, outputs = np.split(token_ids, [new_row.num_prompt_tokens])
            self._rows.penalty_slots[new_row.row] = self._counts.take(prompt, outputs)

    def release(self, rows: Int32Array) -> None:
        """Forget the requests in these rows: int32 [n], in most steps none."""
        if not len(rows):
            return
        self._batch = None
        slots = self._rows.penalty_slots[rows]
        for slot in slots[slots != NO_SLOT].tolist():
            self._counts.release(slot)
        self._rows.penalty_slots[rows] = NO_SLOT

    def sample(self, logits: Tensor, rows: Int32Array) -> SampledTokens:
        """Draw the next token of each row and count it as an output.

        logits: float32 [m, vocab] on the sampler's device, never written to; rows: int32 [m] on
        the host, no row twice.
        """
        batch = self._batch_of(rows)
        token_ids = self._choose(self._edit(logits, batch), batch)
        if batch.penalties is not None:
            self._counts.count(batch.penalties.slots, token_ids[batch.penalties.index])
        self._rows.num_output[rows] += 1
        return SampledTokens(token_ids, self._logprobs(logits, token_ids, batch))

    def _batch_of(self, rows: Int32Array) -> SamplingBatch:
        """In steady decode the rows are those of the last step, and so is what they need."""
        if self._batch is None or not np.array_equal(self._batch.rows, rows):
            self._batch = self._rows.batch(rows, self._device)
        return self._batch

    # ── edits of the logits ──────────────────────────────────────────────────────────────────

    def _edit(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        if batch.bias is None and batch.min_tokens is None and batch.penalties is None:
            return logits
        logits = logits.clone()
        if batch.bias is not None:
            place = (batch.bias.index, batch.bias.ids)
            logits.index_put_(place, batch.bias.values, accumulate=True)
        if batch.min_tokens is not None:
            self._ban(logits, batch.min_tokens)
        if batch.penalties is not None:
            self._counts.penalize(logits, batch.penalties)
        return logits

    def _ban(self, logits: Tensor, ban: MinTokens) -> None:
        is_active = self._rows.num_output[ban.rows] < ban.until
        if is_active.any():
            index = torch.from_numpy(ban.index[is_active]).to(self._device)
            ids = torch.from_numpy(ban.ids[is_active]).to(self._device)
            logits[index, ids] = float("-inf")

    # ── the choice ───────────────────────────────────────────────────────────────────────────

    def _choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        random = batch.random
        if random is None:
            return _argmax(logits)
        if random.index is None:
            return self._draw(logits, random)
        token_ids = _argmax(logits)
        token_ids[random.index] = self._draw(logits[random.index], random)
        return token_ids

    def _draw(self, logits: Tensor, random: RandomRows) -> Tensor:
        weights = token_weights(logits, random.temperatures, random.min_p)
        noise = uniform(self._rows.seeds[random.rows], self._rows.num_output[random.rows])
        uniforms = torch.from_numpy(noise).to(self._device)
        if random.groups[0].index is None:
            return _draw_group(weights, uniforms, random.groups[0])
        token_ids = torch.empty(len(weights), dtype=torch.int64, device=self._device)
        for group in random.groups:
            token_ids[group.index] = _draw_group(weights[group.index], uniforms[group.index], group)
        return token_ids

    def _logprobs(
        self, logits: Tensor, token_ids: Tensor, batch: SamplingBatch
    ) -> SampledLogprobs | None:
        if not len(batch.with_logprobs):
            return None
        if len(batch.with_logprobs) < len(batch.rows):
            index = torch.from_numpy(batch.with_logprobs).to(self._device)
            logits, token_ids = logits[index], token_ids[index]
        columns = token_logprobs(logits, token_ids, int(batch.num_top.max()))
        return SampledLogprobs(batch.rows[batch.with_logprobs], batch.num_top, columns)


def _draw_group(weights: Tensor, uniforms: Tensor, group: DrawGroup) -> Tensor:
    if group.top_k is not None:
        return draw_from_top_k(weights, uniforms, group.top_k, group.top_p, group.max_top_k)
    if group.top_p is not None:
        return draw_from_top_p(weights, uniforms, group.top_p)
    return draw_from_all(weights, uniforms)


def _argmax(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first among equals: int64 [m]."""
    if logits.device.type == "cpu":
        # NumPy's argmax is vectorized, torch's is not: 2 against 27 us for 32k tokens.
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)
