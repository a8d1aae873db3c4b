"""Paged attention on the CPU: gather blocks into a workspace that stays warm, then torch SDPA.

Owns the per-step plan and the workspace; knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, LayerKv
from executor_svc.ops.interface import AttentionParams

# Keys and values gathered at once: what a core's caches hold. Larger groups of decode rows
# measure up to twice slower, and fresh memory for each (page faults) up to five times.
GROUP_BYTES = 4 << 20
# Queries per slice where scores are materialised (soft cap), which bounds that matrix.
CAPPED_QUERIES = 128


@dataclass(frozen=True)
class DecodeGroup:
    """Decode rows that attend together, padded to the longest of them: g rows, L slots each."""

    rows: Tensor  # [g] int64
    blocks: Tensor  # [g * K * L / block_size] int64, rows of a cache seen as [blocks * K, ...]
    unused: Tensor | None  # int64, gathered slots without a token, of [g * K * L]
    mask: Tensor | None  # [g, 1, 1, L], 0 or -inf


@dataclass(frozen=True)
class PrefillChunk:
    """One sequence's queries and the part of its context that they can see."""

    tokens: slice
    blocks: Tensor  # [K * n] int64
    context: slice  # of the n * block_size gathered slots
    mask: Tensor | None  # [Q, L], 0 or -inf; None means plainly causal with Q == L


