"""One pass over a fused projection: q and k norm, rotary embedding, and k, v into the KV cache.

Instead of four or five launches a layer: at batch 1 a launch costs about as much as such a kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kv_cache import LayerKv
from executor_svc.ops.cuda.kv_write import check_cache, slot_offset
from executor_svc.ops.cuda.rotary import partner_dims, rotate
from executor_svc.ops.interface import QkNorms

# Few heads a program: at batch 1 the whole step is 48 heads (8B shape) for 132 processors.
_HEADS_TILE = 2


@triton.jit
def _norm_and_rotate(
    source: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    token: tl.tensor,
    mask: tl.tensor,
    eps: tl.tensor,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> tl.tensor:
    """Heads [HEADS, WIDTH] float32, read where `source` [HEADS, 1] points to."""
    dims = tl.arange(0, WIDTH)
    partners = partner_dims(HALF, WIDTH)
    loaded = tl.load(source + dims[None, :], mask=mask, other=0.0)
    own = loaded.to(tl.float32)
    # The other half comes from L1, where the first load has put it.
    partner = tl.load(source + partners[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / DIM + eps)[:, None]
        in_head = dims < DIM
        weights = tl.load(weight + dims, mask=in_head, other=0.0).to(tl.float32)
        partner_weights = tl.load(weight + partners, mask=in_head, other=0.0).to(tl.float32)
        # Rounded in between, as a norm of its own would leave it.
        own = (own * scale * weights[None, :]).to(loaded.dtype).to(tl.float32)
        partner = (partner * scale * partner_weights[None, :]).to(loaded.dtype).to(tl.float32)
    return rotate(own, partner, cos, sin, token, HALF, WIDTH)


@triton.jit
def _qkv_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    query_out: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    eps: tl.tensor,
    query_stride: tl.tensor,
    kv_stride: tl.tensor,
    block_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    """Programs (token, tile): first the tiles of query heads, then those of k and v heads."""
    query_tiles: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    if tile < query_tiles:
        heads = tile * HEADS + tl.arange(0, HEADS)
        mask = (heads < NUM_HEADS)[:, None] & (dims < DIM)[None, :]
        source = query + token * query_stride + heads[:, None] * DIM
        rotated = _norm_and_rotate(
            source, query_weight, cos, sin, token, mask, eps, DIM, HALF, WIDTH, HAS_NORM
        )
        target = query_out + (token * NUM_HEADS + heads[:, None]) * DIM + dims[None, :]
        tl.store(target, rotated.to(query_out.dtype.element_ty), mask=mask)
    else:
        heads = (tile - query_tiles) * HEADS + tl.arange(0, HEADS)
        mask = (heads < NUM_KV_HEADS)[:, None] & (dims < DIM)[None, :]
        source = key + token * kv_stride + heads[:, None] * DIM
        rotated = _norm_and_rotate(
            source, key_weight, cos, sin, token, mask, eps, DIM, HALF, WIDTH, HAS_NORM
        )
        base = slot_offset(tl.load(slots + token), block_stride, BLOCK_SIZE, DIM)
        slot = base + heads[:, None] * (BLOCK_SIZE * DIM) + dims[None, :]
        tl.store(key_cache + slot, rotated.to(key_cache.dtype.element_ty), mask=mask)
        own_values = value + token * kv_stride + heads[:, None] * DIM + dims[None, :]
        tl.store(value_cache + slot, tl.load(own_values, mask=mask), mask=mask)


def rotary_and_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerKv,
    slots: Tensor,
    norms: QkNorms | None,
) -> Tensor:
    """Norm and rotate query [T, H, D] and key [T, K, D]; store key and value [T, K, D].

    A token's heads lie side by side. cos, sin: [T, R / 2] float32; slots: [T] int64. Returns the
    query, contiguous.
    """
    num_tokens, num_heads, dim = query.shape
    num_kv_heads = key.shape[1]
    assert query.stride()[1:] == key.stride()[1:] == value.stride()[1:] == (dim, 1)
    assert key.stride(0) == value.stride(0)
    assert cos.is_contiguous() and sin.is_contiguous()
    check_cache(cache)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out
    tiles = triton.cdiv(num_heads, _HEADS_TILE) + triton.cdiv(num_kv_heads, _HEADS_TILE)
    _qkv_kernel[(num_tokens, tiles)](
        query,
        key,
        value,
        query if norms is None else norms.query,
        key if norms is None else norms.key,
        cos,
        sin,
        slots,
        out,
        cache.key,
        cache.value,
        0.0 if norms is None else norms.eps,
        query.stride(0),
        key.stride(0),
        cache.key.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        DIM=dim,
        HALF=cos.shape[-1],
        BLOCK_SIZE=cache.key.shape[2],
        HEADS=_HEADS_TILE,
        WIDTH=triton.next_power_of_2(dim),
        HAS_NORM=norms is not None,
        num_warps=2,
    )
    return out
