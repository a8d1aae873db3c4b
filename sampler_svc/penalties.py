"""Repetition, frequency and presence penalties, and the token counts that they need.

Only rows that use a penalty have counts: each takes a slot of tables that grow on demand. Each
slot also lists the tokens it has seen, so that a step touches those and not the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_svc.uploads import Upload, upload_to
from stages.columns import Int32Array


@dataclass(frozen=True)
class PenaltyRows:
    """The rows of a batch that are penalized.

    index: int64 [n], their places in the batch; slots: int64 [n] on the host, their places in
    `PenaltyCounts`; repetition, frequency, presence: float32 [n, 1].
    """

    index: Tensor
    slots: NDArray[np.int64]
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


class PenaltyCounts:
    """Which tokens each slot has seen.

    Invariant: for a taken slot `output_counts[slot, t]` is how often t is among the outputs,
    `in_prompt[slot, t]` whether it is in the prompt, and the first `num_seen[slot]` entries of
    `seen_ids[slot]` name every such t, some twice; the entries behind them are 0.
    """

    def __init__(self, vocab_size: int, device: torch.device, upload: Upload | None = None) -> None:
        self._upload = upload or upload_to(device)
        self._free: list[int] = []
        self._output_counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._seen_ids = torch.zeros((0, 256), dtype=torch.int64, device=device)
        self._num_seen = np.zeros(0, dtype=np.int64)

    def take(self, prompt_token_ids: Int32Array, output_token_ids: Int32Array) -> int:
        """Take a slot and fill it from a request's tokens so far."""
        if not self._free:
            self._add_slots()
        slot = self._free.pop()
        outputs, prompt = self._tensor(output_token_ids), self._tensor(prompt_token_ids)
        ones = torch.ones_like(outputs, dtype=torch.int32)
        self._output_counts[slot].zero_().index_add_(0, outputs, ones)
        self._in_prompt[slot].zero_()[prompt] = True
        seen = np.union1d(prompt_token_ids, output_token_ids)
        self._num_seen[slot] = len(seen)
        self._make_room(len(seen))
        self._seen_ids[slot].zero_()[: len(seen)] = self._tensor(seen)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def count(self, slots: NDArray[np.int64], token_ids: Tensor) -> None:
        """Count one new output token for each slot: int64 [n] both, no slot twice."""
        num_seen = self._num_seen[slots]
        self._make_room(int(num_seen.max()) + 1)
        places = self._tensor(slots)
        self._output_counts[places, token_ids] += 1
        self._seen_ids[places, self._tensor(num_seen)] = token_ids
        self._num_seen[slots] += 1

    def penalize(self, logits: Tensor, rows: PenaltyRows) -> None:
        """Penalize the logits float32 [m, vocab] of `rows` in place.

        Repetition is the formula of CTRL (Keskar et al., 2019) as in transformers, over prompt and
        outputs; frequency and presence are OpenAI's, over the outputs.
        """
        slots = self._tensor(rows.slots)
        # Ids that are listed twice, the zeros at the end too, get the same value twice.
        ids = self._seen_ids[slots, : int(self._num_seen[rows.slots].max())]
        counts = self._output_counts[slots[:, None], ids]
        is_output = counts > 0
        is_seen = is_output | self._in_prompt[slots[:, None], ids]
        seen = logits[rows.index[:, None], ids]
        repeated = torch.where(seen > 0, seen / rows.repetition, seen * rows.repetition)
        seen = torch.where(is_seen, repeated, seen)
        seen = seen - rows.frequency * counts - rows.presence * is_output
        logits[rows.index[:, None], ids] = seen

    def _tensor(self, ids: NDArray[np.integer]) -> Tensor:
        return self._upload(ids.astype(np.int64, copy=False))

    def _add_slots(self) -> None:
        num_slots = len(self._num_seen)
        num_new = max(4, num_slots)
        self._free.extend(range(num_slots, num_slots + num_new))
        self._output_counts = _pad(self._output_counts, (0, 0, 0, num_new))
        self._in_prompt = _pad(self._in_prompt, (0, 0, 0, num_new))
        self._seen_ids = _pad(self._seen_ids, (0, 0, 0, num_new))
        self._num_seen = np.pad(self._num_seen, (0, num_new))

    def _make_room(self, num_seen: int) -> None:
        width = self._seen_ids.shape[1]
        if num_seen > width:
            self._seen_ids = _pad(self._seen_ids, (0, max(width, num_seen - width)))


def _pad(table: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Append zeros; sizes as in `torch.nn.functional.pad`: (left, right, top, bottom)."""
    return torch.nn.functional.pad(table, sizes)
