"""A paged attention call on random data, and the same attention computed plainly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch_npu
from torch import Tensor


def causal_mask() -> Tensor:
    """The constant mask that sparse modes 3 and 4 take: int8 [2048, 2048], 1 is hidden."""
    return torch.triu(torch.ones(2048, 2048, dtype=torch.int8), 1).npu()


@dataclass
class PagedCall:
    """Arguments of npu_fused_infer_attention_score in TND layout; tests change one of them."""

    query_lens: list[int]
    seq_lens: list[int]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        most = max(-(-length // self.block_size) for length in self.seq_lens)
        num_blocks = 1 + most * len(self.seq_lens)
        shape = (num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        self.key = torch.randn(shape, generator=generator).to(self.dtype)
        self.value = torch.randn(shape, generator=generator).to(self.dtype)
        size = (sum(self.query_lens), self.num_heads, self.head_dim)
        self.query = torch.randn(size, generator=generator).to(self.dtype)
        order = 1 + torch.randperm(num_blocks - 1, generator=generator)
        self.block_table = order.view(len(self.seq_lens), most).int()

    def arguments(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "query": self.query.npu(),
            "key": self.key.flatten(2).npu(),
            "value": self.value.flatten(2).npu(),
            "block_table": self.block_table.npu(),
            "atten_mask": causal_mask(),
            "input_layout": "TND",
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "scale": self.head_dim**-0.5,
            "sparse_mode": 3,
            "block_size": self.block_size,
            "actual_seq_lengths": torch.tensor(self.query_lens).cumsum(0).tolist(),
            "actual_seq_lengths_kv": self.seq_lens,
        }
        return own | self.changes

    def run(self) -> Tensor:
        out, _ = torch_npu.npu_fused_infer_attention_score(**self.arguments())
        return out

    def context(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence: float32 [length, num_kv_heads, head_dim]."""
        blocks = self.block_table[row].long()
        length = self.seq_lens[row]
        key, value = (
            part[blocks].flatten(0, 1)[:length].float() for part in (self.key, self.value)
        )
        return key, value

    def expected(self, window: int | None = None) -> tuple[Tensor, Tensor]:
        """The results [T, H, D] and the log sums [T, H] of causal attention, in float32."""
        parts = torch.split(self.query.float(), self.query_lens)
        each = [self._attend(query, *self.context(row), window) for row, query in enumerate(parts)]
        return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        group = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.head_dim**-0.5
        position = torch.arange(len(key) - len(query), len(key))[:, None]
        other = torch.arange(len(key))
        visible = other <= position
        if window is not None:
            visible &= other >= position - window
        scores = scores.masked_fill(~visible, float("-inf"))
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        return out, scores.logsumexp(-1).T
