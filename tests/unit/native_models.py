"""Small random decoders for the kernels, made in memory: no folder, no transformers."""

from __future__ import annotations

import platform
from ctypes import CDLL

import pytest
import torch
from torch import Tensor

from executor_svc.models.decoder import Decoder, DecoderWeights, LayerWeights
from executor_svc.models.decoder_config import DecoderConfig, RopeConfig
from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.models.projections import LinearPacker
from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native.describe import DTYPE_CODES
from executor_svc.ops.native.library import (
    BUILDS,
    Library,
    LibraryUnavailable,
    load_library,
    processor_flags,
)
from executor_svc.ops.native.packing import Packer
from executor_svc.ops.reference import ReferenceOps

BUILD_NAMES = tuple(build.name for build in BUILDS if build.machine in ("", platform.machine()))


def load_build(name: str) -> Library:
    """That very build; the test is skipped where it does not exist or does not run."""
    needs = next(build.needs for build in BUILDS if build.name == name)
    if not needs <= processor_flags():
        pytest.skip(f"this processor cannot run the {name} build")
    try:
        library = load_library(flags=needs)
    except LibraryUnavailable as unavailable:
        pytest.skip(str(unavailable))
    if library.name != name:
        pytest.skip(f"the {name} build was not compiled")
    return library


def best_build() -> Library:
    """What a server on this machine would use, or a skip."""
    try:
        return load_library()
    except LibraryUnavailable as unavailable:
        pytest.skip(str(unavailable))


def has_bfloat_dot(functions: CDLL) -> bool:
    """Whether this build multiplies bfloat16 weights by activations rounded to bfloat16."""
    group: int = functions.headrace_depth_group(DTYPE_CODES[torch.bfloat16])
    return group == 2


def make_config(**changes: object) -> DecoderConfig:
    """Two layers, odd sizes, one of the layers with a sliding window."""
    settings: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 56,
        "intermediate_size": 90,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 20,
        "vocab_size": 333,
        "rms_norm_eps": 1e-6,
        "norm_offset": 0.0,
        "embedding_scale": 1.0,
        "activation": "silu",
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "sandwich_norms": False,
        "attention_scale": 20**-0.5,
        "attention_soft_cap": None,
        "logits_soft_cap": None,
        "tie_word_embeddings": True,
        "layer_windows": (None, 70),
        "layer_ropes": (RopeConfig(10_000.0, 20), RopeConfig(500.0, 12)),
    }
    return DecoderConfig(**{**settings, **changes})  # type: ignore[arg-type]


QWEN_LIKE = make_config(qk_norm=True, qkv_bias=True)
GEMMA_LIKE = make_config(
    qk_norm=True,
    sandwich_norms=True,
    embedding_scale=7.5,
    activation="gelu_tanh",
    attention_soft_cap=5.0,
    logits_soft_cap=8.0,
    tie_word_embeddings=False,
    output_bias=True,
    mlp_bias=True,
)


def make_weights(config: DecoderConfig, packer: LinearPacker, dtype: torch.dtype) -> DecoderWeights:
    """The same values for the same config, whoever packs them."""
    generator = torch.Generator().manual_seed(7)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.25

    def norm(size: int) -> Tensor:
        return (1 + values(size)).to(dtype)

    def linear(out_size: int, in_size: int, has_bias: bool) -> LinearWeight:
        weight = values(out_size, in_size).to(dtype)
        return packer.prepare_linear(weight, values(out_size).to(dtype) if has_bias else None)

    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
    embedding = values(config.vocab_size, hidden).to(dtype)
    head = embedding if config.tie_word_embeddings else values(*embedding.shape).to(dtype)
    layers = tuple(
        LayerWeights(
            attention_norm=norm(hidden),
            qkv=linear(query_size + 2 * kv_size, hidden, config.qkv_bias),
            query_norm=norm(dim) if config.qk_norm else None,
            key_norm=norm(dim) if config.qk_norm else None,
            output=linear(hidden, query_size, config.output_bias),
            behind_attention_norm=norm(hidden) if config.sandwich_norms else None,
            mlp_norm=norm(hidden),
            gate_up=linear(2 * inner, hidden, config.mlp_bias),
            down=linear(hidden, inner, config.mlp_bias),
            behind_mlp_norm=norm(hidden) if config.sandwich_norms else None,
        )
        for _ in range(config.num_layers)
    )
    return DecoderWeights(embedding, layers, norm(hidden), packer.prepare_linear(head))


def make_fused(
    config: DecoderConfig,
    library: Library,
    num_threads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> FusedDecoder:
    weights = make_weights(config, Packer(library), dtype)
    return FusedDecoder(config, weights, library, num_threads)


def make_reference(config: DecoderConfig) -> Decoder:
    return Decoder(config, make_weights(config, ReferenceOps(), torch.float32), ReferenceOps())
