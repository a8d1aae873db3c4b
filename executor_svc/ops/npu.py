"""The operators on an Ascend NPU: CANN's fused kernels through torch_npu.

What a kernel cannot take falls back to `reference.py` and is counted. Semantics and limits are
those of torch_npu 2.13's documentation of each operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, LayerKv
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import AttentionParams, AttentionPlan, LinearWeight
from executor_svc.ops.npu_decode import AttentionRecorder, VisibleKeys, visible_keys
from executor_svc.ops.npu_limits import (
    FUSED_DTYPES,
    AttentionShape,
    attention_obstacle,
    norm_obstacle,
)
from executor_svc.ops.npu_weights import tiled, tiling_obstacle
from executor_svc.ops.reference import ReferenceOps

# The one causal mask of every length: the kernel slides it along the diagonal.
MASK_SIZE = 2048
FULL_MASK, CAUSAL, BAND = 0, 3, 4  # sparse_mode
# A slot that the kernel skips.
NO_SLOT = -1


@dataclass(frozen=True)
class NpuPlan:
    """A batch, and what the kernels want of it.

    slots: int32 [T], -1 where the null block is meant (the kernel wants no slot twice). The lengths
    are host lists: of the queries cumulative, of the contexts each by itself. `visible` is what
    the layers of a recorded step see, by their window.
    """

    batch: ForwardBatch
    slots: Tensor
    query_ends: list[int]
    seq_lens: list[int]
    visible: dict[int | None, VisibleKeys] = field(default_factory=dict)


class NpuOps:
    """Implements `Ops` over a cache whose storage is [blocks, block_size, kv_heads, dim]."""

    def __init__(
        self,
        fallbacks: Fallbacks,
        device: torch.device,
        fused_dtypes: frozenset[torch.dtype] = FUSED_DTYPES,
        tiles_weights: bool = False,
    ) -> None:
        """`fused_dtypes`: what the attention kernel takes; an emulator may take more.

        `tiles_weights`: store projections in the cube units' tiles where that can be done.
        """
        self._npu: Any = torch.ops.npu
        self._reference = ReferenceOps()
        self._fallbacks = fallbacks
        self._fused_dtypes = fused_dtypes
        self._tiles_weights = tiles_weights
        self._recorder: AttentionRecorder | None = None
        mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu_(diagonal=1)
        self._mask = mask.to(device)
        # The angles of this step in the kernel's form, by what they were made from.
        self._angles: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @contextmanager
    def recording(self, recorder: AttentionRecorder) -> Iterator[None]:
        """Decode steps in this context leave the lengths of their attention to `recorder`."""
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        if not self._tiles_weights:
            return LinearWeight(weight, bias)
        obstacle = tiling_obstacle(weight.dtype, weight.shape)
        if obstacle is not None:
            self._fallbacks.note("weight_tiles", obstacle)
            return LinearWeight(weight, bias)
        return LinearWeight(tiled(weight), bias)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        return F.linear(x, weight.weight, weight.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = self._npu.npu_rms_norm(x, weight, eps)[0]
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        obstacle = norm_obstacle(x.dtype, weight.dtype)
        if obstacle is not None:
            self._fallbacks.note("add_rms_norm", obstacle)
            total = x + residual
            return self.rms_norm(total, weight, eps), total
        normed, _, total = self._npu.npu_add_rms_norm(x, residual, weight, eps)
        return normed, total

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._kernel_angles(cos, sin, query.dtype)
        return self._rotate(query, cos, sin), self._rotate(key, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        out: Tensor = self._npu.npu_swiglu(gate_up, -1)
        return out

    def geglu(self, gate_up: Tensor) -> Tensor:
        self._fallbacks.note("geglu", "two kernels of torch take its place")
        return self._reference.geglu(gate_up)

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> NpuPlan:
        self._angles.clear()
        slots = batch.slot_mapping
        return NpuPlan(
            batch=batch,
            slots=torch.where(slots < kv_cache.block_size, NO_SLOT, slots).int(),
            query_ends=list(accumulate(batch.query_lens_host)),
            seq_lens=list(batch.seq_lens_host),
        )

    def write_kv(self, key: Tensor, value: Tensor, cache: LayerKv, plan: AttentionPlan) -> None:
        assert isinstance(plan, NpuPlan)
        keys, values = (part.transpose(1, 2) for part in cache)
        dim = keys.shape[-1]
        self._npu.npu_scatter_pa_kv_cache(
            _padded(key, dim), _padded(value, dim), keys, values, plan.slots, cache_mode="Norm"
        )

    def paged_attention(
        self, query: Tensor, cache: LayerKv, plan: AttentionPlan, params: AttentionParams
    ) -> Tensor:
        assert isinstance(plan, NpuPlan)
        dim, num_heads = query.shape[-1], query.shape[1]
        _, num_kv_heads, block_size, cache_dim = cache.key.shape
        query = _padded(query, cache_dim)
        shape = AttentionShape(num_heads, num_kv_heads, cache_dim, block_size, query.dtype)
        obstacle = attention_obstacle(shape, params, self._fused_dtypes)
        if obstacle is not None:
            self._fallbacks.note("attention", obstacle)
            return self._reference.paged_attention(query, cache, plan, params)[..., :dim]
        if self._recorder is not None:
            return self._recorded_attention(self._recorder, query, cache, plan, params)[..., :dim]
        return self._fused_attention(query, cache, plan, params)[..., :dim]

    def _recorded_attention(
        self,
        recorder: AttentionRecorder,
        query: Tensor,
        cache: LayerKv,
        plan: NpuPlan,
        params: AttentionParams,
    ) -> Tensor:
        """One query a row, in the layout that takes a mask of its own."""
        _, num_kv_heads, block_size, _ = cache.key.shape
        window = params.sliding_window
        if window not in plan.visible:
            plan.visible[window] = visible_keys(plan.batch, block_size, window)
        tables, hidden = plan.visible[window]
        keys, values = _pages(cache)
        arguments = {
            "query": query.view(len(query), 1, -1),
            "key": keys,
            "value": values,
            "atten_mask": hidden,
            "block_table": tables,
            "num_heads": query.shape[1],
            "num_key_value_heads": num_kv_heads,
            "scale": params.scale,
            "input_layout": "BSH",
            "sparse_mode": FULL_MASK,
            "block_size": block_size,
        }
        return recorder.attend(arguments, capacity=hidden.shape[-1]).view_as(query)

    def _fused_attention(
        self, query: Tensor, cache: LayerKv, plan: NpuPlan, params: AttentionParams
    ) -> Tensor:
        _, num_kv_heads, block_size, _ = cache.key.shape
        keys, values = _pages(cache)
        window = params.sliding_window
        band = {} if window is None else {"pre_tokens": window - 1, "next_tokens": 0}
        out: Tensor = self._npu.npu_fused_infer_attention_score(
            query,
            keys,
            values,
            atten_mask=self._mask,
            actual_seq_lengths=plan.query_ends,
            actual_seq_lengths_kv=plan.seq_lens,
            block_table=plan.batch.block_tables,
            num_heads=query.shape[1],
            num_key_value_heads=num_kv_heads,
            scale=params.scale,
            input_layout="TND",
            sparse_mode=CAUSAL if window is None else BAND,
            block_size=block_size,
            **band,
        )[0]
        return out

    def _kernel_angles(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, R / 2] as the rotary kernel takes them: [T, 1, 1, R] each.

        All layers of a step bring the same tensors; an entry keeps its own, so that ids stay.
        """
        if id(cos) not in self._angles:
            self._angles[id(cos)] = (cos, _twice(cos).to(dtype), _twice(sin).to(dtype))
        _, wide_cos, wide_sin = self._angles[id(cos)]
        return wide_cos, wide_sin

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary_dim = cos.shape[-1]
        rotated: Tensor = self._npu.npu_rotary_mul(
            x[..., :rotary_dim].unsqueeze(1), cos, sin
        ).squeeze(1)
        if rotary_dim == x.shape[-1]:
            return rotated
        return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def _twice(angles: Tensor) -> Tensor:
    """[T, R / 2] -> [T, 1, 1, R]: both halves of a head turn by the same angles."""
    return torch.cat([angles, angles], dim=-1)[:, None, None]


def _pages(cache: LayerKv) -> tuple[Tensor, Tensor]:
    """Keys and values as the attention takes them: [blocks, block_size, kv_heads * dim] both."""
    num_blocks, _, block_size, _ = cache.key.shape
    keys, values = (part.transpose(1, 2).view(num_blocks, block_size, -1) for part in cache)
    return keys, values


def _padded(heads: Tensor, dim: int) -> Tensor:
    """Heads [T, H, D] contiguous, with zeros up to `dim`, which add nothing to a score or value."""
    if heads.shape[-1] == dim:
        return heads.contiguous()
    wide = heads.new_zeros(*heads.shape[:-1], dim)
    wide[..., : heads.shape[-1]] = heads
    return wide
