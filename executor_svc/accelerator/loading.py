"""Brings a model onto an accelerator: weights, KV cache, recorded decode steps."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from executor_svc.accelerator.device import Device
from executor_svc.accelerator.first_step import run_first_step
from executor_svc.accelerator.stage import AcceleratorStage
from executor_svc.accelerator.steps import StepLauncher
from executor_svc.accelerator.transfers import Transfers
from executor_svc.kv_cache import GIB, KvCache, KvCacheLimits, size_kv_cache
from executor_svc.model_config import ModelConfig, load_model_config
from executor_svc.models.decoder import Decoder
from executor_svc.models.decoder_config import FAMILIES
from executor_svc.models.decoder_loader import load_decoder
from executor_svc.models.model import Model
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.fusion import ModelNeeds, attention_fallback, report
from executor_svc.ops.npu_limits import FUSED_DTYPES, MAX_RECORDED_LEN
from executor_svc.weights import resolve_dtype
from stages.config import ServerConfig
from stages.model_folder import model_path
from stages.trace import Trace

# Of what is free when the weights are there, if nobody says otherwise.
DEFAULT_UTILIZATION = 0.9

logger = logging.getLogger(__name__)


def load_stage(config: ServerConfig, trace: Trace) -> tuple[AcceleratorStage, KvCache]:
    """Make the executor of the configured accelerator, ready to run.

    Raises:
        DeviceUnavailable: the accelerator is not there; the text says what is missing.
        ModelLoadError: the model cannot be served.
    """
    device = open_device(
        config.device,
        uses_fusion=config.operator_fusion == "on",
        tiles_weights=config.weight_format == "nz",
    )
    folder = model_path(config)
    started = time.monotonic()
    before = device.memory().available
    model = load_device_model(folder, load_model_config(folder), config.dtype, device)
    seconds = time.monotonic() - started
    logger.info("Loading weights took %.2f seconds", seconds)
    device.release_unused()
    taken = max(0, before - device.memory().available)
    logger.info("Model loading took %.4f GiB memory and %.6f seconds", taken / GIB, seconds)
    transfers = Transfers(device, config.parallel_streams)
    run_first_step(config, device, model, transfers)
    if config.memory_policy == "dynamic":
        device.release_unused()
    kv_cache = _make_kv_cache(config, device, model)
    no_graphs_because = why_no_graphs(config, model)
    started = time.monotonic()
    launcher = StepLauncher(config, device, model, kv_cache, no_graphs_because, transfers)
    if no_graphs_because is None:
        logger.info("Graph capturing finished in %.0f secs", time.monotonic() - started)
        if config.memory_policy == "static":
            # Recording has given the workspace of eager steps back.
            run_first_step(config, device, model, transfers)
    else:
        logger.warning("Decode steps run eagerly: %s", no_graphs_because.replace("_", " "))
    return AcceleratorStage(device, launcher, trace), kv_cache


def open_device(kind: str, uses_fusion: bool = True, tiles_weights: bool = False) -> Device:
    """The first accelerator of a kind, npu or cuda. `tiles_weights`: see `NpuOps`.

    Raises:
        DeviceUnavailable: it is not there; the text says what is missing.
    """
    if kind == "npu":
        from executor_svc.accelerator.npu import NpuDevice

        return NpuDevice(uses_fusion=uses_fusion, tiles_weights=tiles_weights)
    from executor_svc.accelerator.cuda import CudaDevice

    return CudaDevice(uses_fusion=uses_fusion)


def load_device_model(folder: Path, config: ModelConfig, dtype: str, device: Device) -> Model:
    """Load the model of a folder onto a device.

    Raises:
        ModelLoadError: the folder cannot be served; the text says why and what to do.
    """
    torch_dtype = resolve_dtype(dtype, config)
    if config.architecture in FAMILIES:
        return load_decoder(config, torch_dtype, device.ops, device.torch_device)
    # Importing transformers takes seconds: only a model that needs it pays.
    from executor_svc.models.transformers_adapter import load_with_transformers

    # Whether paged attention may take the place of a model's own is found out on the CPU.
    on_host = load_with_transformers(folder, torch_dtype, CpuOps())
    return on_host.on_device(device.torch_device, device.ops)


def why_no_graphs(
    config: ServerConfig, model: Model, fused_dtypes: frozenset[torch.dtype] = FUSED_DTYPES
) -> str | None:
    """A word for what keeps decode steps from being recorded, or None.

    A recorded step reads no length and no tensor on the host: plain torch attention does, and so
    does other people's code. `fused_dtypes`: what the attention kernel of an NPU takes.
    """
    if config.enforce_eager:
        return "enforce_eager"
    if config.operator_fusion == "off":
        return "operator_fusion_off"
    if not isinstance(model, Decoder):
        return "adapted_model"
    dtype = model.kv_spec.dtype
    needs = ModelNeeds(model.config, dtype, config.block_size, fused_dtypes)
    if attention_fallback(report(config.device, needs)):
        return "attention_falls_back"
    if config.device == "npu" and config.max_model_len > MAX_RECORDED_LEN:
        return "context_beyond_decode_kernel"
    return None


def _make_kv_cache(config: ServerConfig, device: Device, model: Model) -> KvCache:
    spec = device.cache_spec(model.kv_spec)
    limits = KvCacheLimits(
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_blocks=config.num_blocks or None,
        kv_cache_memory_bytes=config.kv_cache_memory or None,
        gpu_memory_utilization=config.gpu_memory_utilization or DEFAULT_UTILIZATION,
    )
    size = size_kv_cache(spec, limits, device.memory())
    logger.info("Available KV cache memory: %.2f GiB", size.num_bytes / GIB)
    logger.info(
        "%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx",
        device.torch_device,
        f"{size.num_tokens:,}",
        f"{config.max_model_len:,}",
        size.num_tokens / config.max_model_len,
    )
    return device.allocate_kv_cache(spec, size.num_blocks, config.block_size)
