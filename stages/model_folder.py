"""What a Hugging Face folder says about itself, from its JSON files alone; loads no library."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from stages.config import EMBEDDED_MODEL, ModelFacts, ServerConfig
from stages.errors import ConfigError

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def model_path(config: ServerConfig) -> Path:
    """The folder that a configuration names."""
    return embedded_model() if config.model == EMBEDDED_MODEL else Path(config.model)


def embedded_model() -> Path:
    """The folder of the model that ships in the package."""
    spec = find_spec("executor_svc")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "embedded" / "model"


def read_model_facts(folder: Path) -> ModelFacts:
    """Read config.json and generation_config.json; raises `ConfigError` naming what is missing."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder: give the path of a Hugging Face model folder (models are "
            "never downloaded), or none for the embedded model"
        )
    config = _read_json(folder / "config.json", is_required=True)
    generation = _read_json(folder / "generation_config.json", is_required=False)
    text_config = config.get("text_config") or config
    architectures = config.get("architectures") or [""]
    return ModelFacts(
        architecture=architectures[0],
        vocab_size=_need_int(text_config, "vocab_size", folder),
        max_position_embeddings=_max_position_embeddings(text_config, folder),
        eos_token_ids=_eos_token_ids(generation, config, text_config),
        default_sampling=_default_sampling(generation),
    )


def _max_position_embeddings(config: dict[str, Any], folder: Path) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return _need_int(config, "max_position_embeddings", folder)


def _eos_token_ids(*configs: dict[str, Any]) -> list[int]:
    """The first of the configs that names any wins, as in transformers' generate."""
    for config in configs:
        eos = config.get("eos_token_id")
        if eos is not None:
            return [int(token) for token in (eos if isinstance(eos, list) else [eos])]
    return []


def _default_sampling(generation: dict[str, Any]) -> dict[str, float]:
    """Sampling defaults of the model's makers; a model meant to be greedy gets temperature 0."""
    defaults = {
        name: float(generation[name])
        for name in SAMPLING_FIELDS
        if isinstance(generation.get(name), int | float)
    }
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _need_int(config: dict[str, Any], name: str, folder: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise ConfigError(f"{folder / 'config.json'} has no {name}: it is no decoder's config")
    return value


def _read_json(path: Path, *, is_required: bool) -> dict[str, Any]:
    if not path.exists():
        if is_required:
            raise ConfigError(f"{path} is missing: {path.parent} is no Hugging Face model folder")
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
