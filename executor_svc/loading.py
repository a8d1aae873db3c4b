"""Loads a model and makes the KV cache of the CPU device."""

from __future__ import annotations

import logging
import os
import time

import torch

from executor_svc.kv_cache import (
    GIB,
    KvCache,
    KvCacheLimits,
    KvSpec,
    allocate_kv_cache,
    measure_host_memory,
    size_kv_cache,
)
from executor_svc.model_config import load_model_config
from executor_svc.models.cpu import load_cpu_model
from executor_svc.models.model import Model
from stages.config import ServerConfig
from stages.model_folder import model_path

logger = logging.getLogger(__name__)


def load(config: ServerConfig) -> tuple[Model, KvCache]:
    """Read the weights and size the cache by what the configuration and the memory say."""
    folder = model_path(config)
    torch.set_num_threads(config.cpu_threads or _auto_threads())
    started = time.monotonic()
    before = measure_host_memory().available
    model = load_cpu_model(
        folder, load_model_config(folder), config.dtype, config.quantization, config.cpu_kernels
    )
    seconds = time.monotonic() - started
    logger.info("Loading weights took %.2f seconds", seconds)
    taken = max(0, before - measure_host_memory().available)
    logger.info("Model loading took %.4f GiB memory and %.6f seconds", taken / GIB, seconds)
    return model, _make_kv_cache(config, model.kv_spec)


def _auto_threads() -> int:
    """All cores. The kernels' pool decides loop by loop whether a second one pays: the steps of a
    tiny model stay on one, and leave the others to the other stages.
    """
    return len(os.sched_getaffinity(0))


def _make_kv_cache(config: ServerConfig, spec: KvSpec) -> KvCache:
    limits = KvCacheLimits(
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_blocks=config.num_blocks or None,
        kv_cache_memory_bytes=config.kv_cache_memory or None,
        gpu_memory_utilization=config.gpu_memory_utilization or None,
    )
    size = size_kv_cache(spec, limits, measure_host_memory())
    logger.info("Available KV cache memory: %.2f GiB", size.num_bytes / GIB)
    logger.info(
        "CPU KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx",
        f"{size.num_tokens:,}",
        f"{config.max_model_len:,}",
        size.num_tokens / config.max_model_len,
    )
    return allocate_kv_cache(spec, size.num_blocks, config.block_size)
