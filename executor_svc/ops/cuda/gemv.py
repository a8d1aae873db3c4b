"""A projection of one token: a matrix-vector product at the speed of the memory.

cuBLAS takes its matrix kernels here, whose tiles are empty but for one row, or a vector kernel that
leaves processors idle for the narrow matrices of a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.ops.interface import LinearWeight

# Outputs of a program. Few, so that the narrowest projection of the 8B shape (4096) makes 1024
# programs, about eight for each processor of an H200; nothing is added up between programs.
_OUTPUTS = 4
# Inputs of a step: the sum is split over the threads of the program, each with 16 bytes of every
# row, 32 KiB in flight a processor with four programs on it.
_TILE = 1024
_MIN_TILE = 32


@triton.jit
def _gemv_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_outputs: tl.tensor,
    SIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < num_outputs
    rows = weight + outputs.to(tl.int64)[:, None] * SIZE
    sums = tl.zeros((OUTPUTS, TILE), tl.float32)
    for start in tl.range(0, SIZE, TILE, loop_unroll_factor=4):
        columns = start + tl.arange(0, TILE)
        inputs = tl.load(x + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
        mask = is_output[:, None] & (columns < SIZE)[None, :]
        # Read once a step: the activations are to stay in the cache, not these.
        own = tl.load(rows + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        sums += own.to(tl.float32) * inputs[None, :]
    result = tl.sum(sums, 1)
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, result.to(out.dtype.element_ty), mask=is_output)


def gemv(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [1, in] -> [1, out]; both and the weight [out, in] are contiguous."""
    num_outputs, size = weight.weight.shape
    assert x.is_contiguous() and weight.weight.is_contiguous()
    out = torch.empty(1, num_outputs, dtype=x.dtype, device=x.device)
    tile = max(min(triton.next_power_of_2(size), _TILE), _MIN_TILE)
    _gemv_kernel[(triton.cdiv(num_outputs, _OUTPUTS),)](
        x,
        weight.weight,
        weight.weight if weight.bias is None else weight.bias,
        out,
        num_outputs,
        SIZE=size,
        OUTPUTS=_OUTPUTS,
        TILE=tile,
        HAS_BIAS=weight.bias is not None,
        num_warps=4,
    )
    return out
