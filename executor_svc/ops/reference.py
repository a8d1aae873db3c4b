"""The operators in plain torch, float32 inside, one sequence at a time: the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, LayerKv
from executor_svc.ops.interface import AttentionParams, AttentionPlan, LinearWeight


@dataclass(frozen=True)
class ReferencePlan:
    """Nothing is precomputed: the batch is the plan."""

    batch: ForwardBatch


class ReferenceOps:
    """Obviously right, slow, on any device."""

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        return LinearWeight(weight, bias)

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        return F.linear(x, weight.weight, weight.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rotary(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def geglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> ReferencePlan:
        return ReferencePlan(batch)

    def write_kv(self, key: Tensor, value: Tensor, cache: LayerKv, plan: AttentionPlan) -> None:
        block_size = cache.key.shape[2]
        for token, slot in enumerate(plan.batch.slot_mapping.tolist()):
            block, offset = divmod(slot, block_size)
            cache.key[block, :, offset] = key[token]
            cache.value[block, :, offset] = value[token]

    def paged_attention(
        self, query: Tensor, cache: LayerKv, plan: AttentionPlan, params: AttentionParams
    ) -> Tensor:
        batch, out = plan.batch, torch.empty_like(query)
        starts = batch.query_start.tolist()
        for row, seq_len in enumerate(batch.seq_lens.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            context = LayerKv(*(_context(part, batch.block_tables[row], seq_len) for part in cache))
            out[tokens] = _attend(query[tokens], context, params).to(query.dtype)
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = (first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :].float())
    return torch.cat(rotated, dim=-1).to(x.dtype)


def _context(part: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
    """The first seq_len tokens of one sequence, [seq_len, K, D] float32."""
    block_size = part.shape[2]
    blocks = part[block_table[: -(-seq_len // block_size)].long()]  # [blocks, K, block_size, D]
    return blocks.transpose(1, 2).flatten(0, 1)[:seq_len].float()


def _attend(query: Tensor, context: LayerKv, params: AttentionParams) -> Tensor:
    """query [Q, H, D], the last Q tokens of a context of L tokens -> [Q, H, D] float32."""
    num_queries, num_heads, _ = query.shape
    seq_len, num_kv_heads, _ = context.key.shape
    group = num_heads // num_kv_heads
    key = context.key.repeat_interleave(group, dim=1)
    value = context.value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,lhd->hql", query.float(), key) * params.scale
    if params.soft_cap is not None:
        scores = params.soft_cap * torch.tanh(scores / params.soft_cap)
    position = torch.arange(seq_len - num_queries, seq_len, device=query.device).unsqueeze(1)
    other = torch.arange(seq_len, device=query.device).unsqueeze(0)
    visible = other <= position
    if params.sliding_window is not None:
        visible &= other > position - params.sliding_window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hql,lhd->qhd", weights, value)
