"""Repetition, frequency and presence penalties, and the token counts that they need.

Only rows that use a penalty have counts: each takes a slot of a table that grows on demand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.columns import Int32Array


@dataclass(frozen=True)
class PenaltyRows:
    """The rows of a batch that are penalized.

    index: int64 [n], their places in the batch; slots: int64 [n], their places in
    `PenaltyCounts`; repetition, frequency, presence: float32 [n, 1].
    """

    index: Tensor
    slots: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


class PenaltyCounts:
    """Which tokens each slot has seen.

    Invariant: for a taken slot `output_counts[slot, t]` is how often t is among the outputs and
    `in_prompt[slot, t]` whether it is in the prompt.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._free: list[int] = []
        self._output_counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)

    def take(self, prompt_token_ids: Int32Array, output_token_ids: Int32Array) -> int:
        """Take a slot and fill it from a request's tokens so far."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        counts, in_prompt = self._output_counts[slot], self._in_prompt[slot]
        outputs = torch.tensor(output_token_ids, dtype=torch.int64, device=counts.device)
        prompt = torch.tensor(prompt_token_ids, dtype=torch.int64, device=counts.device)
        counts.zero_().index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))
        in_prompt.zero_()[prompt] = True
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def count(self, slots: Tensor, token_ids: Tensor) -> None:
        """Count one new output token for each slot: int64 [n] both, no slot twice."""
        self._output_counts[slots, token_ids] += 1

    def penalize(self, logits: Tensor, rows: PenaltyRows) -> Tensor:
        """Return the penalized logits float32 [n, vocab] of `rows`.

        Repetition is the formula of CTRL (Keskar et al., 2019) as in transformers, over prompt and
        outputs; frequency and presence are OpenAI's, over the outputs.
        """
        counts = self._output_counts[rows.slots]
        is_output = counts > 0
        is_seen = is_output | self._in_prompt[rows.slots]
        repeated = torch.where(logits > 0, logits / rows.repetition, logits * rows.repetition)
        logits = torch.where(is_seen, repeated, logits)
        return logits - rows.frequency * counts - rows.presence * is_output

    def _grow(self) -> None:
        num_slots = len(self._output_counts)
        num_new = max(4, num_slots)
        self._free.extend(range(num_slots, num_slots + num_new))
        self._output_counts = _append_rows(self._output_counts, num_new)
        self._in_prompt = _append_rows(self._in_prompt, num_new)


def _append_rows(table: Tensor, num_rows: int) -> Tensor:
    return torch.cat([table, table.new_zeros((num_rows, table.shape[1]))])
