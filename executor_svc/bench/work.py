"""What the steps of a native family must read and multiply, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from executor_svc.bench.plans import Chunk
from executor_svc.kv_cache import KvSpec
from executor_svc.models.decoder_config import DecoderConfig


@dataclass(frozen=True)
class Work:
    """Bytes read from memory (weights and KV) and floating point operations."""

    num_bytes: float = 0
    flops: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def __truediv__(self, count: int) -> Work:
        return Work(self.num_bytes / count, self.flops / count)


class WorkModel:
    """Counts the work of one loaded model, whose projections take `weight_bytes` as stored.

    Every step reads all of them once. Left out, as they are small: activations, norms, rows of
    the embedding, and what is written.
    """

    def __init__(self, config: DecoderConfig, kv_spec: KvSpec, weight_bytes: int) -> None:
        self._config = config
        self._weight_bytes = weight_bytes
        self._layer_token_bytes = kv_spec.block_bytes(1) // kv_spec.num_layers

    def steps(self, steps: Iterable[Sequence[Chunk]], prompt_len: int) -> Work:
        """All of these steps; a chunk that reaches `prompt_len` or beyond wants logits."""
        return sum((self._step(chunks, prompt_len) for chunks in steps), Work())

    def _step(self, chunks: Sequence[Chunk], prompt_len: int) -> Work:
        config = self._config
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        num_logits = sum(chunk.end >= prompt_len for chunk in chunks)
        layers = num_tokens * config.num_layers * _layer_elements(config)
        head = num_logits * config.vocab_size * config.hidden_size
        own = Work(self._weight_bytes, 2 * (layers + head))
        return sum((self._attend(chunk) for chunk in chunks), own)

    def _attend(self, chunk: Chunk) -> Work:
        """Attention over all layers; a sliding window hides what lies before it."""
        config, work = self._config, Work()
        for window in config.layer_windows:
            reach = window or chunk.end
            num_seen = sum(min(position + 1, reach) for position in range(chunk.start, chunk.end))
            context = min(chunk.end, chunk.end - chunk.start - 1 + reach)
            flops = 4 * num_seen * config.num_heads * config.head_dim
            work += Work(context * self._layer_token_bytes, flops)
        return work


def _layer_elements(config: DecoderConfig) -> int:
    """Weights of a layer's four projections."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
