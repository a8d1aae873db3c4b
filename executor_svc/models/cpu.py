"""Chooses how a model runs on the CPU: compiled kernels where they exist, torch everywhere."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from executor_svc.model_config import ModelConfig, ModelLoadError
from executor_svc.models.decoder_config import FAMILIES, parse_decoder_config
from executor_svc.models.decoder_loader import load_decoder_weights
from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.models.model import Model
from executor_svc.models.projections import Quantization
from executor_svc.models.registry import load_model
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.native.library import (
    MAX_HEAD_DIM,
    Library,
    LibraryUnavailable,
    load_library,
)
from executor_svc.ops.native.quantized_packing import QuantizedPacker
from executor_svc.quantization.cache import (
    PackedCache,
    cache_key,
    cache_path,
    default_cache_folder,
)
from executor_svc.quantization.checkpoint_config import make_reader
from executor_svc.quantization.schemes import NO_SCHEME, SCHEMES
from executor_svc.weights import resolve_dtype
from stages.native_library import AUTO, TORCH

logger = logging.getLogger(__name__)


def load_cpu_model(
    folder: Path,
    config: ModelConfig,
    dtype: str,
    quantization: str = NO_SCHEME,
    kernels: str = AUTO,
) -> Model:
    """Load the model of a folder for this machine's CPU, on torch.get_num_threads() threads.

    `dtype` auto is the checkpoint's own with the kernels, which compute in float32 anyway, and
    float32 with torch, which is slow in all else. `quantization` is none, int8 or w8a8; `kernels`
    is a build's name, auto or torch.

    Raises:
        ModelLoadError: the folder cannot be served; the text says why and what to do.
        ConfigError: there is no such build for this processor.
    """
    _check_quantization(config, quantization)
    fused = _try_fused(config, dtype, quantization, kernels)
    if fused is not None:
        return fused
    if quantization != NO_SCHEME:
        logger.warning("--quantization %s needs the compiled kernels: ignored", quantization)
    return load_model(folder, config, "float32" if dtype == "auto" else dtype, CpuOps())


def load_fused_decoder(
    config: ModelConfig,
    dtype: str,
    library: Library,
    quantization: str = NO_SCHEME,
    cache_folder: Path | None = None,
) -> FusedDecoder:
    """Load a native family onto the kernels of `library`.

    Quantized weights are kept in `cache_folder`, if there is one, for the next load.
    """
    decoder_config, torch_dtype = parse_decoder_config(config), resolve_dtype(dtype, config)
    reader = None if config.quantization is None else make_reader(config.quantization)
    scheme = SCHEMES.get(quantization)
    with ExitStack() as files:
        cache = None
        if cache_folder is not None and (reader is not None or scheme is not None):
            name = "checkpoint" if scheme is None else scheme.name
            key = cache_key(config.folder, name, library.name, torch_dtype)
            path = cache_path(cache_folder, config.folder, name, library.name)
            cache = files.enter_context(PackedCache(path, key))
        weights = load_decoder_weights(
            config.folder,
            decoder_config,
            torch_dtype,
            QuantizedPacker(library),
            quantization=Quantization(reader, scheme, cache),
        )
    return FusedDecoder(decoder_config, weights, library, torch.get_num_threads())


def _check_quantization(config: ModelConfig, quantization: str) -> None:
    if quantization == NO_SCHEME:
        return
    if config.quantization is not None:
        raise ModelLoadError(
            f"--quantization {quantization} is for float checkpoints, and this one is quantized "
            "already: leave the flag out"
        )
    if config.architecture not in FAMILIES:
        raise ModelLoadError(
            f"--quantization {quantization} is not served for {config.architecture}, only for "
            f"{', '.join(FAMILIES)}: leave the flag out"
        )


def _try_fused(
    config: ModelConfig, dtype: str, quantization: str, kernels: str
) -> FusedDecoder | None:
    if kernels == TORCH:
        logger.info("CPU backend: torch, as --cpu-kernels says")
        return None
    if config.architecture not in FAMILIES:
        logger.info("CPU backend: torch, through transformers' %s", config.architecture)
        return None
    head_dim = parse_decoder_config(config).head_dim
    if head_dim > MAX_HEAD_DIM:
        logger.info("CPU backend: torch, as heads of %d are beyond the kernels", head_dim)
        return None
    try:
        library = load_library(choice=kernels)
    except LibraryUnavailable as unavailable:
        logger.warning("CPU backend: torch, much slower than it could be: %s", unavailable)
        return None
    logger.info("CPU backend: compiled kernels (%s)", library.name)
    return load_fused_decoder(config, dtype, library, quantization, default_cache_folder())
