"""Attention of one new token a sequence over its paged context, each context cut into splits.

Two phases, as in Flash-Decoding (https://pytorch.org/blog/flash-decoding/): every split gives a
softmax of its own, then one program a head joins them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kv_cache import LayerKv
from executor_svc.ops.cuda.kv_write import check_cache
from executor_svc.ops.cuda.online_softmax import (
    MIN_DOT,
    TileConfig,
    accumulate,
    base_2_scores,
    slots_of,
)
from executor_svc.ops.cuda.splits import SPLIT_TOKENS, Splits
from executor_svc.ops.interface import AttentionParams

_JOIN_TILE = 16
# As many as a processor holds at once, see `decode_config`.
_PROGRAMS_PER_PROCESSOR = 3
# Where there is no processor to ask (the interpreter): few, so that programs take several splits.
_PROGRAMS_WITHOUT_DEVICE = 3


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def _split_attention_kernel(
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    first_split: tl.tensor,
    split_rows: tl.tensor,
    partial: tl.tensor,
    stats: tl.tensor,
    num_rows: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """Programs take (split, key/value head) in turn until all are done.

    partial: [splits, H, D] float32, the split's attention; stats: [splits, H, 2] float32, its
    largest score and its sum of weights.
    """
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    members = tl.arange(0, GROUP_WIDTH)
    dims = tl.arange(0, WIDTH)
    in_head = (dims < DIM)[None, :]
    mask = (members < GROUP)[:, None] & in_head
    num_items = tl.load(first_split + num_rows) * NUM_KV_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        split = item // NUM_KV_HEADS
        kv_head = item % NUM_KV_HEADS
        row = tl.load(split_rows + split).to(tl.int64)
        seq_len = tl.load(seq_lens + row)
        begin = (split - tl.load(first_split + row)) * SPLIT
        end = tl.minimum(begin + SPLIT, seq_len)
        first_visible = 0
        if HAS_WINDOW:
            first_visible = tl.maximum(seq_len - window, 0)
            begin = tl.maximum(begin, first_visible // TILE * TILE)
        heads = kv_head * GROUP + members
        own_query = query + row * query_stride + heads[:, None] * DIM + dims[None, :]
        queries = tl.load(own_query, mask=mask, other=0.0)
        table = block_tables + row * table_stride
        head_start = kv_head * (BLOCK_SIZE * DIM) + dims[None, :]
        sums = tl.zeros((GROUP_WIDTH, WIDTH), tl.float32)
        total = tl.zeros((GROUP_WIDTH,), tl.float32)
        peak = tl.full((GROUP_WIDTH,), float("-inf"), tl.float32)
        for start in range(begin, end, TILE):
            positions = start + tl.arange(0, TILE)
            is_visible = (positions >= first_visible) & (positions < end)
            slots = slots_of(table, positions, is_visible, block_stride, BLOCK_SIZE, DIM)
            place = slots[:, None] + head_start
            # Masked loads: what an unwritten slot holds may be NaN, which no weight takes away.
            tile_mask = is_visible[:, None] & in_head
            keys = tl.load(key_cache + place, mask=tile_mask, other=0.0)
            values = tl.load(value_cache + place, mask=tile_mask, other=0.0)
            product = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
            scores = base_2_scores(product, scale, soft_cap, HAS_SOFT_CAP)
            scores = tl.where(is_visible[None, :], scores, float("-inf"))
            sums, total, peak = accumulate(sums, total, peak, scores, values)
        target = (split * num_heads + heads).to(tl.int64)
        tl.store(partial + target[:, None] * DIM + dims[None, :], sums, mask=mask)
        tl.store(stats + target * 2, peak, mask=members < GROUP)
        tl.store(stats + target * 2 + 1, total, mask=members < GROUP)


@triton.jit
def _join_kernel(
    partial: tl.tensor,
    stats: tl.tensor,
    first_split: tl.tensor,
    out: tl.tensor,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One program joins the splits of one head of one sequence; no split at all gives zeros."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    begin = tl.load(first_split + row)
    end = tl.load(first_split + row + 1)
    sums = tl.zeros((WIDTH,), tl.float32)
    total = 0.0
    peak = float("-inf")
    for start in range(begin, end, TILE):
        splits = (start + tl.arange(0, TILE)).to(tl.int64)
        is_own = splits < end
        place = splits * NUM_HEADS + head
        peaks = tl.load(stats + place * 2, mask=is_own, other=float("-inf"))
        totals = tl.load(stats + place * 2 + 1, mask=is_own, other=0.0)
        mask = is_own[:, None] & (dims < DIM)[None, :]
        parts = tl.load(partial + place[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        # A split outside the window has seen nothing: its peak is -inf, its sums are zero.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        scales = tl.exp2(peaks - base)
        decay = tl.exp2(peak - base)
        sums = sums * decay + tl.sum(parts * scales[:, None], 0)
        total = total * decay + tl.sum(totals * scales, 0)
        peak = new_peak
    sums = sums / tl.where(total > 0.0, total, 1.0)
    target = out + (row * NUM_HEADS + head) * DIM + dims
    tl.store(target, sums.to(out.dtype.element_ty), mask=dims < DIM)


def decode_config(group: int, width: int, item_bytes: int) -> TileConfig:
    """Choose the tiles for groups of query heads of `width` (a power of two) dimensions.

    A tile is 16 KiB each of keys and values. Of five stages two are such tiles, as the block ids
    that lead to a tile take stages of their own: 72 KiB a program, three programs a processor in
    shared memory and registers alike, 192 KiB of loads in flight on each, several times what hides
    the latency of HBM. Compiled for sm_90 nothing spills. Not yet measured on a GPU.
    """
    tile = min(max(16384 // (width * item_bytes), MIN_DOT), 128)
    lanes = max(triton.next_power_of_2(group), MIN_DOT)
    return TileConfig(lanes, tile, num_warps=4, num_stages=5 if item_bytes <= 2 else 2)


def decode_attention(
    query: Tensor,
    cache: LayerKv,
    block_tables: Tensor,
    seq_lens: Tensor,
    splits: Splits,
    params: AttentionParams,
) -> Tensor:
    """query [n, H, D], heads side by side, the last token of n sequences -> [n, H, D].

    block_tables: int32 [n, max_blocks]; seq_lens: int32 [n]; splits: of these lengths.
    """
    num_rows, num_heads, dim = query.shape
    num_kv_heads, block_size = cache.key.shape[1], cache.key.shape[2]
    group = num_heads // num_kv_heads
    assert query.stride()[1:] == (dim, 1) and block_tables.stride(1) == 1
    check_cache(cache)
    width = max(triton.next_power_of_2(dim), MIN_DOT)
    config = decode_config(group, width, query.itemsize)
    max_splits = len(splits.rows)
    partial = query.new_empty(max_splits, num_heads, dim, dtype=torch.float32)
    stats = query.new_empty(max_splits, num_heads, 2, dtype=torch.float32)
    num_programs = min(_num_programs(query.device), max_splits * num_kv_heads)
    _split_attention_kernel[(num_programs,)](
        query,
        cache.key,
        cache.value,
        block_tables,
        seq_lens,
        splits.first,
        splits.rows,
        partial,
        stats,
        num_rows,
        params.scale,
        params.soft_cap or 1.0,
        params.sliding_window or 0,
        query.stride(0),
        block_tables.stride(0),
        cache.key.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT_TOKENS,
        TILE=config.tile,
        GROUP_WIDTH=config.lanes,
        WIDTH=width,
        HAS_SOFT_CAP=params.soft_cap is not None,
        HAS_WINDOW=params.sliding_window is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _join_kernel[(num_rows, num_heads)](
        partial,
        stats,
        splits.first,
        out,
        NUM_HEADS=num_heads,
        DIM=dim,
        TILE=_JOIN_TILE,
        WIDTH=width,
    )
    return out


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_WITHOUT_DEVICE
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * _PROGRAMS_PER_PROCESSOR
