"""The operators on one NVIDIA GPU: Triton kernels, and cuBLAS for the matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, LayerKv
from executor_svc.ops.cuda.activation import gated_activation
from executor_svc.ops.cuda.decode_attention import decode_attention
from executor_svc.ops.cuda.gemv import gemv
from executor_svc.ops.cuda.kv_write import write_kv
from executor_svc.ops.cuda.norm import add_rms_norm, rms_norm
from executor_svc.ops.cuda.prefill_attention import prefill_attention
from executor_svc.ops.cuda.qkv import rotary_and_write_kv
from executor_svc.ops.cuda.rotary import rotary
from executor_svc.ops.cuda.splits import Splits, plan_splits
from executor_svc.ops.cuda_limits import attention_obstacle
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import AttentionParams, AttentionPlan, LinearWeight, QkNorms
from executor_svc.ops.reference import ReferenceOps, ReferencePlan


@dataclass(frozen=True)
class CudaAttentionPlan:
    """The splits of the decoding sequences; None where there are none."""

    batch: ForwardBatch
    splits: Splits | None


class CudaOps:
    """Nothing here reads a tensor back, so all of it can be captured.

    A row's result does not depend on who stands beside it, but for the matrix products: cuBLAS
    chooses its order of summation by the number of tokens.
    """

    def __init__(self, fallbacks: Fallbacks) -> None:
        self.fallbacks = fallbacks
        self._reference = ReferenceOps()

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        return LinearWeight(weight.contiguous(), bias)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        if len(x) == 1:
            return gemv(x, weight)
        return F.linear(x, weight.weight, weight.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(_by_token(query), cos, sin), rotary(_by_token(key), cos, sin)

    def rotary_and_write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerKv,
        plan: AttentionPlan,
        norms: QkNorms | None,
    ) -> Tensor:
        """See `RotaryAndWrite`."""
        slots = plan.batch.slot_mapping
        return rotary_and_write_kv(query, key, value, cos, sin, cache, slots, norms)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return gated_activation(gate_up, is_silu=True)

    def geglu(self, gate_up: Tensor) -> Tensor:
        return gated_activation(gate_up, is_silu=False)

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> CudaAttentionPlan:
        num_decode = batch.num_decode_rows
        if num_decode == 0:
            return CudaAttentionPlan(batch, None)
        return CudaAttentionPlan(batch, plan_splits(batch.seq_lens[:num_decode], batch.max_seq_len))

    def write_kv(self, key: Tensor, value: Tensor, cache: LayerKv, plan: AttentionPlan) -> None:
        write_kv(_by_token(key), _by_token(value), cache, plan.batch.slot_mapping)

    def paged_attention(
        self, query: Tensor, cache: LayerKv, plan: AttentionPlan, params: AttentionParams
    ) -> Tensor:
        assert isinstance(plan, CudaAttentionPlan)
        obstacle = attention_obstacle(query.shape[-1])
        if obstacle is not None:
            self.fallbacks.note("attention", obstacle)
            own = ReferencePlan(plan.batch)
            return self._reference.paged_attention(query, cache, own, params)
        return _attend(_by_token(query), cache, plan, params)


def _attend(
    query: Tensor, cache: LayerKv, plan: CudaAttentionPlan, params: AttentionParams
) -> Tensor:
    """The leading sequences of one token in splits, all others tile by tile."""
    batch, num_decode = plan.batch, plan.batch.num_decode_rows
    tables, lengths = batch.block_tables, batch.seq_lens
    if plan.splits is not None and num_decode == len(lengths):
        return decode_attention(query, cache, tables, lengths, plan.splits, params)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if plan.splits is not None:
        decode = query[:num_decode]
        out[:num_decode] = decode_attention(
            decode, cache, tables[:num_decode], lengths[:num_decode], plan.splits, params
        )
    prefill_attention(
        query,
        out,
        cache,
        tables[num_decode:],
        lengths[num_decode:],
        batch.query_start[num_decode:],
        params,
    )
    return out


def _by_token(heads: Tensor) -> Tensor:
    """[T, H, D] with the heads of a token side by side; adapted models have it transposed."""
    if heads.stride()[1:] == (heads.shape[2], 1):
        return heads
    # Not contiguous(): of a single head it would keep any stride.
    return heads.flatten(1).view(heads.shape)
