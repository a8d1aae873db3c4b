"""Which operators of a model a device fuses, and which run as plain torch; nothing is loaded.

The limits are those that the operators themselves ask; no device package is imported.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from executor_svc.models.decoder_config import DecoderConfig
from executor_svc.ops import cuda_limits
from executor_svc.ops.interface import AttentionParams
from executor_svc.ops.npu_limits import (
    FUSED_DTYPES,
    AttentionShape,
    attention_obstacle,
    cache_head_dim,
    norm_obstacle,
)
from executor_svc.ops.npu_weights import tiling_obstacle


class OperatorReport(NamedTuple):
    """`kernel`: what computes it. `fallback`: why plain torch does, for some layers or all."""

    operator: str
    kernel: str
    fallback: str = ""


@dataclass(frozen=True)
class ModelNeeds:
    """What decides which kernels take a native model."""

    config: DecoderConfig
    dtype: torch.dtype
    block_size: int
    fused_dtypes: frozenset[torch.dtype] = FUSED_DTYPES
    tiles_weights: bool = False

    @property
    def layers(self) -> list[AttentionParams]:
        config = self.config
        return [
            AttentionParams(config.attention_scale, window, config.attention_soft_cap)
            for window in config.layer_windows
        ]


TORCH = "torch"


def report(kind: str, needs: ModelNeeds) -> list[OperatorReport]:
    """What the operators of a device, npu or cuda, do with a native model."""
    return npu_report(needs) if kind == "npu" else cuda_report(needs)


def attention_fallback(reports: list[OperatorReport]) -> str:
    """Why some layers attend by plain torch, whose steps cannot be recorded; '' if none does."""
    return next(own.fallback for own in reports if own.operator == "attention")


def npu_report(needs: ModelNeeds) -> list[OperatorReport]:
    """What `ops.npu` does with a native model."""
    config = needs.config
    # Gemma's norms are kept in float32, their offset included.
    norm_dtype = torch.float32 if config.norm_offset else needs.dtype
    obstacle = norm_obstacle(needs.dtype, norm_dtype)
    is_silu = config.activation == "silu"
    return [
        _npu_linear(needs),
        OperatorReport("rms_norm", "npu_rms_norm"),
        _either("add_rms_norm", "npu_add_rms_norm", obstacle),
        OperatorReport("rotary", "npu_rotary_mul"),
        OperatorReport("write_kv", "npu_scatter_pa_kv_cache"),
        _npu_attention(needs),
        OperatorReport("swiglu", "npu_swiglu")
        if is_silu
        else OperatorReport("geglu", TORCH, "two kernels of torch take its place"),
        OperatorReport("sampling", "npu_top_k_top_p where the gateway draws the seed, else torch"),
    ]


def cuda_report(needs: ModelNeeds) -> list[OperatorReport]:
    """What `ops.cuda` does with a native model."""
    triton = "Triton"
    gated = "swiglu" if needs.config.activation == "silu" else "geglu"
    obstacle = cuda_limits.attention_obstacle(needs.config.head_dim)
    return [
        OperatorReport("linear", "cuBLAS, Triton at batch 1"),
        *(OperatorReport(name, triton) for name in ("rms_norm", "add_rms_norm")),
        OperatorReport("rotary + write_kv", triton),
        _either("attention", triton, obstacle),
        OperatorReport(gated, triton),
        OperatorReport("sampling", TORCH),
    ]


def _npu_linear(needs: ModelNeeds) -> OperatorReport:
    if not needs.tiles_weights:
        return OperatorReport("linear", TORCH)
    config, dim = needs.config, needs.config.head_dim
    query_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
    shapes = {
        (query_size + 2 * kv_size, config.hidden_size),
        (config.hidden_size, query_size),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
        (config.vocab_size, config.hidden_size),
    }
    obstacles = {tiling_obstacle(needs.dtype, shape) for shape in shapes} - {None}
    reasons = "; ".join(sorted(filter(None, obstacles)))
    return OperatorReport("linear", "torch, weights in tiles (FRACTAL_NZ)", reasons)


def _npu_attention(needs: ModelNeeds) -> OperatorReport:
    config, head_dim = needs.config, cache_head_dim(needs.config.head_dim)
    shape = AttentionShape(
        config.num_heads, config.num_kv_heads, head_dim, needs.block_size, needs.dtype
    )
    obstacles = [attention_obstacle(shape, params, needs.fused_dtypes) for params in needs.layers]
    counts = Counter(obstacle for obstacle in obstacles if obstacle is not None)
    reasons = [f"{reason} ({n} of {len(obstacles)} layers)" for reason, n in counts.items()]
    kernel = "npu_fused_infer_attention_score" if None in obstacles else TORCH
    if head_dim != config.head_dim and kernel != TORCH:
        kernel += f", heads of {config.head_dim} padded to {head_dim}"
    return OperatorReport("attention", kernel, "; ".join(reasons))


def _either(operator: str, kernel: str, obstacle: str | None) -> OperatorReport:
    return (
        OperatorReport(operator, kernel)
        if obstacle is None
        else OperatorReport(operator, TORCH, obstacle)
    )
