"""Weights in the tiles of an NPU's cube units (FRACTAL_NZ): products read them as they lie.

Of an ordinary matrix each product rearranges what it reads, at a cost in bandwidth that a decode
step, bound by reading weights, pays in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The number of the format in CANN's aclFormat.
FRACTAL_NZ = 29
# Rows and columns of a tile of 16-bit values; what does not fill one is padded in memory.
TILE = 16
# torch_npu takes tiles of float32 to the operators of the old kind, which no graph records.
TILED_DTYPES = frozenset({torch.float16, torch.bfloat16})


def tiling_obstacle(dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why a weight of `shape` [out, in] stays an ordinary matrix, or None."""
    if dtype not in TILED_DTYPES:
        return f"{dtype} weights".removeprefix("torch.")
    if any(size % TILE for size in shape):
        return "a matrix of {} x {}".format(*shape)
    return None


def tiled(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] in tiles, for `F.linear` alone; `weight` itself stays.

    So a head that is tied to the embedding may be tiled: rows are gathered from the other.
    """
    module: Any = torch.get_device_module("npu")
    module.config.allow_internal_format = True
    out: Tensor = torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)
    return out
