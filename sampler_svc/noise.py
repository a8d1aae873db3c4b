"""The randomness of sampling: one uniform number for each (seed, position), and no state.

A counter-based generator: a token's noise depends neither on the batch nor on what was drawn
before, so a preempted or recovered request draws the tokens that it would have drawn. Runs on the
host, whose integers wrap exactly; the numbers that a step needs are a few bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_UNIT = 2.0**-53


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.integer]) -> NDArray[np.float64]:
    """Give one number in [0, 1) for each pair, all 53 bits random: float64 [n].

    Position p of a seed is output p of the SplitMix64 stream (Steele, Lea, Flood, 2014) that
    starts at the mixed seed; mixing first keeps the streams of neighbouring seeds apart.
    """
    start = _mix(seeds + _GOLDEN_GAMMA)
    bits = _mix(start + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * _UNIT


def seed_bits(seed: int) -> int:
    """Map any integer seed to the unsigned 64 bits that `uniform` takes."""
    return seed & 0xFFFF_FFFF_FFFF_FFFF


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
