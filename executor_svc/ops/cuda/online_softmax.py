"""The arithmetic that all attention kernels share: scores, masks, and the running softmax.

Online softmax: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867, in base 2, which is what
the hardware computes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# The smallest side of a tensor core's tile.
MIN_DOT = 16
_LOG2_E = tl.constexpr(1.4426950408889634)


class TileConfig(NamedTuple):
    """Query rows and context tokens of a tile, and how the compiler lays out the work on it."""

    lanes: int
    tile: int
    num_warps: int
    num_stages: int


@triton.jit
def base_2_scores(
    product: tl.tensor, scale: tl.tensor, soft_cap: tl.tensor, HAS_SOFT_CAP: tl.constexpr
) -> tl.tensor:
    """Scale and cap q.k, and change the base of the softmax to 2."""
    if HAS_SOFT_CAP:
        # tanh(x) = 2 sigmoid(2 x) - 1
        halved = tl.sigmoid(product * (2.0 * scale / soft_cap))
        return (2.0 * halved - 1.0) * (soft_cap * _LOG2_E)
    else:
        return product * (scale * _LOG2_E)


@triton.jit
def accumulate(
    sums: tl.tensor, total: tl.tensor, peak: tl.tensor, scores: tl.tensor, values: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add tokens to a running softmax; scores [M, N], -inf where invisible, values [N, D].

    sums: [M, D] float32, weighted values so far; total: [M], weights so far; peak: [M], the
    largest score so far, by which both are scaled.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing yet must not compute inf - inf.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    sums = sums * decay[:, None]
    # tf32x3 concerns float32 models alone: three tensor core products, close to float32.
    sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="tf32x3")
    return sums, total, new_peak


@triton.jit
def slots_of(
    block_table: tl.tensor,
    positions: tl.tensor,
    is_visible: tl.tensor,
    block_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """Where the tokens at `positions` begin in the cache of head 0, in elements: int64 [N]."""
    # What stands in the table behind a sequence's own blocks is not read.
    blocks = tl.load(block_table + positions // BLOCK_SIZE, mask=is_visible, other=0)
    return blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * DIM
