"""Reads `config.json` and `generation_config.json` of a Hugging Face folder.

Knows neither torch nor transformers: importing the latter for `AutoConfig` costs seconds at start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

DTYPES = ("float32", "bfloat16", "float16")


class ModelLoadError(Exception):
    """A model folder that cannot be served; the text names what is wrong and the remedy."""


@dataclass(frozen=True)
class ConfigFields:
    """Typed reads of one JSON object. An explicit `null` counts as absent."""

    source: str
    values: Mapping[str, object]

    def find(self, *names: str) -> object | None:
        """The first of `names` that is present and not null."""
        return next(
            (self.values[name] for name in names if self.values.get(name) is not None), None
        )

    def integer(self, *names: str, default: int | None = None) -> int:
        value = self.find(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(names[0], f"must be an integer, not {value!r}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self.find(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(names[0], f"must be a number, not {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def string(self, *names: str, default: str | None = None) -> str:
        value = self.find(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(names[0], f"must be a string, not {value!r}")
        return value

    def optional_number(self, name: str) -> float | None:
        return None if self.find(name) is None else self.number(name)

    def strings(self, name: str) -> list[str] | None:
        value = self.find(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, f"must be a list of strings, not {value!r}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A field that holds one id, a list of ids or nothing."""
        value = self.find(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise self.error(name, f"must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def nested(self, name: str) -> ConfigFields | None:
        """The object under `name`, or None where it is absent, null or empty."""
        value = self.find(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {value!r}")
        return ConfigFields(f"{self.source}: {name}", MappingProxyType(value))

    def error(self, name: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self.source}: '{name}' {problem}; correct it in the model folder")


@dataclass(frozen=True)
class ModelConfig:
    """What every decoder's config says, whatever its family.

    `head_dim` and `num_kv_heads` are what the file says or implies; the cache is laid out by
    the loaded model's own `kv_spec`. `fields` gives a family its particular settings,
    `quantization` is what a quantized checkpoint says of its weights.
    """

    folder: Path
    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    fields: ConfigFields
    quantization: ConfigFields | None = None


def load_model_config(folder: Path) -> ModelConfig:
    """Parse a model folder's config.

    Raises:
        ModelLoadError: the folder or a field is missing or malformed.
    """
    top = _read_json(folder / "config.json", required=True)
    # Multimodal configs keep the decoder's settings in a sub-object.
    fields = top.nested("text_config") or top
    hidden_size = fields.integer("hidden_size", "n_embd", "d_model")
    num_heads = fields.integer("num_attention_heads", "n_head", "n_heads")
    if min(hidden_size, num_heads) <= 0:
        raise fields.error("num_attention_heads", "and 'hidden_size' must be positive")
    return ModelConfig(
        folder=folder,
        architecture=_architecture(top),
        model_type=top.string("model_type", default=""),
        num_layers=fields.integer("num_hidden_layers", "n_layer", "n_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=num_heads),
        head_dim=fields.integer("head_dim", default=hidden_size // num_heads),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=_context_limit(fields),
        eos_token_ids=_eos_token_ids(folder, fields, top),
        dtype=_dtype(fields, top),
        fields=fields,
        quantization=top.nested("quantization_config") or top.nested("compression_config"),
    )


def _read_json(path: Path, *, required: bool) -> ConfigFields:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not required:
            return ConfigFields(str(path), MappingProxyType({}))
        raise ModelLoadError(
            f"{path} does not exist; MODEL must be a folder in the Hugging Face format"
        ) from None
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path} must hold a JSON object; download it again")
    return ConfigFields(str(path), MappingProxyType(values))


def _architecture(top: ConfigFields) -> str:
    names = top.strings("architectures")
    if not names:
        raise top.error("architectures", "is missing: it must name the model class")
    return names[0]


def _context_limit(fields: ConfigFields) -> int:
    """Positions that the model can serve with one fixed set of rotary frequencies.

    `longrope` switches frequencies once a sequence passes the original length. transformers
    decides that from the longest sequence of a batch, which would make a request's tokens
    depend on its neighbours, so the model is served within its original length.
    """
    limit = fields.integer("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    rope = fields.nested("rope_parameters") or fields.nested("rope_scaling")
    if rope is None or rope.find("rope_type", "type") not in ("longrope", "su"):
        return limit
    original = fields.find("original_max_position_embeddings")
    if original is None:
        return min(limit, rope.integer("original_max_position_embeddings", default=limit))
    return min(limit, fields.integer("original_max_position_embeddings"))


def _eos_token_ids(folder: Path, fields: ConfigFields, top: ConfigFields) -> tuple[int, ...]:
    generation = _read_json(folder / "generation_config.json", required=False)
    name = "eos_token_id"
    return generation.token_ids(name) or fields.token_ids(name) or top.token_ids(name)


def _dtype(fields: ConfigFields, top: ConfigFields) -> str:
    names = ("dtype", "torch_dtype")
    found = fields if fields.find(*names) is not None else top
    dtype = found.string(*names, default="float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise found.error("dtype", f"is {dtype!r}, supported are {', '.join(DTYPES)}")
    return dtype
