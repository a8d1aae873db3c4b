"""Stores keys and values in their slots of the paged KV cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kv_cache import LayerKv

_HEADS_TILE = 8


@triton.jit
def slot_offset(
    slot: tl.tensor, block_stride: tl.tensor, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr
) -> tl.tensor:
    """Where a slot (block * BLOCK_SIZE + offset, int64) of head 0 begins, in elements."""
    return (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * DIM


@triton.jit
def _write_kernel(
    key: tl.tensor,
    value: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slots: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    block_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, WIDTH)
    mask = (heads < NUM_HEADS)[:, None] & (dims < DIM)[None, :]
    source = heads[:, None] * DIM + dims[None, :]
    base = slot_offset(tl.load(slots + token), block_stride, BLOCK_SIZE, DIM)
    target = base + heads[:, None] * (BLOCK_SIZE * DIM) + dims[None, :]
    keys = tl.load(key + token * key_stride + source, mask=mask)
    tl.store(key_cache + target, keys, mask=mask)
    values = tl.load(value + token * value_stride + source, mask=mask)
    tl.store(value_cache + target, values, mask=mask)


def write_kv(key: Tensor, value: Tensor, cache: LayerKv, slots: Tensor) -> None:
    """Store key and value [T, K, D], a token's heads side by side, in slots [T] int64."""
    num_tokens, num_heads, dim = key.shape
    assert key.stride()[1:] == (dim, 1) and value.stride()[1:] == (dim, 1)
    check_cache(cache)
    if num_tokens:
        _write_kernel[(num_tokens, triton.cdiv(num_heads, _HEADS_TILE))](
            key,
            value,
            cache.key,
            cache.value,
            slots,
            key.stride(0),
            value.stride(0),
            cache.key.stride(0),
            NUM_HEADS=num_heads,
            DIM=dim,
            BLOCK_SIZE=cache.key.shape[2],
            HEADS=_HEADS_TILE,
            WIDTH=triton.next_power_of_2(dim),
        )


def check_cache(cache: LayerKv) -> None:
    """The kernels count on heads, tokens and dimensions lying dense in a block."""
    _, _, block_size, dim = cache.key.shape
    assert cache.key.stride()[1:] == cache.value.stride()[1:] == (block_size * dim, dim, 1)
    assert cache.key.stride(0) == cache.value.stride(0)
