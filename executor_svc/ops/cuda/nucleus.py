"""Draws tokens from their top-k and top-p sets without sorting the vocabulary.

Gives the very tokens of `sampler_svc.draw`: weights are integers, so that sums are exact in any
order, and the token at a place of the sorted row is found by bisection of the weight that it has.
Three launches: coarse sums, the few candidates that hold the set, the draw among those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A weight is at most 2**40; the coarse levels are the powers of four.
_WEIGHT_BITS = tl.constexpr(41)
_LEVELS_WIDTH = 32
_LEVELS_TILE = 128
_CHUNK = 4096
_TILE = 1024


@triton.jit
def _level_sums_kernel(
    weights: tl.tensor,
    sums: tl.tensor,
    counts: tl.tensor,
    vocab_size: tl.tensor,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Of one chunk of a row: sum and number of the weights that reach each level."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    level = tl.arange(0, WIDTH)
    threshold = tl.full((1, WIDTH), 1, tl.int64) << (2 * level).to(tl.int64)[None, :]
    # Summed up in registers: one reduction over threads at the end.
    level_sums = tl.zeros((TILE, WIDTH), tl.int64)
    level_counts = tl.zeros((TILE, WIDTH), tl.int32)
    begin = chunk * CHUNK
    for start in range(begin, begin + CHUNK, TILE):
        ids = start + tl.arange(0, TILE)
        own = tl.load(weights + row * vocab_size + ids, mask=ids < vocab_size, other=0)[:, None]
        is_in = own >= threshold
        level_sums += tl.where(is_in, own, 0)
        level_counts += is_in.to(tl.int32)
    target = (row * tl.num_programs(1) + chunk) * WIDTH + level
    tl.store(sums + target, tl.sum(level_sums, 0))
    tl.store(counts + target, tl.sum(level_counts, 0))


@triton.jit
def _set_size(total: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """The weight that a nucleus has to reach: at least 1, for the likeliest token is always in."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)


