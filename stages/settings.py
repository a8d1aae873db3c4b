"""From flags, environment and file to the frozen `ServerConfig`.

A flag wins over `HEADRACE_<FLAG>`, that over the `--config` file, that over the default.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stages.config import EMBEDDED_MODEL, ServerConfig
from stages.errors import ConfigError
from stages.model_folder import embedded_model, read_model_facts
from stages.native_library import KERNEL_CHOICES
from stages.request_ids import MAX_GATEWAYS
from stages.run_dir import default_run_dir
from stages.topology import STAGES

ENV_PREFIX = "HEADRACE_"
EMBEDDED_NAME = "headrace-embedded"


@dataclass(frozen=True)
class Flag:
    """One setting: its field in `ServerConfig`, its type, its help."""

    name: str
    kind: type
    help: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def option(self) -> str:
        """As it is typed."""
        return "--" + self.name.replace("_", "-")


MAX_SIDE_STREAMS = 2
DEVICES = ("cpu", "npu", "cuda", "emulated")
# Where the user does not say; elsewhere the configuration's own default.
BLOCK_SIZES = {"npu": 128}
# What takes `auto` for 0.
AUTOMATIC = ("cpu_threads",)
SIZES = {"k": 2**10, "m": 2**20, "g": 2**30}

FLAGS = (
    Flag("host", str, "address to listen on"),
    Flag("port", int, "port to listen on"),
    Flag("served_model_name", str, "name of the model in the API (default: its path)"),
    Flag("api_key", list, "key that requests must bring as a bearer token; may be repeated"),
    Flag("device", str, "what computes; emulated: it takes its time only", DEVICES),
    Flag("enforce_eager", bool, "npu, cuda: record no graphs of decode steps"),
    Flag("operator_fusion", str, "npu, cuda: use the device's fused operators", ("on", "off")),
    Flag(
        "memory_policy",
        str,
        "npu, cuda: static takes KV cache and the largest step's workspace at start, "
        "dynamic leaves workspace to be taken when a step needs it",
        ("static", "dynamic"),
    ),
    Flag(
        "parallel_streams",
        int,
        "npu, cuda: streams that copy beside the compute stream; 0: none, 1: one for both "
        "directions, 2: one up and one down",
    ),
    Flag(
        "weight_format",
        str,
        "npu: nz stores 16-bit projections in the cube units' tiles (FRACTAL_NZ), nd as matrices",
        ("nd", "nz"),
    ),
    Flag("emulated_step_ms", float, "milliseconds that a step of the emulated device takes"),
    Flag("emulated_token_us", float, "microseconds on top for each token of a step"),
    Flag("dtype", str, "weights and KV cache", ("auto", "float32", "bfloat16", "float16")),
    Flag(
        "quantization",
        str,
        "cpu: round float weights to int8 while loading; w8a8: a step's activations too",
        ("none", "int8", "w8a8"),
    ),
    Flag("max_model_len", int, "longest prompt + output in tokens (default: the model's)"),
    Flag("max_num_seqs", int, "rows: requests that run at the same time"),
    Flag("max_num_batched_tokens", int, "token budget of a step"),
    Flag("block_size", int, "tokens of a KV block"),
    Flag("num_blocks", int, "KV blocks; 0: from memory"),
    Flag("kv_cache_memory", int, "bytes of KV cache, such as 2G; 0: from memory"),
    Flag(
        "gpu_memory_utilization",
        float,
        "share of the free memory for the KV cache; 0: at most 4 GiB",
    ),
    Flag("enable_prefix_caching", bool, "share KV blocks of equal prompt beginnings"),
    Flag("max_preemptions", int, "after so many a request gets its whole length reserved"),
    Flag("sampling_placement", str, "where tokens are sampled", ("device", "process")),
    Flag("overlap", bool, "plan one step ahead of the device"),
    Flag("cpu_threads", int, "threads of the CPU backend; auto or 0: all cores"),
    Flag(
        "cpu_kernels",
        str,
        "compiled kernels by instruction set; auto: the best for this processor, torch: none",
        KERNEL_CHOICES,
    ),
    Flag(
        "cpu_binding",
        str,
        "npu, cuda: auto runs the stages on the processors of the card's NUMA node, the executor "
        "on cores of its own, where the machine tells the node",
        ("auto", "off"),
    ),
    Flag("gateways", int, "processes that speak HTTP"),
    Flag("tokenizer_workers", int, "processes that tokenize"),
    Flag("template_timeout", float, "seconds that a chat template may take"),
    Flag("max_queued_requests", int, "open requests beyond max-num-seqs before 503"),
    Flag("max_body_bytes", int, "largest HTTP body"),
    Flag("max_chunk_bytes", int, "largest record inside a ring; larger ones travel over ZMQ"),
    Flag("drain_timeout", float, "seconds that open requests get when the server is stopped"),
    Flag("start_timeout", float, "seconds until every stage must be ready"),
    Flag("max_restarts", int, "deaths of stages within 10 minutes before the group gives up"),
    Flag("max_recoveries", int, "recoveries of one request before it fails"),
    Flag("run_dir", str, "folder of the group's sockets"),
    Flag("log_level", str, "how much to log", ("debug", "info", "warning", "error")),
    Flag("record", list, "STAGE=FILE: record what a stage is told and says; may be repeated"),
)


def _defaults() -> dict[str, Any]:
    fields = msgspec.structs.fields(ServerConfig)
    values = {f.name: f.default for f in fields if f.default is not msgspec.NODEFAULT}
    factories = {f.name: f.default_factory for f in fields}
    made = {n: make() for n, make in factories.items() if make is not msgspec.NODEFAULT}
    return values | made


_DEFAULTS = _defaults()


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `headrace serve`; unset ones are left out of the namespace."""
    parser.add_argument("model", nargs="?", help="Hugging Face folder (default: embedded model)")
    parser.add_argument("--config", metavar="FILE", help="TOML file of the flags below")
    add_flags(parser, *(flag.name for flag in FLAGS))


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Declare these flags, by field name, for `build_config`."""
    for flag in FLAGS:
        if flag.name in names:
            _add_flag(parser, flag)


def build_config(arguments: Mapping[str, Any], environment: Mapping[str, str]) -> ServerConfig:
    """Merge the sources and validate; raises `ConfigError` that names the flag and the remedy.

    `arguments`: the flags that were given, by field name, and `model` and `config`.
    """
    settings = {**_from_file(arguments.get("config")), **_from_environment(environment)}
    settings |= {name: value for name, value in arguments.items() if value is not None}
    settings.pop("config", None)
    settings = {name: _typed(name, value) for name, value in settings.items()}
    model = settings.get("model")
    facts = read_model_facts(Path(model) if model else embedded_model())
    settings["model"] = str(Path(model).resolve()) if model else EMBEDDED_MODEL
    settings.setdefault("served_model_name", settings["model"] if model else EMBEDDED_NAME)
    if settings.get("device") in BLOCK_SIZES:
        settings.setdefault("block_size", BLOCK_SIZES[settings["device"]])
    settings.setdefault("max_model_len", facts.max_position_embeddings)
    settings.setdefault("run_dir", str(default_run_dir(settings.get("port", _DEFAULTS["port"]))))
    config = ServerConfig(facts=facts, **settings)
    _validate(config)
    return config


def non_default(config: ServerConfig) -> dict[str, object]:
    """What differs from the defaults, with secrets redacted; for the start-up log."""
    chosen = {
        name: getattr(config, name)
        for name, default in _DEFAULTS.items()
        if getattr(config, name) != default and name not in ("run_dir", "facts")
    }
    if "api_key" in chosen:
        chosen["api_key"] = ["***"] * len(config.api_key)
    return {"model": config.model, **chosen}


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    default = _DEFAULTS.get(flag.name)
    shown = flag.help if default in (None, "", [], {}) else f"{flag.help} (default: {default})"
    options: dict[str, Any] = {"dest": flag.name, "default": None, "help": shown}
    if flag.kind is bool:
        parser.add_argument(flag.option, action=argparse.BooleanOptionalAction, **options)
    elif flag.kind is list:
        parser.add_argument(flag.option, action="append", metavar="VALUE", **options)
    else:
        parser.add_argument(
            flag.option,
            choices=flag.choices or None,
            metavar=None if flag.choices else "N" if flag.kind in (int, float) else "TEXT",
            **options,
        )


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        table = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    settings = {name.replace("-", "_"): value for name, value in table.items()}
    known = {flag.name for flag in FLAGS} | {"model"}
    for name in settings.keys() - known:
        raise ConfigError(f"--config {path}: there is no setting {name!r}")
    return settings


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    known = {ENV_PREFIX + flag.name.upper(): flag.name for flag in FLAGS}
    for name, value in environment.items():
        if name in known:
            settings[known[name]] = value
        elif name.startswith(ENV_PREFIX):
            raise ConfigError(f"the environment variable {name} is no setting: unset it")
    return settings


def _typed(name: str, value: Any) -> Any:
    """Convert text of a flag or a variable; values of a file come with their type."""
    kinds = {flag.name: flag.kind for flag in FLAGS}
    kind = kinds.get(name, str)
    try:
        if name == "record":
            return value if isinstance(value, dict) else _parse_record(_as_list(value))
        if kind is list:
            return _as_list(value)
        if name in AUTOMATIC and value == "auto":
            return 0
        if isinstance(value, str):
            return _parse(kind, value)
    except ValueError:
        option = "--" + name.replace("_", "-")
        words = "auto or " if name in AUTOMATIC else ""
        raise ConfigError(f"{option} takes {words}{_describe(kind)}, not {value!r}") from None
    return value


def _parse(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind is int and text[-1:].lower() in SIZES:
        return int(float(text[:-1]) * SIZES[text[-1].lower()])
    return kind(text)


def _describe(kind: type) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "text")


def _as_list(value: Any) -> list[str]:
    return value.split(",") if isinstance(value, str) else list(value)


def _parse_record(values: Sequence[str]) -> dict[str, str]:
    record: dict[str, str] = {}
    for value in values:
        stage, _, file = value.partition("=")
        if stage not in STAGES or not file:
            raise ConfigError(f"--record takes STAGE=FILE with a stage of {', '.join(STAGES)}")
        record[stage] = os.path.abspath(file)
    return record


def _validate(config: ServerConfig) -> None:
    try:  # Values of a file have whatever type its author wrote.
        msgspec.convert(msgspec.structs.asdict(config), ServerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a setting of the --config file has the wrong type: {error}") from None
    for flag in FLAGS:
        value = getattr(config, flag.name)
        if flag.choices and value not in flag.choices:
            raise ConfigError(f"{flag.option} is one of {', '.join(flag.choices)}, not {value!r}")
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is at least {least}, not {getattr(config, name)}")
    if not 0 <= config.gpu_memory_utilization <= 1:
        raise ConfigError("--gpu-memory-utilization is a share: 0 to 1")
    if config.gateways > MAX_GATEWAYS:
        raise ConfigError(f"--gateways is at most {MAX_GATEWAYS}, not {config.gateways}")
    _validate_accelerator(config)
    if config.port > 65535:
        raise ConfigError("--port is at most 65535")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {config.max_num_batched_tokens} is below --max-num-seqs "
            f"{config.max_num_seqs}: a step could not give each row a token; raise it"
        )
    longest = config.facts.max_position_embeddings
    if config.max_model_len > longest and config.device != "emulated":
        raise ConfigError(
            f"--max-model-len {config.max_model_len} exceeds the model's {longest} positions: "
            "lower it"
        )


def _validate_accelerator(config: ServerConfig) -> None:
    if config.quantization != "none" and config.device not in ("cpu", "emulated"):
        raise ConfigError(
            f"--quantization {config.quantization} is for --device cpu, not {config.device}: "
            "leave it out"
        )
    if config.weight_format == "nz" and (config.device, config.operator_fusion) != ("npu", "on"):
        raise ConfigError(
            "--weight-format nz is for --device npu with --operator-fusion on: leave it out"
        )
    if config.parallel_streams > MAX_SIDE_STREAMS:
        raise ConfigError(
            f"--parallel-streams is at most {MAX_SIDE_STREAMS}, not {config.parallel_streams}: "
            "there is one direction up and one down"
        )
    needed = BLOCK_SIZES.get(config.device, config.block_size)
    if config.block_size != needed:
        raise ConfigError(
            f"--block-size {config.block_size} is not what --device {config.device} computes with: "
            f"pass {needed}, or leave it out"
        )


_LEAST: dict[str, float] = {
    "parallel_streams": 0,
    "port": 0,
    "emulated_step_ms": 0,
    "emulated_token_us": 0,
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "block_size": 1,
    "num_blocks": 0,
    "kv_cache_memory": 0,
    "max_preemptions": 0,
    "cpu_threads": 0,
    "gateways": 1,
    "tokenizer_workers": 1,
    "template_timeout": 0.1,
    "max_queued_requests": 0,
    "max_body_bytes": 1024,
    "max_chunk_bytes": 4096,
    "drain_timeout": 0,
    "start_timeout": 1,
    "max_restarts": 0,
    "max_recoveries": 0,
}