class CpuAttentionPlan:
    """Index tensors of one step, made on first use for each kind of layer."""

    def __init__(self, batch: ForwardBatch, kv_cache: KvCache) -> None:
        self.batch = batch
        self._block_size = kv_cache.block_size
        self._dtype = kv_cache.spec.dtype
        self._block_bytes = kv_cache.spec.block_bytes(self._block_size) // kv_cache.spec.num_layers
        self._heads = torch.arange(kv_cache.spec.num_kv_heads)
        self._tables = batch.block_tables.long()
        self._starts = [0, *accumulate(batch.query_lens_host)]
        self._decode: dict[int | None, list[DecodeGroup]] = {}
        self._prefill: dict[tuple[int | None, bool], list[PrefillChunk]] = {}
        blocks = batch.slot_mapping // self._block_size
        offsets = batch.slot_mapping % self._block_size
        # [T * K] int64, rows of a cache seen as [blocks * K * block_size, D]
        self.slots = (self._head_rows(blocks) * self._block_size + offsets.unsqueeze(-1)).view(-1)

    def decode_groups(self, params: AttentionParams) -> list[DecodeGroup]:
        window = params.sliding_window
        if window not in self._decode:
            self._decode[window] = [self._group(rows, window) for rows in self._partition(window)]
        return self._decode[window]

    def prefill_chunks(self, params: AttentionParams) -> list[PrefillChunk]:
        # SDPA knows causality by itself; scores under a soft cap need it spelled out.
        key = params.sliding_window, params.soft_cap is not None
        if key not in self._prefill:
            rows = range(self.batch.num_decode_rows, len(self.batch.query_lens_host))
            self._prefill[key] = [self._chunk(row, *key) for row in rows]
        return self._prefill[key]

    def _head_rows(self, blocks: Tensor) -> Tensor:
        """Block ids [...] -> [..., K], rows of a cache seen as [blocks * K, block_size * D]."""
        return blocks.unsqueeze(-1) * self._heads.numel() + self._heads

    def _span(self, seq_len: int, window: int | None, num_queries: int = 1) -> range:
        """The indices into a block table that the last num_queries tokens can see."""
        first = 0 if window is None else max(0, seq_len - num_queries - window + 1)
        return range(first // self._block_size, -(-seq_len // self._block_size))

    def _partition(self, window: int | None) -> list[list[int]]:
        """Decode rows in groups of at most GROUP_BYTES; rows of like length pad least."""
        seq_lens = self.batch.seq_lens_host[: self.batch.num_decode_rows]
        sizes = [len(self._span(seq_len, window)) for seq_len in seq_lens]
        groups: list[list[int]] = []
        capacity = 0
        for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
            if capacity == 0:
                groups.append([])
                capacity = max(1, GROUP_BYTES // (self._block_bytes * sizes[row]))
            groups[-1].append(row)
            capacity -= 1
        return groups

    def _group(self, rows: list[int], window: int | None) -> DecodeGroup:
        spans = [self._span(self.batch.seq_lens_host[row], window) for row in rows]
        index = torch.tensor(rows)
        first = torch.tensor([span.start for span in spans]).unsqueeze(1)
        columns = first + torch.arange(max(len(span) for span in spans))
        # Padding repeats a table's last column, whatever it is: `unused` covers it.
        tables = self._tables[index].gather(1, columns.clamp_(max=self._tables.shape[1] - 1))
        blocks = self._head_rows(tables).transpose(1, 2).reshape(-1)

        seq_lens = self.batch.seq_lens[index].long().unsqueeze(1)
        slots = torch.arange(columns.shape[1] * self._block_size)
        positions = first * self._block_size + slots
        unused = positions >= seq_lens
        hidden = unused if window is None else unused | (positions < seq_lens - window)
        return DecodeGroup(
            rows=index,
            blocks=blocks,
            unused=self._unused_slots(unused),
            mask=_additive(hidden, self._dtype)[:, None, None] if hidden.any() else None,
        )

    def _unused_slots(self, unused: Tensor) -> Tensor | None:
        """Slots [g, L] -> their rows in the gathered [g * K * L, D], or None without any."""
        each_head = unused.unsqueeze(1).expand(-1, self._heads.numel(), -1)
        rows = each_head.flatten().nonzero().view(-1)
        return rows if rows.numel() else None

    def _chunk(self, row: int, window: int | None, needs_mask: bool) -> PrefillChunk:
        num_queries, end = self.batch.query_lens_host[row], self.batch.seq_lens_host[row]
        start = end - num_queries
        span = self._span(end, window, num_queries)
        first = 0 if window is None else max(0, start - window + 1)
        table = self._tables[row, span.start : span.stop]
        is_causal = start == 0 and (window is None or window >= end) and not needs_mask
        offset = first - span.start * self._block_size
        return PrefillChunk(
            tokens=slice(self._starts[row], self._starts[row + 1]),
            blocks=self._head_rows(table).t().reshape(-1),
            context=slice(offset, offset + end - first),
            mask=None if is_causal else self._chunk_mask(first, start, end, window),
        )

    def _chunk_mask(self, first: int, start: int, end: int, window: int | None) -> Tensor:
        position = torch.arange(start, end).unsqueeze(1)
        other = torch.arange(first, end)
        hidden = other > position
        if window is not None:
            hidden |= other <= position - window
        return _additive(hidden, self._dtype)


class PagedAttention:
    """Runs the plan; its workspace grows to the longest context seen and is then reused."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def run(
        self, query: Tensor, cache: LayerKv, plan: CpuAttentionPlan, params: AttentionParams
    ) -> Tensor:
        """query [T, H, D] -> [T, H, D]."""
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in plan.decode_groups(params):
            out.index_copy_(0, group.rows, self._decode(query, cache, group, params))
        for chunk in plan.prefill_chunks(params):
            out[chunk.tokens] = self._prefill(query[chunk.tokens], cache, chunk, params)
        return out

    def _decode(
        self, query: Tensor, cache: LayerKv, group: DecodeGroup, params: AttentionParams
    ) -> Tensor:
        num_rows, (_, num_heads, dim) = group.rows.numel(), query.shape
        context = self._gather(cache, group.blocks)
        if group.unused is not None:
            for part in context:
                part.view(-1, dim).index_fill_(0, group.unused, 0.0)
        num_kv_heads = cache.key.shape[1]
        key, value = (part.view(num_rows, num_kv_heads, -1, dim) for part in context)
        # The heads that share a key head take the place of its queries.
        rows = query.index_select(0, group.rows).view(num_rows, num_kv_heads, -1, dim)
        out = _attend(rows, key, value, group.mask, params, is_causal=False)
        return out.reshape(num_rows, num_heads, dim)

    def _prefill(
        self, query: Tensor, cache: LayerKv, chunk: PrefillChunk, params: AttentionParams
    ) -> Tensor:
        num_queries, num_heads, dim = query.shape
        num_kv_heads = cache.key.shape[1]
        group = num_heads // num_kv_heads
        rows = query.reshape(num_queries, num_kv_heads, group, dim).permute(1, 2, 0, 3)
        context = self._gather(cache, chunk.blocks)
        key, value = (
            part.view(num_kv_heads, 1, -1, dim)[:, :, chunk.context].expand(-1, group, -1, -1)
            for part in context
        )
        out = _attend(rows, key, value, chunk.mask, params, is_causal=chunk.mask is None)
        return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, dim)

    def _gather(self, cache: LayerKv, blocks: Tensor) -> LayerKv:
        return LayerKv(
            self._select("key", cache.key, blocks), self._select("value", cache.value, blocks)
        )

    def _select(self, name: str, part: Tensor, blocks: Tensor) -> Tensor:
        rows = part.flatten(0, 1).flatten(1)  # [blocks * K, block_size * D], a view
        size = blocks.numel() * rows.shape[1]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != part.dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=part.dtype)
        out = buffer[:size].view(-1, rows.shape[1])
        return torch.index_select(rows, 0, blocks, out=out)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    *,
    is_causal: bool,
) -> Tensor:
    """query [B, G, Q, D] over key and value [B, G, L, D] -> [B, G, Q, D].

    Under a soft cap only `mask` counts, not `is_causal`.
    """
    if params.soft_cap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=params.scale
        )
    if query.shape[2] <= CAPPED_QUERIES:
        return _capped(query, key, value, mask, params.scale, params.soft_cap)
    assert mask is not None  # only a prefill chunk has that many queries
    queries, masks = torch.split(query, CAPPED_QUERIES, 2), torch.split(mask, CAPPED_QUERIES, -2)
    parts = [
        _capped(part, key, value, own, params.scale, params.soft_cap)
        for part, own in zip(queries, masks, strict=True)
    ]
    return torch.cat(parts, dim=2)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, soft_cap: float
) -> Tensor:
    """Attention with materialised scores, soft-capped as in Gemma 2 (arXiv:2408.00118, 2)."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        scores = scores.add_(mask)
    return torch.matmul(scores.softmax(-1).to(value.dtype), value)
