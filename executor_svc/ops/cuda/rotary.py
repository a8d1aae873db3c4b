"""Rotary embedding of heads, in the half-split layout of GPT-NeoX and Llama."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Heads of a tile; with 128 dimensions 8 elements in each thread of four warps.
_HEADS_TILE = 8


@triton.jit
def rotate(
    own: tl.tensor,
    partner: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    token: tl.tensor,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Rotate own [heads, WIDTH] float32, where partner holds each dimension's other half.

    cos and sin point to [T, HALF]; dimensions from 2 HALF on stay as they are.
    """
    dims = tl.arange(0, WIDTH)
    is_rotated = dims < 2 * HALF
    angle = token * HALF + dims % HALF
    cosine = tl.load(cos + angle, mask=is_rotated, other=1.0)
    sine = tl.load(sin + angle, mask=is_rotated, other=0.0)
    sine = tl.where(dims < HALF, -sine, sine)
    return own * cosine[None, :] + partner * sine[None, :]


@triton.jit
def partner_dims(HALF: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """The dimension that each is rotated with; itself where there is none."""
    dims = tl.arange(0, WIDTH)
    other = tl.where(dims < HALF, dims + HALF, dims - HALF)
    return tl.where(dims < 2 * HALF, other, dims)


@triton.jit
def _rotary_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    token_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, WIDTH)
    mask = (heads < NUM_HEADS)[:, None] & (dims < DIM)[None, :]
    source = x + token * token_stride + heads[:, None] * DIM
    own = tl.load(source + dims[None, :], mask=mask, other=0.0)
    partner = tl.load(source + partner_dims(HALF, WIDTH)[None, :], mask=mask, other=0.0)
    rotated = rotate(own.to(tl.float32), partner.to(tl.float32), cos, sin, token, HALF, WIDTH)
    target = out + (token * NUM_HEADS + heads[:, None]) * DIM + dims[None, :]
    tl.store(target, rotated.to(out.dtype.element_ty), mask=mask)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], a token's heads side by side; cos, sin [T, R / 2] float32 -> [T, heads, D].

    Rotates the first R dimensions into a new tensor.
    """
    num_tokens, num_heads, dim = x.shape
    assert x.stride()[1:] == (dim, 1)
    assert cos.is_contiguous() and sin.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        _rotary_kernel[(num_tokens, triton.cdiv(num_heads, _HEADS_TILE))](
            x,
            cos,
            sin,
            out,
            x.stride(0),
            NUM_HEADS=num_heads,
            DIM=dim,
            HALF=cos.shape[-1],
            HEADS=_HEADS_TILE,
            WIDTH=triton.next_power_of_2(dim),
        )
    return out
