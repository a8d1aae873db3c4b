"""Writes a Qwen2 or Qwen3 folder as GGUF, so that llama.cpp serves the very weights we serve.

Needs the `gguf` package and numpy, nothing of ours: `PYTHON -m benchmarks.to_gguf FOLDER FILE`
in the environment of llama.cpp. Must not lose anything but what the type asked for loses.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.checkpoint import CheckpointError, Tensor, load_config, tensors

TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
# llama.cpp knows a way to split text by name; this one is Qwen's, and `make-model`'s.
PRE_TOKENIZER = "qwen2"


def convert(folder: Path, file: Path, type_name: str) -> None:
    """Write `file`; matrices get the type, vectors stay float32, as llama.cpp wants them.

    Raises:
        CheckpointError: a feature of the folder has no place here; the text names it.
    """
    config = load_config(folder)
    _check(config)
    architecture = ARCHITECTURES[config["model_type"]]
    partial = file.with_name(file.name + ".part")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(folder.name)
    writer.add_file_type(TYPES[type_name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for tensor in tensors(folder):
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"{tensor.name}: GGUF has no name for it in {architecture.name}")
        if not (config["tie_word_embeddings"] and tensor.name == "lm_head.weight"):
            _add_tensor(writer, name, tensor, type_name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)  # a conversion that was broken off leaves no file that looks whole


def _check(config: dict[str, Any]) -> None:
    if config["model_type"] not in ARCHITECTURES:
        raise CheckpointError(
            f"model_type {config['model_type']} is not converted here, only "
            f"{', '.join(ARCHITECTURES)}: compare with one of these"
        )
    for key in ("rope_scaling", "use_sliding_window"):
        if config.get(key):
            raise CheckpointError(f"config.json has {key}; it is not converted: compare without")


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Add a byte-level BPE: GGUF spells its tokens just as tokenizer.json does."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"tokenizer.json: a {model['type']} model; only BPE is converted")
    # Rows of the embedding that no token has get names that no text contains.
    tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    _add_ends(writer, config)


def _add_ends(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    ends, padding = config.get("eos_token_id"), config.get("pad_token_id")
    if ends is not None:
        writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    if padding is not None:
        writer.add_pad_token_id(padding)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name if len(tensor.shape) > 1 else "F32"]
    values: np.ndarray[Any, Any] = gguf.quants.quantize(tensor.load(), kind)
    writer.add_tensor(name, values, raw_dtype=kind)


def main() -> int:
    """Convert; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="model folder with safetensors")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--type", choices=TYPES, default="BF16", help="of matrices (BF16)")
    arguments = parser.parse_args()
    try:
        convert(arguments.folder, arguments.file, arguments.type)
    except (CheckpointError, OSError) as error:
        print(f"to_gguf: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.file}: {arguments.file.stat().st_size / 1e6:,.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
