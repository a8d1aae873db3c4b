"""The operators on the CPU through torch's fastest paths; run it in inference mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, LayerKv
from executor_svc.ops.cpu_attention import CpuAttentionPlan, PagedAttention
from executor_svc.ops.interface import AttentionParams, AttentionPlan, LinearWeight


class CpuOps:
    """Float32 projections are packed for MKL, where torch has it; all else is plain torch."""

    def __init__(self) -> None:
        self._attention = PagedAttention()
        self._has_mkl = torch._C.has_mkl

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        if weight.dtype != torch.float32 or not self._has_mkl:
            return LinearWeight(weight.contiguous(), bias)
        # The packed format does not depend on the batch size that the call wants as a hint.
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), 1)
        # The operator asks the plain weight for its shape only: let the values go.
        stand_in = torch.empty((), dtype=weight.dtype).expand(weight.shape)
        return LinearWeight(stand_in, bias, packed)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        num_tokens = x.shape[0]
        if weight.packed is None:
            return F.linear(x, weight.weight, weight.bias)
        if num_tokens == 0:
            return x.new_empty(0, weight.weight.shape[0])
        out: Tensor = torch.ops.mkl._mkl_linear(
            x, weight.packed, weight.weight, weight.bias, num_tokens
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (wide * scale).mul_(weight).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def geglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> CpuAttentionPlan:
        return CpuAttentionPlan(batch, kv_cache)

    def write_kv(self, key: Tensor, value: Tensor, cache: LayerKv, plan: AttentionPlan) -> None:
        assert isinstance(plan, CpuAttentionPlan)
        dim = key.shape[-1]
        cache.key.view(-1, dim).index_copy_(0, plan.slots, key.reshape(-1, dim))
        cache.value.view(-1, dim).index_copy_(0, plan.slots, value.reshape(-1, dim))

    def paged_attention(
        self, query: Tensor, cache: LayerKv, plan: AttentionPlan, params: AttentionParams
    ) -> Tensor:
        assert isinstance(plan, CpuAttentionPlan)
        return self._attention.run(query, cache, plan, params)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] > 2 * half:
        rotated.append(x[..., 2 * half :].float())
    return torch.cat(rotated, dim=-1).to(x.dtype)
