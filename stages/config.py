"""The one configuration: built once by the command line, frozen, sent to every stage as bytes."""

from __future__ import annotations

import msgspec

# As `ServerConfig.model`: the model that ships in the package, wherever that is installed.
EMBEDDED_MODEL = "embedded"


class ModelFacts(msgspec.Struct, frozen=True):
    """What the model folder says about itself, read from its JSON files.

    `default_sampling`: the sampling defaults of generation_config.json (temperature, top_k, top_p,
    min_p, repetition_penalty), which hold where a request does not say.
    """

    architecture: str
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: list[int]
    default_sampling: dict[str, float] = {}


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of a process group. Field names are the flags with underscores.

    0 in `num_blocks`, `kv_cache_memory` and `gpu_memory_utilization` means: a modest share of what
    is free. Sizes are bytes, times are
    seconds. `record`: stage name → file that takes its recording.
    """

    model: str
    served_model_name: str
    facts: ModelFacts
    run_dir: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: list[str] = []
    gateways: int = 1

    device: str = "cpu"
    enforce_eager: bool = False
    operator_fusion: str = "on"
    memory_policy: str = "static"
    parallel_streams: int = 2
    weight_format: str = "nd"
    emulated_step_ms: float = 10.0
    emulated_token_us: float = 2.0
    dtype: str = "auto"
    quantization: str = "none"
    max_model_len: int = 2048
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 1024
    block_size: int = 16
    num_blocks: int = 0
    kv_cache_memory: int = 0
    gpu_memory_utilization: float = 0.0
    enable_prefix_caching: bool = True
    max_preemptions: int = 3
    sampling_placement: str = "device"
    overlap: bool = True
    cpu_threads: int = 0
    cpu_kernels: str = "auto"
    cpu_binding: str = "auto"
    seed: int = 0

    tokenizer_workers: int = 1
    template_timeout: float = 2.0
    max_queued_requests: int = 1024
    max_body_bytes: int = 32 * 2**20
    max_chunk_bytes: int = 10 * 2**20
    drain_timeout: float = 30.0
    start_timeout: float = 600.0
    max_restarts: int = 5
    max_recoveries: int = 3
    log_level: str = "info"
    record: dict[str, str] = {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ServerConfig)


def encode_config(config: ServerConfig) -> bytes:
    """Give the bytes that every stage receives."""
    return _encoder.encode(config)


def decode_config(data: bytes) -> ServerConfig:
    """Read what `encode_config` wrote."""
    return _decoder.decode(data)