@triton.jit
def _candidates_kernel(
    weights: tl.tensor,
    sums: tl.tensor,
    counts: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    candidate_weights: tl.tensor,
    candidate_ids: tl.tensor,
    num_candidates: tl.tensor,
    vocab_size: tl.tensor,
    num_chunks: tl.tensor,
    HAS_TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Collect, in the order of ids, the tokens that reach the highest level that holds the set."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.arange(0, CHUNKS)
    level = tl.arange(0, WIDTH)
    place = (row * num_chunks + chunks[:, None]) * WIDTH + level[None, :]
    is_chunk = (chunks < num_chunks)[:, None]
    level_sums = tl.sum(tl.load(sums + place, mask=is_chunk, other=0), 0)
    chunk_counts = tl.load(counts + place, mask=is_chunk, other=0)
    level_counts = tl.sum(chunk_counts, 0)
    if HAS_TOP_K:
        holds = level_counts >= tl.load(top_k + row)
    else:
        holds = level_sums >= _set_size(tl.max(level_sums, 0), tl.load(top_p + row))
    chosen = tl.maximum(tl.sum(holds.to(tl.int32), 0) - 1, 0)
    own_counts = tl.sum(tl.where(level[None, :] == chosen, chunk_counts, 0), 1)
    offset = tl.sum(tl.where(chunks < chunk, own_counts, 0), 0)
    if chunk == 0:
        tl.store(num_candidates + row, tl.sum(own_counts, 0))
    threshold = tl.full((), 1, tl.int64) << (2 * chosen).to(tl.int64)
    for start in range(chunk * CHUNK, chunk * CHUNK + CHUNK, TILE):
        ids = start + tl.arange(0, TILE)
        own = tl.load(weights + row * vocab_size + ids, mask=ids < vocab_size, other=0)
        is_in = own >= threshold
        target = row * vocab_size + offset + tl.cumsum(is_in.to(tl.int32), 0) - 1
        tl.store(candidate_weights + target, own, mask=is_in)
        tl.store(candidate_ids + target, ids, mask=is_in)
        offset += tl.sum(is_in.to(tl.int32), 0)


@triton.jit
def _find(
    weights: tl.tensor,
    count: tl.tensor,
    place: tl.tensor,
    IS_COUNT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Find what stands at a place of the row sorted from the likeliest down.

    The place is counted in tokens, or in weight. Gives the weight of the token there (0 behind the
    last), the sum of the weights above it, and, if tokens are counted, how many those are.
    """
    found = tl.full((), 0, tl.int64)
    bit = tl.full((), 1, tl.int64) << BITS
    sum_above = found
    num_above = found
    zeros = tl.zeros((TILE,), tl.int64)
    for _ in range(BITS):
        bit = bit >> 1
        tried = found | bit
        reached = zeros
        number = zeros
        for start in range(0, count, TILE):
            ids = start + tl.arange(0, TILE)
            own = tl.load(weights + ids, mask=ids < count, other=0)
            is_in = own >= tried
            reached += tl.where(is_in, own, 0)
            if IS_COUNT:
                number += is_in.to(tl.int64)
        sum_reached = tl.sum(reached, 0)
        # The last weight that fails will be one above the one that is found.
        if IS_COUNT:
            num_reached = tl.sum(number, 0)
            goes_beyond = num_reached > place
            num_above = tl.where(goes_beyond, num_above, num_reached)
        else:
            goes_beyond = sum_reached > place
        found = tl.where(goes_beyond, tried, found)
        sum_above = tl.where(goes_beyond, sum_above, sum_reached)
    return found, sum_above, num_above


@triton.jit
def _draw_kernel(
    candidate_weights: tl.tensor,
    candidate_ids: tl.tensor,
    num_candidates: tl.tensor,
    uniforms: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    sums: tl.tensor,
    token_ids: tl.tensor,
    vocab_size: tl.tensor,
    num_chunks: tl.tensor,
    HAS_TOP_K: tl.constexpr,
    LEVELS_WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program a row: the weight of the set, the place of the draw in it, the token there."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(num_candidates + row)
    weights = candidate_weights + row * vocab_size
    if HAS_TOP_K:
        k = tl.load(top_k + row)
        level, above, num_above = _find(weights, count, k - 1, True, BITS, TILE)
        total = above + (k - num_above) * level
    else:
        chunks = tl.arange(0, CHUNKS)
        own_sums = sums + (row * num_chunks + chunks) * LEVELS_WIDTH
        total = tl.sum(tl.load(own_sums, mask=chunks < num_chunks, other=0), 0)
    size = _set_size(total, tl.load(top_p + row))
    level, above, _ = _find(weights, count, size - 1, False, BITS, TILE)
    # Of equal tokens those are in that begin before the size is reached.
    step = tl.maximum(level, 1)
    total = above + (size - above + step - 1) // step * level
    target = (tl.load(uniforms + row) * total.to(tl.float64)).to(tl.int64)
    target = tl.maximum(tl.minimum(target, total - 1), 0)
    level, above, _ = _find(weights, count, target, False, BITS, TILE)
    rank = (target - above) // tl.maximum(level, 1)

    seen = tl.full((), 0, tl.int64)
    token = tl.full((), 0, tl.int64)
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        own = tl.load(weights + place, mask=place < count, other=-1)
        is_equal = own == level
        ranks = seen + tl.cumsum(is_equal.to(tl.int64), 0) - 1
        ids = tl.load(candidate_ids + row * vocab_size + place, mask=place < count, other=0)
        token += tl.sum(tl.where(is_equal & (ranks == rank), ids, 0).to(tl.int64), 0)
        seen += tl.sum(is_equal.to(tl.int64), 0)
    tl.store(token_ids + row, token)


def draw_from_likeliest(
    weights: Tensor, uniforms: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> Tensor:
    """Draw among the `top_k` likeliest tokens, of these the nucleus `top_p`.

    weights: int64 [n, vocab] of `sampler_svc.draw.token_weights`; uniforms: float64 [n]; top_k:
    int64 [n, 1], each > 0; top_p: float64 [n, 1]. Returns token ids int64 [n].
    """
    num_rows, vocab_size = weights.shape
    assert weights.is_contiguous()
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    has_top_k = top_k is not None
    top_p = uniforms.new_ones(num_rows, 1) if top_p is None else top_p
    sums = weights.new_empty(num_rows, num_chunks, _LEVELS_WIDTH)
    counts = torch.empty_like(sums, dtype=torch.int32)
    grid = (num_rows, num_chunks)
    levels = {"WIDTH": _LEVELS_WIDTH, "CHUNK": _CHUNK}
    _level_sums_kernel[grid](weights, sums, counts, vocab_size, TILE=_LEVELS_TILE, **levels)
    candidate_weights = torch.empty_like(weights)
    candidate_ids = torch.empty_like(weights, dtype=torch.int32)
    num_candidates = candidate_ids.new_empty(num_rows)
    chunks = triton.next_power_of_2(num_chunks)
    _candidates_kernel[grid](
        weights,
        sums,
        counts,
        top_p if top_k is None else top_k,
        top_p,
        candidate_weights,
        candidate_ids,
        num_candidates,
        vocab_size,
        num_chunks,
        HAS_TOP_K=has_top_k,
        CHUNKS=chunks,
        TILE=_TILE,
        **levels,
    )
    token_ids = weights.new_empty(num_rows)
    _draw_kernel[(num_rows,)](
        candidate_weights,
        candidate_ids,
        num_candidates,
        uniforms,
        top_p if top_k is None else top_k,
        top_p,
        sums,
        token_ids,
        vocab_size,
        num_chunks,
        HAS_TOP_K=has_top_k,
        LEVELS_WIDTH=_LEVELS_WIDTH,
        CHUNKS=chunks,
        BITS=_WEIGHT_BITS,
        TILE=_TILE,
    )
    return token_ids
