"""One step's work as the models and operators see it: a ragged batch of token spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The tokens that one sequence computes in a step.

    `start` is the position of the first of them; `block_ids` covers the whole context so far,
    these tokens included.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]


@dataclass(frozen=True)
class ForwardBatch:
    """Prefill chunks and decode rows of n sequences, T tokens in all, in one forward pass.

    The first `num_decode_rows` sequences have exactly one token each. The host-side copies of
    lengths are there so that no kernel has to read a tensor back.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: block_id * block_size + offset; block 0 discards
    query_start: Tensor  # [n + 1] int32: first token of each sequence
    seq_lens: Tensor  # [n] int32: context length, this step's tokens included
    block_tables: Tensor  # [n, max_blocks] int32, padded with the null block 0
    logits_indices: Tensor  # [m] int64: the tokens whose logits are wanted
    query_lens_host: tuple[int, ...]
    seq_lens_host: tuple[int, ...]
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device) -> ForwardBatch:
        """The same batch with its tensors on `device`."""
        tensors: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)
        }
        return replace(self, **tensors)

    @classmethod
    def from_spans(cls, spans: Sequence[Span], block_size: int) -> ForwardBatch:
        """Build a batch on the CPU that asks for the logits of each span's last token."""
        query_lens = tuple(len(span.token_ids) for span in spans)
        seq_lens = tuple(span.start + len(span.token_ids) for span in spans)
        positions = [range(span.start, end) for span, end in zip(spans, seq_lens, strict=True)]
        slots = [
            span.block_ids[position // block_size] * block_size + position % block_size
            for span, own in zip(spans, positions, strict=True)
            for position in own
        ]
        width = max(len(span.block_ids) for span in spans)
        tables = [[*span.block_ids, *[0] * (width - len(span.block_ids))] for span in spans]
        starts = [0, *accumulate(query_lens)]
        return cls(
            token_ids=_int64(chain.from_iterable(span.token_ids for span in spans)),
            positions=_int64(chain.from_iterable(positions)),
            slot_mapping=_int64(slots),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logits_indices=_int64(end - 1 for end in starts[1:]),
            query_lens_host=query_lens,
            seq_lens_host=seq_lens,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            num_decode_rows=_num_leading_ones(query_lens),
        )


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _num_leading_ones(query_lens: Sequence[int]) -> int:
    return next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens))
