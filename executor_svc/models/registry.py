"""From an architecture's name to its loader: the shared decoder or the transformers adapter."""

from __future__ import annotations

from pathlib import Path

from executor_svc.model_config import ModelConfig, ModelLoadError
from executor_svc.models.decoder_config import FAMILIES
from executor_svc.models.decoder_loader import load_decoder
from executor_svc.models.model import Model
from executor_svc.ops.interface import Ops
from executor_svc.weights import resolve_dtype


def load_model(folder: Path, config: ModelConfig, dtype: str, ops: Ops) -> Model:
    """Load the model of a folder; `dtype` is auto, float32, bfloat16 or float16.

    Raises:
        ModelLoadError: the folder cannot be served; the text says why and what to do.
    """
    torch_dtype = resolve_dtype(dtype, config)
    if config.architecture in FAMILIES:
        return load_decoder(config, torch_dtype, ops)
    if config.quantization is not None:
        raise ModelLoadError(
            f"{config.quantization.source} names a quantized checkpoint; of {config.architecture} "
            "only the float32, bfloat16 and float16 releases are served, use one of those"
        )
    # Importing transformers takes seconds: only a model that needs it pays.
    from executor_svc.models.transformers_adapter import load_with_transformers

    return load_with_transformers(folder, torch_dtype, ops)
