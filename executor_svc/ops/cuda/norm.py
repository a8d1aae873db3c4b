"""Root mean square norm of rows, alone or together with the addition of a residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: 16 of them in each thread of four warps.
_TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total_out: tl.tensor,
    eps: tl.tensor,
    num_rows: tl.tensor,
    token_stride: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """Row r is head r % HEADS of token r // HEADS; whatever is written is contiguous."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    source = (rows // HEADS) * token_stride + (rows % HEADS) * SIZE
    target = rows[:, None] * SIZE + columns[None, :]
    wide = tl.load(x + source[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + target, mask=mask, other=0.0).to(tl.float32)
        total = wide.to(total_out.dtype.element_ty)
        tl.store(total_out + target, total, mask=mask)
        wide = total.to(tl.float32)  # the norm is of the sum as the next layer will read it
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)
    weights = tl.load(weight + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    normed = wide * scale[:, None] * weights[None, :]
    tl.store(out + target, normed.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, size] or [T, heads, size]: of a token, all heads side by side -> the same, contiguous.

    weight: [size], of any float dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rms_norm(x + residual) and the sum; `residual` has x's shape and is contiguous."""
    assert residual.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch(x, residual, weight, out, total, eps)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor | None,
    eps: float,
) -> None:
    size = x.shape[-1]
    heads = x[0].numel() // size if len(x) else 1
    assert x.dim() == 2 or x.stride(1) == size
    assert x.stride(-1) == 1
    width = triton.next_power_of_2(size)
    # The tile's shape follows from the row's size alone, so a row is summed in the same order
    # whatever else is in the batch.
    rows = max(1, _TILE_ELEMENTS // width)
    num_rows = x.shape[0] * heads
    if num_rows == 0:
        return
    _norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        out if total is None else total,
        eps,
        num_rows,
        x.stride(0),
        HEADS=heads,
        SIZE=size,
        ROWS=rows,
        WIDTH=width,
        HAS_RESIDUAL=residual is not None,
        # A row of the 8B shape (4096) gives 16 elements to each of 256 threads.
        num_warps=min(max(width // 512, 4), 16),
    )
