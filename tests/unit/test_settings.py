"""Configuration: which source wins, what is refused and with which remedy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stages.config import ServerConfig, decode_config, encode_config
from stages.errors import ConfigError
from stages.run_dir import default_run_dir
from stages.settings import add_serve_arguments, build_config, non_default


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


def write_model(folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> None:
    facts = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "eos_token_id": 7,
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(facts | config))
    if generation is not None:
        (folder / "generation_config.json").write_bytes(msgspec.json.encode(generation))


def build(*arguments: str, environment: dict[str, str] | None = None) -> ServerConfig:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return build_config(vars(parser.parse_args(list(arguments))), environment or {})


def test_a_flag_wins_over_environment_over_file_over_default(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text("max-num-seqs = 3\nport = 3\nblock_size = 3\n")
    environment = {"HEADRACE_PORT": "4", "HEADRACE_BLOCK_SIZE": "4"}
    arguments = [str(folder), "--config", str(file), "--block-size", "5"]
    config = build(*arguments, environment=environment)
    assert (config.max_num_seqs, config.port, config.block_size) == (3, 4, 5)
    assert config.max_num_batched_tokens == 1024


def test_the_embedded_model_is_the_default() -> None:
    config = build()
    assert config.served_model_name == "headrace-embedded"
    assert config.facts.architecture == "Qwen3ForCausalLM"


def test_status_finds_a_group_by_its_port(folder: Path) -> None:
    assert build(str(folder)).run_dir == str(default_run_dir(8000))
    assert build(str(folder), "--port", "8001").run_dir == str(default_run_dir(8001))


def test_sizes_take_a_suffix(folder: Path) -> None:
    assert build(str(folder), "--kv-cache-memory", "1.5G").kv_cache_memory == 3 * 2**29


def test_a_config_survives_the_wire(folder: Path) -> None:
    config = build(str(folder), "--api-key", "a", "--api-key", "b", "--no-overlap")
    assert config.api_key == ["a", "b"] and not config.overlap
    assert decode_config(encode_config(config)) == config


def test_secrets_are_not_logged(folder: Path) -> None:
    shown = non_default(build(str(folder), "--api-key", "hunter2"))
    assert "hunter2" not in repr(shown) and shown["api_key"] == ["***"]


def test_facts_of_the_folder(tmp_path: Path) -> None:
    write_model(tmp_path, {"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20})
    facts = build(str(tmp_path)).facts
    assert facts.eos_token_ids == [1, 2]
    assert facts.default_sampling == {"temperature": 0.6, "top_k": 20.0}


def test_a_model_made_to_be_greedy_is_greedy(tmp_path: Path) -> None:
    write_model(tmp_path, {"do_sample": False, "temperature": 0.6})
    assert build(str(tmp_path)).facts.default_sampling["temperature"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], ["--port", "whole number"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs", "at least 1"]),
        (["--max-num-seqs", "2000"], ["--max-num-batched-tokens", "--max-num-seqs"]),
        (["--max-model-len", "513"], ["--max-model-len", "512"]),
        (["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "0 to 1"]),
        (["--record", "nobody=x"], ["--record", "scheduler"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--quantization", "int8", "--device", "cuda"], ["--quantization", "--device cpu"]),
        (["--weight-format", "nz"], ["--weight-format", "--device npu"]),
        (
            ["--device", "npu", "--weight-format", "nz", "--operator-fusion", "off"],
            ["--weight-format", "--operator-fusion on"],
        ),
        (["--config", "/nowhere.toml"], ["--config", "/nowhere.toml"]),
    ],
)
def test_a_bad_flag_is_named(folder: Path, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(str(folder), *arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("prot = 1", "prot"),
        ("port = ", "--config"),
        ("dtype = 'int3'", "--dtype"),
        ("port = 'x'", "--port"),
    ],
)
def test_a_bad_file_is_named(folder: Path, tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=word):
        build(str(folder), "--config", str(file))


def test_an_unknown_variable_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="HEADRACE_PROT"):
        build(str(folder), environment={"HEADRACE_PROT": "1"})


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({}, "config.json is missing"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": "{}"}, "vocab_size"),
        ({"config.json": '{"vocab_size": 5}'}, "max_position_embeddings"),
    ],
)
def test_a_folder_that_is_no_model_is_named(
    tmp_path: Path, files: dict[str, str], word: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=word):
        build(str(tmp_path))


def test_a_missing_folder_says_that_nothing_is_downloaded() -> None:
    with pytest.raises(ConfigError, match="never downloaded"):
        build("Qwen/Qwen3-0.6B")
