"""Turns the logits of a step into its tokens: the sampler of both placements.

Owns each row's sampling state (outputs so far, penalty counts) and nothing of requests or text.
Same seed, same tokens: on the device next to the logits and in the sampler stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.logprobs import LogprobColumns, SampledLogprobs, prompt_logprobs
from sampler_svc.noise import uniform
from sampler_svc.penalties import PenaltyCounts
from sampler_svc.sampling_head import SamplingHead, make_sampling_head
from sampler_svc.sampling_rows import (
    NO_SLOT,
    MinTokens,
    SamplingBatch,
    SamplingRows,
    uses_penalties,
)
from sampler_svc.torch_head import DrawFromLikeliest, TorchHead
from sampler_svc.uploads import Upload, upload_to
from stages.columns import Int32Array, i32
from stages.messages import NewRow

__all__ = [
    "DrawFromLikeliest",
    "LogprobColumns",
    "RowSampler",
    "SampledLogprobs",
    "SampledTokens",
    "TorchHead",
    "prompt_logprobs",
]


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

    def __init__(
        self,
        max_num_rows: int,
        vocab_size: int,
        device: torch.device | str,
        upload: Upload | None = None,
        head: SamplingHead | None = None,
        num_threads: int | None = None,
    ) -> None:
        """`upload` and `head`: None for those of the device; num_threads: None for torch's."""
        device = torch.device(device)
        num_threads = num_threads or torch.get_num_threads()
        self._upload = upload or upload_to(device)
        self._head = head or make_sampling_head(device, vocab_size, num_threads, self._upload)
        self._rows = SamplingRows(max_num_rows, vocab_size)
        self._counts = PenaltyCounts(vocab_size, device, self._upload)
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
        uniforms = self._uniforms(batch)
        token_ids = self._head.choose(self._edit(logits, batch), batch.columns, uniforms)
        if batch.penalties is not None:
            self._counts.count(batch.penalties.slots, token_ids[batch.penalties.index])
        self._rows.num_output[rows] += 1
        return SampledTokens(token_ids, self._logprobs(logits, token_ids, batch))

    def needs_logits(self, rows: Int32Array) -> bool:
        """Whether more is wanted of a row than its likeliest token; int32 [m], as for `sample`."""
        batch = self._batch_of(rows)
        is_edited = batch.bias is not None or batch.penalties is not None
        is_banned = batch.min_tokens is not None and self._is_active(batch.min_tokens).any()
        is_plain = batch.columns.is_greedy and not len(batch.with_logprobs)
        return bool(is_edited or is_banned or not is_plain)

    def take_greedy(self, token_ids: Tensor, rows: Int32Array) -> SampledTokens:
        """Count tokens that the model chose itself, int64 [m], where no row needs logits."""
        self._rows.num_output[rows] += 1
        return SampledTokens(token_ids, None)

    def _batch_of(self, rows: Int32Array) -> SamplingBatch:
        """In steady decode the rows are those of the last step, and so is what they need."""
        if self._batch is None or not np.array_equal(self._batch.rows, rows):
            self._batch = self._rows.batch(rows, self._upload)
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

    def _is_active(self, ban: MinTokens) -> NDArray[np.bool_]:
        return self._rows.num_output[ban.rows] < ban.until

    def _ban(self, logits: Tensor, ban: MinTokens) -> None:
        is_active = self._is_active(ban)
        if is_active.any():
            index = self._upload(ban.index[is_active])
            ids = self._upload(ban.ids[is_active])
            logits[index, ids] = float("-inf")

    # ── the choice ───────────────────────────────────────────────────────────────────────────

    def _uniforms(self, batch: SamplingBatch) -> NDArray[np.float64]:
        if batch.columns.is_greedy:
            return np.zeros(len(batch.rows))
        return uniform(self._rows.seeds[batch.rows], self._rows.num_output[batch.rows])

    def _logprobs(
        self, logits: Tensor, token_ids: Tensor, batch: SamplingBatch
    ) -> SampledLogprobs | None:
        if not len(batch.with_logprobs):
            return None
        num_top = int(batch.num_top.max())
        columns = self._head.token_logprobs(logits, token_ids, batch.with_logprobs, num_top)
        return SampledLogprobs(batch.rows[batch.with_logprobs], batch.num_top, columns)
