"""Placement `process`: samples on the host from the logits that came through the ring.

The only part of the sampler stage that needs torch; imported when the placement asks for it.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from sampler_svc.sampling import RowSampler
from stages.columns import Int32Array, f32, i32, i32_bytes
from stages.messages import NewRow, StepLogits, StepLogprobs, StepTokens
from stages.native_library import AUTO


class HostSampler:
    """A `RowSampler` that speaks in messages."""

    def __init__(self, num_rows: int, vocab_size: int, kernels: str = AUTO) -> None:
        # The other threads of the machine are the executor's.
        self._sampler = RowSampler(num_rows, vocab_size, "cpu", num_threads=1, kernels=kernels)

    def admit(self, new_row: NewRow) -> None:
        """Take a request into a free row."""
        self._sampler.admit(new_row)

    def release(self, rows: Int32Array) -> None:
        """Forget the requests in these rows."""
        self._sampler.release(rows)

    @torch.inference_mode()
    def sample(self, record: StepLogits) -> tuple[StepTokens, StepLogprobs | None]:
        """Draw the tokens of a step."""
        logits = _as_tensor(f32(record.logits).reshape(-1, record.vocab_size))
        sampled = self._sampler.sample(logits, i32(record.rows))
        token_ids = sampled.token_ids.numpy().astype(np.int32)
        self._sampler.note_tokens(i32(record.rows), token_ids)
        tokens = StepTokens(record.step_id, record.rows, i32_bytes(token_ids))
        logprobs = sampled.logprobs
        return tokens, logprobs.to_message(record.step_id) if logprobs is not None else None


def _as_tensor(logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    with warnings.catch_warnings():
        # The bytes are read-only, which torch cannot express; the sampler never writes to logits.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(logits)
