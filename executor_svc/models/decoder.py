"""The decoder that Llama, Mistral, Qwen 2 and 3 and Gemma 2 and 3 share, over `Ops`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, KvSpec, LayerKv
from executor_svc.models.decoder_config import DecoderConfig
from executor_svc.models.rope import Rope
from executor_svc.ops.interface import (
    AttentionParams,
    AttentionPlan,
    LinearWeight,
    Ops,
    QkNorms,
    RotaryAndWrite,
)


@dataclass(frozen=True)
class LayerWeights:
    """One layer. `query_norm` and `key_norm` exist with `qk_norm`, the two norms behind a
    sublayer (before its result joins the residual) with `sandwich_norms`.
    """

    attention_norm: Tensor
    qkv: LinearWeight
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: LinearWeight
    behind_attention_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: LinearWeight
    down: LinearWeight
    behind_mlp_norm: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights in the model's dtype; the norms of Gemma in float32, offset included."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: LinearWeight

    @property
    def num_bytes(self) -> int:
        """What a step reads of all projections."""
        layers = ((layer.qkv, layer.output, layer.gate_up, layer.down) for layer in self.layers)
        return self.head.num_bytes + sum(weight.num_bytes for weight in chain(*layers))


class Decoder:
    """Pre-norm transformer with rotary attention and a gated MLP."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, ops: Ops) -> None:
        self.kv_spec = KvSpec(
            config.num_layers, config.num_kv_heads, config.head_dim, weights.embedding.dtype
        )
        self.weight_bytes = weights.num_bytes
        self.config = config
        self._weights = weights
        self._ops = ops
        self._fused_write = ops if isinstance(ops, RotaryAndWrite) else None
        device = weights.embedding.device
        self._ropes = {rope: Rope(rope, device) for rope in set(config.layer_ropes)}
        self._attention_params = tuple(
            AttentionParams(config.attention_scale, window, config.attention_soft_cap)
            for window in config.layer_windows
        )
        self._qk_norms = tuple(_qk_norms(layer, config.rms_norm_eps) for layer in weights.layers)
        # The norm that follows each layer: the next layer's first one, at the end the final one.
        norms = [layer.attention_norm for layer in weights.layers]
        self._following_norms = (*norms[1:], weights.final_norm)
        # transformers rounds Gemma's scale to the embedding's dtype.
        scale = torch.tensor(config.embedding_scale, dtype=weights.embedding.dtype)
        self._embedding_scale = float(scale)

    def forward(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        """Logits [m, vocab] float32 of the tokens that `batch.logits_indices` names."""
        config, ops, weights = self.config, self._ops, self._weights
        plan = ops.plan_attention(batch, kv_cache)
        angles = {rope: own.cos_sin(batch.positions) for rope, own in self._ropes.items()}
        hidden = F.embedding(batch.token_ids, weights.embedding)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        normed = ops.rms_norm(hidden, weights.layers[0].attention_norm, config.rms_norm_eps)
        for index, layer in enumerate(weights.layers):
            cos_sin = angles[config.layer_ropes[index]]
            attended = self._attend(index, normed, cos_sin, kv_cache.layers[index], plan)
            normed, hidden = self._join(
                attended, hidden, layer.behind_attention_norm, layer.mlp_norm
            )
            normed, hidden = self._join(
                self._mlp(layer, normed),
                hidden,
                layer.behind_mlp_norm,
                self._following_norms[index],
            )
        return self._logits(normed.index_select(0, batch.logits_indices))

    def _attend(
        self,
        index: int,
        normed: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        cache: LayerKv,
        plan: AttentionPlan,
    ) -> Tensor:
        """normed [T, hidden] -> [T, hidden]; stores this step's keys and values."""
        config, ops, layer = self.config, self._ops, self._weights.layers[index]
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        qkv = ops.linear(normed, layer.qkv)
        query, key, value = (
            part.view(len(part), -1, config.head_dim)
            for part in torch.split(qkv, [query_size, kv_size, kv_size], dim=-1)
        )
        norms = self._qk_norms[index]
        if self._fused_write is not None:
            query = self._fused_write.rotary_and_write_kv(
                query, key, value, *cos_sin, cache, plan, norms
            )
        else:
            if norms is not None:
                query = ops.rms_norm(query, norms.query, norms.eps)
                key = ops.rms_norm(key, norms.key, norms.eps)
            query, key = ops.rotary(query, key, *cos_sin)
            ops.write_kv(key, value, cache, plan)
        attended = ops.paged_attention(query, cache, plan, self._attention_params[index])
        return ops.linear(attended.flatten(1), layer.output)

    def _mlp(self, layer: LayerWeights, normed: Tensor) -> Tensor:
        gate_up = self._ops.linear(normed, layer.gate_up)
        is_silu = self.config.activation == "silu"
        active = self._ops.swiglu(gate_up) if is_silu else self._ops.geglu(gate_up)
        return self._ops.linear(active, layer.down)

    def _join(
        self, x: Tensor, residual: Tensor, behind_norm: Tensor | None, next_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add a sublayer's result to the residual; return the sum's norm and the sum."""
        eps = self.config.rms_norm_eps
        if behind_norm is not None:
            x = self._ops.rms_norm(x, behind_norm, eps)
        return self._ops.add_rms_norm(x, residual, next_norm, eps)

    def _logits(self, normed: Tensor) -> Tensor:
        logits = self._ops.linear(normed, self._weights.head).float()
        cap = self.config.logits_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _qk_norms(layer: LayerWeights, eps: float) -> QkNorms | None:
    if layer.query_norm is None or layer.key_norm is None:
        return None
    return QkNorms(layer.query_norm, layer.key_norm, eps)
