"""`headrace check-model`: says how a model would run on a device, without loading it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from executor_svc.kv_cache import GIB, KvSpec
from executor_svc.model_config import ModelConfig, ModelLoadError, load_model_config
from executor_svc.models.decoder_config import FAMILIES, DecoderConfig, parse_decoder_config
from executor_svc.ops.fusion import ModelNeeds, OperatorReport, attention_fallback, report
from executor_svc.ops.npu_limits import cache_head_dim
from executor_svc.weights import find_weight_files, resolve_dtype
from stages.config import ServerConfig
from stages.errors import HeadraceError
from stages.model_folder import model_path
from stages.native_library import TORCH

KIB = 1 << 10


def check_model(config: ServerConfig) -> list[str]:
    """Lines of `name value`.

    Raises:
        HeadraceError: the model cannot be served; the text says why and what to do.
    """
    try:
        return [f"{name:<14} {value}" for name, value in _facts(config)]
    except ModelLoadError as error:
        raise HeadraceError(str(error)) from error


def _facts(config: ServerConfig) -> list[tuple[str, str]]:
    folder = model_path(config)
    model_config = load_model_config(folder)
    dtype = resolve_dtype(config.dtype, model_config)
    facts: list[tuple[str, str]] = [
        ("architecture", model_config.architecture),
        ("runs as", _runs_as(model_config)),
        ("device", config.device),
        ("dtype", str(dtype).removeprefix("torch.")),
        ("weights", f"{sum(f.stat().st_size for f in find_weight_files(folder)) / GIB:.3f} GiB"),
    ]
    if model_config.architecture in FAMILIES:
        decoder_config = parse_decoder_config(model_config)
        facts += _cache_facts(config, decoder_config, dtype)
        facts += _operator_facts(config, _needs(config, decoder_config, dtype))
    else:
        facts += [("attention", "paged, whatever else the model does is transformers' own")]
    return facts


def _needs(config: ServerConfig, model: DecoderConfig, dtype: torch.dtype) -> ModelNeeds:
    tiles_weights = config.weight_format == "nz"
    return ModelNeeds(model, dtype, config.block_size, tiles_weights=tiles_weights)


def _runs_as(config: ModelConfig) -> str:
    if config.architecture in FAMILIES:
        return "native decoder"
    return "transformers' own code over our paged attention; its decode steps are not recorded"


def _cache_facts(
    config: ServerConfig, model: DecoderConfig, dtype: torch.dtype
) -> Iterator[tuple[str, str]]:
    is_padded = config.device == "npu" and config.operator_fusion == "on"
    head_dim = cache_head_dim(model.head_dim) if is_padded else model.head_dim
    spec = KvSpec(model.num_layers, model.num_kv_heads, head_dim, dtype)
    num_blocks = config.max_num_seqs * -(-config.max_model_len // config.block_size)
    num_bytes = num_blocks * spec.block_bytes(config.block_size)
    yield "KV cache", f"{spec.block_bytes(1) / KIB:.1f} KiB a token"
    yield (
        "",
        f"{num_bytes / GIB:.2f} GiB for {config.max_num_seqs} rows of "
        f"{config.max_model_len:,} tokens; what is free decides",
    )


def _operator_facts(config: ServerConfig, needs: ModelNeeds) -> Iterator[tuple[str, str]]:
    if config.device == "cpu":
        yield "operators", _cpu_backend(needs.config, config.cpu_kernels)
        return
    if config.operator_fusion == "off":
        yield "operators", "torch: --operator-fusion off; decode steps are not recorded"
        return
    reports = report(config.device, needs)
    for own in reports:
        yield own.operator, _describe(own)
    yield "decode graphs", _graphs(config, reports)


def _describe(own: OperatorReport) -> str:
    return own.kernel + (f"; falls back: {own.fallback}" if own.fallback else "")


def _graphs(config: ServerConfig, reports: list[OperatorReport]) -> str:
    if config.enforce_eager:
        return "none: --enforce-eager"
    fallback = attention_fallback(reports)
    return f"none: attention falls back: {fallback}" if fallback else "one a batch bucket"


def _cpu_backend(config: DecoderConfig, kernels: str) -> str:
    from executor_svc.ops.native.library import MAX_HEAD_DIM, LibraryUnavailable, load_library

    if kernels == TORCH:
        return "torch, as --cpu-kernels says"
    if config.head_dim > MAX_HEAD_DIM:
        return f"torch, as heads of {config.head_dim} are beyond the compiled kernels"
    try:
        return f"compiled kernels ({load_library(choice=kernels).name})"
    except LibraryUnavailable as unavailable:
        return f"torch, much slower than it could be: {unavailable}"
