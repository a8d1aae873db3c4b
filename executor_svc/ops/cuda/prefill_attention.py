"""Attention of prompt chunks of any lengths over their paged contexts, in one launch.

Flash attention (Dao, https://arxiv.org/abs/2307.08691): a program keeps a tile of queries and
walks over the context. All query heads of a key/value head share the tile, so that even a short
chunk fills it and keys are read once for the group.
"""

from __future__ import annotations

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
from executor_svc.ops.interface import AttentionParams

_MIN_ROWS = 128


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def _prefill_kernel(
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    query_start: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """Programs (tile of TOKENS queries, key/value head).

    The tiles of sequence r begin at tile (query_start[r] - query_start[0]) // TOKENS + r: never
    fewer than it needs, and no list of tiles has to come from the host.
    """
    # Longest contexts first, so that no processor begins one when the others are done.
    tile_index = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    # Beyond the last sequence a start that no tile reaches.
    origin = tl.load(query_start)
    starts = tl.load(query_start + rows, mask=rows < num_rows, other=2**30)
    row = tl.sum(((starts - origin) // TOKENS + rows <= tile_index).to(tl.int32)) - 1
    first_query = tl.load(query_start + row)
    query_end = tl.load(query_start + row + 1)
    first_query += (tile_index - ((first_query - origin) // TOKENS + row)) * TOKENS
    if first_query < query_end:
        seq_len = tl.load(seq_lens + row)
        lane = tl.arange(0, TOKENS * GROUP_WIDTH)
        tokens = first_query + lane // GROUP_WIDTH
        heads = kv_head * GROUP + lane % GROUP_WIDTH
        own_positions = seq_len - query_end + tokens
        dims = tl.arange(0, WIDTH)
        in_head = (dims < DIM)[None, :]
        is_query = (tokens < query_end) & (lane % GROUP_WIDTH < GROUP)
        mask = is_query[:, None] & in_head
        columns = heads[:, None] * DIM + dims[None, :]
        wide_tokens = tokens.to(tl.int64)[:, None]
        queries = tl.load(query + wide_tokens * query_stride + columns, mask=mask, other=0.0)

        table = block_tables + row.to(tl.int64) * table_stride
        head_start = kv_head * (BLOCK_SIZE * DIM) + dims[None, :]
        first_position = seq_len - query_end + first_query
        end = tl.minimum(first_position + TOKENS, seq_len)
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(first_position - window + 1, 0) // TILE * TILE
        sums = tl.zeros((TOKENS * GROUP_WIDTH, WIDTH), tl.float32)
        total = tl.zeros((TOKENS * GROUP_WIDTH,), tl.float32)
        peak = tl.full((TOKENS * GROUP_WIDTH,), float("-inf"), tl.float32)
        for start in range(begin, end, TILE):
            positions = start + tl.arange(0, TILE)
            is_written = positions < end
            slots = slots_of(table, positions, is_written, block_stride, BLOCK_SIZE, DIM)
            place = slots[:, None] + head_start
            # Masked loads: what an unwritten slot holds may be NaN, which no weight takes away.
            tile_mask = is_written[:, None] & in_head
            keys = tl.load(key_cache + place, mask=tile_mask, other=0.0)
            values = tl.load(value_cache + place, mask=tile_mask, other=0.0)
            product = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
            scores = base_2_scores(product, scale, soft_cap, HAS_SOFT_CAP)
            is_visible = positions[None, :] <= own_positions[:, None]
            if HAS_WINDOW:
                is_visible &= positions[None, :] > own_positions[:, None] - window
            scores = tl.where(is_visible, scores, float("-inf"))
            sums, total, peak = accumulate(sums, total, peak, scores, values)
        # Lanes beyond the queries may have seen nothing; they are not stored.
        sums = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        target = out + wide_tokens * out_stride + columns
        tl.store(target, sums.to(out.dtype.element_ty), mask=mask)


def prefill_config(width: int, item_bytes: int) -> TileConfig:
    """Choose the tiles for heads of `width` (a power of two) dimensions.

    Half precision: 128 query lanes are two warpgroups, each with the 64 rows of Hopper's matrix
    instruction; 64 tokens of 128 dimensions are 16 KiB each of keys and values. Five stages keep
    three such tiles, as the block ids that lead to a tile take stages of their own: 128 KiB with
    the queries, so one program a processor, which the registers allow no more of anyway. Compiled
    for sm_90 nothing spills. Not yet measured on a GPU: tiles of 128 tokens are the first
    alternative to try.

    float32, as three tf32 products, is for comparing, not for speed: it has to fit.
    """
    tile = min(max(16384 // (width * item_bytes), MIN_DOT), 64)
    if item_bytes > 2:
        return TileConfig(lanes=32, tile=tile, num_warps=4, num_stages=2)
    return TileConfig(lanes=128, tile=tile, num_warps=8, num_stages=5)


def prefill_attention(
    query: Tensor,
    out: Tensor,
    cache: LayerKv,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    params: AttentionParams,
) -> None:
    """Attend for n sequences, whose tokens are query_start[0] to query_start[n] of the batch.

    query, out: [T, H, D], heads side by side; block_tables: int32 [n, max_blocks]; seq_lens: int32
    [n]; query_start: int32 [n + 1]. Writes these tokens of `out` and no others.
    """
    num_tokens, num_heads, dim = query.shape
    num_rows = len(seq_lens)
    num_kv_heads, block_size = cache.key.shape[1], cache.key.shape[2]
    group = num_heads // num_kv_heads
    assert query.stride()[1:] == out.stride()[1:] == (dim, 1) and block_tables.stride(1) == 1
    check_cache(cache)
    width = max(triton.next_power_of_2(dim), MIN_DOT)
    group_width = triton.next_power_of_2(group)
    config = prefill_config(width, query.itemsize)
    tokens = max(config.lanes // group_width, 1)
    _prefill_kernel[(num_tokens // tokens + num_rows, num_kv_heads)](
        query,
        cache.key,
        cache.value,
        block_tables,
        seq_lens,
        query_start,
        out,
        num_rows,
        params.scale,
        params.soft_cap or 1.0,
        params.sliding_window or 0,
        query.stride(0),
        out.stride(0),
        block_tables.stride(0),
        cache.key.stride(0),
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=block_size,
        # Of the number of sequences only few values may compile a kernel of their own.
        ROWS=max(triton.next_power_of_2(num_rows), _MIN_ROWS),
        TOKENS=tokens,
        TILE=config.tile,
        GROUP_WIDTH=group_width,
        WIDTH=width,
        HAS_SOFT_CAP=params.soft_cap is not None,
        HAS_WINDOW=params.sliding_window is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
