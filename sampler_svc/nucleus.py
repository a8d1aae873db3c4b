"""Draws from nuclei on a host without the compiled sampling head: NumPy, and no sort.

The tokens of `draw.draw_from_top_p`, exactly: a histogram over the weights' floating point bits
says in which bucket the nucleus ends and in which the drawn token lies; only those two are sorted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
Floats = NDArray[np.float64]

_MANTISSA_BITS = 8  # of 52: 256 buckets a factor of 2
_SHIFT = 52 - _MANTISSA_BITS
_FIRST_KEY = 1022 << _MANTISSA_BITS  # below that of weight 1: all that have none
_NUM_BUCKETS = 43 << _MANTISSA_BITS  # weights are at most 2**40


def draw_from_nuclei(weights: Int64Array, uniforms: Floats, sizes: Int64Array) -> Int64Array:
    """Draw from the fewest likeliest tokens of each row that together weigh `sizes`: int64 [n].

    weights: int64 [n, vocab], each row at most 2**53 in all; uniforms: float64 [n].
    """
    columns = zip(weights, uniforms.tolist(), sizes.tolist(), strict=True)
    return np.array([_draw(*row) for row in columns], dtype=np.int64)


def _draw(weights: Int64Array, uniform: float, size: int) -> int:
    if size <= 0:  # no logit is a number
        return 0
    masses = weights.astype(np.float64)
    # From the likeliest bucket down; sums of integers below 2**53 are exact.
    buckets = _NUM_BUCKETS - np.maximum((masses.view(np.int64) >> _SHIFT) - _FIRST_KEY, 0)
    reached = np.bincount(buckets, masses, _NUM_BUCKETS + 1).cumsum()
    _, total = _place(weights, buckets, reached, size)
    target = min(int(uniform * total), total - 1)
    token, _ = _place(weights, buckets, reached, target + 1)
    return token


def _place(weights: Int64Array, buckets: Int64Array, reached: Floats, rank: int) -> tuple[int, int]:
    """The token at which the sum from the likeliest down reaches `rank`, and that sum."""
    bucket = int(np.searchsorted(reached, rank))
    members = np.flatnonzero(buckets == bucket)
    members = members[np.argsort(-weights[members], kind="stable")]
    sums = weights[members].cumsum()
    if bucket:
        sums += int(reached[bucket - 1])
    index = int(np.searchsorted(sums, rank))
    return int(members[index]), int(sums[index])
