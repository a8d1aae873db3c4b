"""Turns the logits of a step into its tokens: the sampler of both placements.

Owns each row's sampling state (outputs so far, penalty counts) and nothing of requests or text.
Same seed, same tokens: on the device next to the logits and in the sampler stage.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.bad_words import Ban
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
from sampler_svc.torch_head import DrawFromLikeliest, LikeliestKeeper, TorchHead
from sampler_svc.uploads import Upload, upload_to
from stages.columns import Int32Array, i32
from stages.messages import NewRow
from stages.native_library import AUTO

__all__ = [
    "DrawFromLikeliest",
    "LikeliestKeeper",
    "LogprobColumns",
    "RowSampler",
    "SampledLogprobs",
    "SampledTokens",
    "TorchHead",
    "prompt_logprobs",
]

# Halves of a batch take turns, and so do steps with and without the rows that lag.
NUM_BATCHES = 2


@dataclass(frozen=True)
class SampledTokens:
    """token_ids: int64 [m] on the sampler's device. logprobs: None where no row asked."""

    token_ids: Tensor
    logprobs: SampledLogprobs | None


class RowSampler:
    """Samples rows of a persistent batch, each by its own parameters.

    The order of operations is vLLM's: logit_bias, min_tokens and bad_words, repetition, frequency
    and presence penalty; then argmax where the temperature is 0, else temperature, min_p, top_k,
    top_p and one draw whose noise is a function of (seed, number of outputs so far) alone. Never
    reads a device tensor back, except that on the CPU it may.
    """

    def __init__(
        self,
        max_num_rows: int,
        vocab_size: int,
        device: torch.device | str,
        upload: Upload | None = None,
        head: SamplingHead | None = None,
        num_threads: int | None = None,
        kernels: str = AUTO,
    ) -> None:
        """`upload` and `head`: None for those of the device; num_threads: None for torch's.

        `kernels`: see `make_sampling_head`.
        """
        device = torch.device(device)
        num_threads = num_threads or torch.get_num_threads()
        self._upload = upload or upload_to(device)
        self._head = head or make_sampling_head(
            device, vocab_size, num_threads, self._upload, kernels
        )
        self._rows = SamplingRows(max_num_rows, vocab_size)
        self._counts = PenaltyCounts(vocab_size, device, self._upload)
        self._batches: deque[SamplingBatch] = deque(maxlen=NUM_BATCHES)

    def admit(self, new_row: NewRow) -> None:
        """Take a request into a free row and rebuild its state from its tokens so far."""
        self._batches.clear()
        self._rows.admit(new_row)
        if uses_penalties(new_row.params):
            token_ids = i32(new_row.token_ids)
            prompt, outputs = np.split(token_ids, [new_row.num_prompt_tokens])
            self._rows.penalty_slots[new_row.row] = self._counts.take(prompt, outputs)

    def release(self, rows: Int32Array) -> None:
        """Forget the requests in these rows: int32 [n], in most steps none."""
        if not len(rows):
            return
        self._batches.clear()
        self._rows.bad_words.release(rows)
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
        is_plain = batch.columns.is_greedy and not len(batch.with_logprobs)
        return is_edited or not is_plain or self._ban(batch) is not None

    def take_greedy(self, token_ids: Tensor, rows: Int32Array) -> SampledTokens:
        """Count tokens that the model chose itself, int64 [m], where no row needs logits."""
        self._rows.num_output[rows] += 1
        return SampledTokens(token_ids, None)

    def note_tokens(self, rows: Int32Array, token_ids: Int32Array) -> None:
        """Know the tokens of a step on the host, in the order of steps: int32 [m] both.

        Where no row has `bad_words` this may be left out. It must come before such a row's next
        `sample`, which is why the row lags where tokens are late.
        """
        self._rows.bad_words.note(rows, token_ids)

    def _batch_of(self, rows: Int32Array) -> SamplingBatch:
        """In steady decode the rows are those of one of the last steps, and so is their need."""
        for batch in self._batches:
            if np.array_equal(batch.rows, rows):
                return batch
        batch = self._rows.batch(rows, self._upload)
        self._batches.append(batch)
        return batch

    # ── edits of the logits ──────────────────────────────────────────────────────────────────

    def _edit(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        ban = self._ban(batch)
        if batch.bias is None and ban is None and batch.penalties is None:
            return logits
        logits = logits.clone()
        if batch.bias is not None:
            place = (batch.bias.index, batch.bias.ids)
            logits.index_put_(place, batch.bias.values, accumulate=True)
        if ban is not None:
            logits[self._upload(ban.places), self._upload(ban.ids)] = float("-inf")
        if batch.penalties is not None:
            self._counts.penalize(logits, batch.penalties)
        return logits

    def _ban(self, batch: SamplingBatch) -> Ban | None:
        """The tokens that must not come in this step; None for none, as in most steps."""
        bans: list[Ban] = []
        if batch.min_tokens is not None:
            bans.append(self._young(batch.min_tokens))
        if batch.bad_words is not None:
            bans.append(self._rows.bad_words.ban(batch.bad_words))
        bans = [ban for ban in bans if len(ban.ids)]
        return Ban(*map(np.concatenate, zip(*bans, strict=True))) if bans else None

    def _young(self, stops: MinTokens) -> Ban:
        """The stop tokens of rows that have not `min_tokens` yet."""
        is_young = self._rows.num_output[stops.rows] < stops.until
        return Ban(stops.index[is_young], stops.ids[is_young])

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
