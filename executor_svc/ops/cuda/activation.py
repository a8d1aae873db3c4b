"""Gated activations of a fused gate and up projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)
# Two loads of 16 bytes in each thread of four warps.
_TILE = 1024


@triton.jit
def _gated_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    IS_SILU: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = columns < size
    source = gate_up + row * row_stride + columns
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=mask, other=0.0).to(tl.float32)
    if IS_SILU:
        active = gate * tl.sigmoid(gate)
    else:
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        cubic = _SQRT_2_OVER_PI * (gate + _GELU_CUBIC * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * cubic)
    # The projections' dtype between the two factors too, as the reference rounds.
    active = active.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, (active * up).to(out.dtype.element_ty), mask=mask)


def gated_activation(gate_up: Tensor, is_silu: bool) -> Tensor:
    """[T, 2 I], rows contiguous -> silu or gelu (tanh) of the first half, times the second."""
    assert gate_up.stride(-1) == 1
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        grid = (triton.cdiv(size, _TILE), num_tokens)
        _gated_kernel[grid](gate_up, out, size, gate_up.stride(0), IS_SILU=is_silu, TILE=_TILE)
    return out
