"""The attention function that transformers calls in our name; needs torch only.

What it works on travels as a keyword argument of the model's forward, which every model with
`_supports_attention_backend` hands down to its attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from executor_svc.kv_cache import LayerKv
from executor_svc.model_config import ModelLoadError
from executor_svc.ops.interface import AttentionParams, AttentionPlan, Ops

# Both the registered name and the keyword argument. No mask function is registered under it:
# for such an implementation transformers builds no mask at all.
ATTENTION_NAME = "headrace_paged"


class LayerShape(NamedTuple):
    """What one layer stores a token, and the window that it attends within."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None


@dataclass(frozen=True)
class PagedStep:
    """One step's attention: store the new keys and values, then attend over the cache."""

    ops: Ops
    plan: AttentionPlan
    layers: Sequence[LayerKv]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """query [T, H, D], key and value [T, K, D] -> [T, H, D]."""
        cache = self.layers[layer]
        dtype = cache.key.dtype
        # Some models leave rotated keys in float32.
        self.ops.write_kv(key.to(dtype), value.to(dtype), cache, self.plan)
        return self.ops.paged_attention(query.to(dtype), cache, self.plan, params)


@dataclass(frozen=True)
class LayerRecorder:
    """Notes what each layer would store; its result has the right shape and no meaning."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        self.shapes[layer] = LayerShape(
            key.shape[1], key.shape[2], value.shape[2], params.sliding_window
        )
        return torch.zeros(*query.shape[:2], value.shape[2], dtype=value.dtype)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    headrace_paged: PagedStep | LayerRecorder | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, H, T, D], key and value [1, K, T, D].

    Returns:
        The attended values [1, T, H, D], and no weights.
    """
    name = type(module).__name__
    layer = getattr(module, "layer_idx", None)
    if headrace_paged is None or not isinstance(layer, int):
        raise ModelLoadError(
            f"{name} passes no layer index or options to its attention function; it is not "
            "supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    params = AttentionParams(scale, sliding_window, softcap)
    out = headrace_paged.attend(layer, _rows(query), _rows(key), _rows(value), params)
    return out.unsqueeze(0), None


def _rows(heads: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads, D]."""
    return heads[0].transpose(0, 1)
