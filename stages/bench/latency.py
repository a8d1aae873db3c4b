"""`headrace bench latency`: how long the executor alone takes, and how near that is to the limits.

The measuring is the executor's own code (executor_svc/bench); here are its options and its output.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from stages.config import ServerConfig
from stages.errors import ConfigError
from stages.launch import load
from stages.model_folder import embedded_model, read_model_facts
from stages.settings import build_config

# The settings of `headrace serve` that it takes too, by field name.
SETTINGS = (
    "device",
    "dtype",
    "quantization",
    "cpu_threads",
    "cpu_kernels",
    "block_size",
    "max_num_batched_tokens",
    "seed",
)
DEFAULT_TOKEN_BUDGET = 1024


def bench_latency(arguments: Mapping[str, Any]) -> int:
    """Measure, print the table, write the file.

    `arguments`: `model`, `SETTINGS` that were given, and input_len, output_len, batch_size,
    rounds, warmup, json.

    Raises:
        ConfigError: an option cannot work; the text names it.
    """
    config = latency_config(arguments)
    measure = load("executor_svc.bench.latency:bench_latency")
    sizes = {name: arguments[name] for name in ("input_len", "output_len", "rounds", "warmup")}
    report = measure(config, **sizes)
    print(report.table())
    if arguments["json"] is not None:
        Path(arguments["json"]).write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return 0


def latency_config(arguments: Mapping[str, Any]) -> ServerConfig:
    """The configuration of a server that holds exactly this load."""
    for name, least in (("input_len", 1), ("output_len", 1), ("batch_size", 1), ("rounds", 1)):
        _need(name, arguments[name], least)
    _need("warmup", arguments["warmup"], 0)
    model, batch_size = arguments["model"], arguments["batch_size"]
    length = arguments["input_len"] + arguments["output_len"]
    longest = read_model_facts(Path(model) if model else embedded_model()).max_position_embeddings
    if length > longest:
        raise ConfigError(
            f"--input-len and --output-len make {length} tokens, the model has {longest} "
            "positions: lower them"
        )
    if arguments["device"] == "emulated":
        raise ConfigError("--device emulated computes nothing: its time is --emulated-step-ms")
    settings = {name: arguments.get(name) for name in SETTINGS}
    if settings["max_num_batched_tokens"] is None:
        settings["max_num_batched_tokens"] = max(DEFAULT_TOKEN_BUDGET, batch_size)
    settings |= {"model": model, "max_model_len": length, "max_num_seqs": batch_size}
    return build_config(settings, os.environ)


def _need(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"--{name.replace('_', '-')} is at least {least}, not {value}")
