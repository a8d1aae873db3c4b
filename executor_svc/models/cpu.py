"""Chooses how a model runs on the CPU: compiled kernels where they exist, torch everywhere."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from executor_svc.model_config import ModelConfig
from executor_svc.models.decoder_config import FAMILIES, parse_decoder_config
from executor_svc.models.decoder_loader import load_decoder_weights
from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.models.model import Model
from executor_svc.models.registry import load_model
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.native.library import (
    MAX_HEAD_DIM,
    Library,
    LibraryUnavailable,
    load_library,
)
from executor_svc.ops.native.packing import Packer
from executor_svc.weights import resolve_dtype

logger = logging.getLogger(__name__)


def load_cpu_model(folder: Path, config: ModelConfig, dtype: str) -> Model:
    """Load the model of a folder for this machine's CPU, on torch.get_num_threads() threads.

    `dtype` auto is the checkpoint's own with the kernels, which compute in float32 anyway, and
    float32 with torch, which is slow in all else.

    Raises:
        ModelLoadError: the folder cannot be served; the text says why and what to do.
    """
    fused = _try_fused(config, dtype)
    if fused is not None:
        return fused
    return load_model(folder, config, "float32" if dtype == "auto" else dtype, CpuOps())


def load_fused_decoder(config: ModelConfig, dtype: str, library: Library) -> FusedDecoder:
    """Load a native family onto the kernels of `library`."""
    decoder_config = parse_decoder_config(config)
    weights = load_decoder_weights(
        config.folder, decoder_config, resolve_dtype(dtype, config), Packer(library)
    )
    return FusedDecoder(decoder_config, weights, library, torch.get_num_threads())


def _try_fused(config: ModelConfig, dtype: str) -> FusedDecoder | None:
    if config.architecture not in FAMILIES:
        logger.info("CPU backend: torch, through transformers' %s", config.architecture)
        return None
    head_dim = parse_decoder_config(config).head_dim
    if head_dim > MAX_HEAD_DIM:
        logger.info("CPU backend: torch, as heads of %d are beyond the kernels", head_dim)
        return None
    try:
        library = load_library()
    except LibraryUnavailable as unavailable:
        logger.warning("CPU backend: torch, much slower than it could be: %s", unavailable)
        return None
    logger.info("CPU backend: compiled kernels (%s)", library.name)
    return load_fused_decoder(config, dtype, library)
