"""`headrace make-model`: a model of a known shape with random weights, as a Hugging Face folder.

For tests and measurements without a network. Every tensor is a pure function of (seed, name), so
the same command gives the same folder on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from executor_svc.make_tokenizer import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    TURN_END,
    train_tokenizer,
    write_tokenizer,
)
from executor_svc.model_shapes import SHAPES, ConfigDict, head_dim
from stages.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Learnt in a few seconds.
TOKENIZER_VOCAB_SIZE = 32768
# Enough text that the trainer finds that many entries worth having.
CORPUS_BYTES_PER_ENTRY = 256
MAX_SHARD_BYTES = 2 * 10**9

STD = 0.02


def weight_shapes(config: ConfigDict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give name and shape of every tensor of the checkpoint, in file order."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _layer_shapes(config: ConfigDict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inter, dim = config["hidden_size"], config["intermediate_size"], head_dim(config)
    q_size = config["num_attention_heads"] * dim
    kv_size = config["num_key_value_heads"] * dim
    yield "input_layernorm.weight", (hidden,)
    for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        yield f"self_attn.{name}.weight", (size, hidden)
        if config["model_type"] == "qwen2":
            yield f"self_attn.{name}.bias", (size,)
    if config["model_type"] == "qwen3":
        yield "self_attn.q_norm.weight", (dim,)
        yield "self_attn.k_norm.weight", (dim,)
    yield "self_attn.o_proj.weight", (hidden, q_size)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate_proj.weight", (inter, hidden)
    yield "mlp.up_proj.weight", (inter, hidden)
    yield "mlp.down_proj.weight", (hidden, inter)


def make_weight(
    name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype, norm_value: float
) -> torch.Tensor:
    """Give one tensor: normal with deviation 0.02, a norm's weight constant."""
    if name.endswith("norm.weight"):
        return torch.full(shape, norm_value, dtype=dtype)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(std=STD, generator=generator).to(dtype)


def write_weights(
    config: ConfigDict, folder: Path, seed: int, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write the checkpoint, in several files with an index where it exceeds `max_shard_bytes`."""
    # Gemma multiplies by one plus the weight, the others by the weight.
    norm_value = 0.0 if config["model_type"] == "gemma" else 1.0
    shards = _split(list(weight_shapes(config)), max_shard_bytes // dtype.itemsize)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors"
        if len(shards) > 1:
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: make_weight(name, shape, seed, dtype, norm_value) for name, shape in shard}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _split(
    weights: list[tuple[str, tuple[int, ...]]], max_elements: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut the list into runs of at most `max_elements`; a tensor larger than that stands alone."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = max_elements
    for name, shape in weights:
        size = torch.Size(shape).numel()
        if size > room and shards[-1]:
            shards.append([])
            room = max_elements
        shards[-1].append((name, shape))
        room -= size
    return shards


def make_model(
    shape: str,
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer_vocab_size: int = TOKENIZER_VOCAB_SIZE,
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder; `vocab_size` None keeps the shape's own.

    The tokenizer has at most `tokenizer_vocab_size` entries; the embedding pads it up, as in
    published models. Raises ConfigError for an unknown shape or dtype, a vocabulary too small for
    bytes, or a folder that holds something.
    """
    config = SHAPES.get(shape)
    if config is None:
        raise ConfigError(f"--shape {shape} is not known; there are {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not known; there are {', '.join(DTYPES)}")
    vocab_size = vocab_size or int(config["vocab_size"])
    num_entries = min(vocab_size, tokenizer_vocab_size)
    if num_entries < MIN_VOCAB_SIZE:
        raise ConfigError(f"--vocab-size must be at least {MIN_VOCAB_SIZE}: the bytes and 3 more")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"--out {folder} is not empty: give a new folder")
    tokenizer = train_tokenizer(num_entries, num_entries * CORPUS_BYTES_PER_ENTRY)
    config = config | {"vocab_size": vocab_size, "torch_dtype": dtype} | _special_ids(tokenizer)
    write_tokenizer(tokenizer, folder, config["max_position_embeddings"])
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _special_ids(tokenizer))
    write_weights(config, folder, seed, DTYPES[dtype], max_shard_bytes)


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
