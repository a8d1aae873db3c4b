"""Made models: published shapes, folders that transformers loads, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from executor_svc.make_model import make_model, make_weight, weight_shapes
from executor_svc.make_tokenizer import corpus, train_tokenizer
from executor_svc.model_shapes import SHAPES
from stages.errors import ConfigError

TINY = [shape for shape in SHAPES if shape.startswith("tiny-")]

# Parameters of the published models, embeddings counted once.
PUBLISHED = {"qwen3-0.6b": 596_049_920, "qwen2.5-0.5b": 494_032_768, "llama-1b": 1_235_814_400}


def make(shape: str, folder: Path, **changes: Any) -> Path:
    """Make a small folder in a fraction of a second."""
    settings: dict[str, Any] = {"vocab_size": 400, "tokenizer_vocab_size": 300}
    make_model(shape, folder, **(settings | changes))
    return folder


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {shape: make(shape, tmp_path_factory.mktemp(shape)) for shape in TINY}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_published_shapes_have_the_published_size(shape: str) -> None:
    sizes = (torch.Size(size).numel() for _, size in weight_shapes(SHAPES[shape]))
    assert sum(sizes) == PUBLISHED[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_one_of_transformers_and_none_is_missing(shape: str) -> None:
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert dict(weight_shapes(SHAPES[shape])) == expected


@pytest.mark.parametrize("shape", TINY)
def test_transformers_loads_the_folder(tiny_folders: dict[str, Path], shape: str) -> None:
    folder = tiny_folders[shape]
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits
    assert logits.shape == (1, len(token_ids), 400)
    assert logits.isfinite().all() and logits.std() > 0


def test_the_shapes_that_peers_were_measured_on() -> None:
    tiny, small = SHAPES["tiny-qwen3"], SHAPES["qwen3-0.6b"]
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    assert [tiny[name] for name in names] == [2, 64, 128, 4, 2, 32]
    assert [small[name] for name in names] == [28, 1024, 3072, 16, 8, 128]
    assert tiny["vocab_size"] == 32768
    for shape in (tiny, small):
        assert shape["tie_word_embeddings"] and shape["rope_theta"] == 1_000_000


def test_rope_scaling_reaches_transformers(tiny_folders: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_folders["tiny-llama"])
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert config.rope_parameters["factor"] == 32.0


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    first = make("tiny-qwen2", tmp_path / "a", seed=3)
    second = make("tiny-qwen2", tmp_path / "b", seed=3)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    other = make("tiny-qwen2", tmp_path / "c", seed=4)
    weights = "model.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()


def test_weights_are_normal_and_norms_are_constant() -> None:
    weight = make_weight("x.weight", (400, 300), 0, torch.float32, 1.0)
    assert abs(weight.mean()) < 1e-3
    assert abs(weight.std() - 0.02) < 1e-3
    other = make_weight("y.weight", (400, 300), 0, torch.float32, 1.0)
    assert not torch.equal(weight, other)
    norm = make_weight("model.norm.weight", (8,), 0, torch.float16, 1.0)
    assert torch.equal(norm, torch.ones(8, dtype=torch.float16))


def test_a_large_checkpoint_is_sharded(tmp_path: Path) -> None:
    whole = make("tiny-mistral", tmp_path / "whole", dtype="float32")
    sharded = make("tiny-mistral", tmp_path / "sharded", dtype="float32", max_shard_bytes=70_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 2
    merged: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        merged |= tensors
    expected = load_file(whole / "model.safetensors")
    assert merged.keys() == expected.keys() == index["weight_map"].keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(merged[name], tensor)
    AutoModelForCausalLM.from_pretrained(sharded)


def test_the_embedding_pads_the_tokenizer_up(tiny_folders: dict[str, Path]) -> None:
    folder = tiny_folders["tiny-qwen3"]
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    assert AutoConfig.from_pretrained(folder).vocab_size == 400


def test_every_byte_can_be_encoded() -> None:
    tokenizer = train_tokenizer(260, 1000)
    text = "".join(map(chr, range(1, 300))) + "水🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_corpus_is_cut_and_repeatable() -> None:
    texts = list(corpus(2_000_000))
    assert sum(map(len, texts)) == 2_000_000
    assert texts == list(corpus(2_000_000))


def test_wrong_settings_say_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are qwen3-0"):
        make("gpt-9", tmp_path)
    with pytest.raises(ConfigError, match="--vocab-size must be at least 259"):
        make("tiny-qwen3", tmp_path, vocab_size=100)
    with pytest.raises(ConfigError, match="--dtype int4 is not known; there are bfloat16"):
        make("tiny-qwen3", tmp_path, dtype="int4")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    make("tiny-qwen3", tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        make("tiny-llama", tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
