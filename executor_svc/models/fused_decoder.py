"""The native decoder families with a whole step as one call into the compiled kernels.

Computes what `Decoder` computes, in float32 whatever type weights and KV cache are stored in.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvCache, KvSpec
from executor_svc.models.decoder import DecoderWeights, LayerWeights
from executor_svc.models.decoder_config import DecoderConfig, RopeConfig
from executor_svc.models.rope import inverse_frequencies
from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native import abi
from executor_svc.ops.native.describe import (
    DTYPE_CODES,
    describe_batch,
    describe_cache,
    describe_linear,
)
from executor_svc.ops.native.library import Library
from executor_svc.ops.native.screening import make_screen

ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1}
NO_MEMORY, BAD_INDEX = 1, 2


class FusedDecoder:
    """A `Model` whose weights are packed; not thread-safe, as one step uses all threads."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, library: Library, num_threads: int
    ) -> None:
        dtype = weights.embedding.dtype
        self.kv_spec = KvSpec(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
        self._vocab_size = config.vocab_size
        self._chooses = weights.head.grid is None  # quantized heads give logits only
        self._step = library.functions.headrace_decoder_step
        self._engine = library.start_engine(self, num_threads)
        pool = library.functions.headrace_engine_pool(self._engine)
        screen = make_screen(library.functions, pool, weights.head)
        self.weight_bytes = weights.num_bytes
        if screen is not None:  # what a greedy step reads in place of the head
            self.weight_bytes += screen.nbytes - weights.head.num_bytes
        self._description = _Description(config, weights, screen)
        self._decoder = byref(self._description.decoder)
        self._batch = abi.Batch()
        self._batch_reference = byref(self._batch)
        self._bound: KvCache | None = None
        self._cache = abi.Cache()

    def forward(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        """Logits [m, vocab] float32 of the tokens that `batch.logits_indices` names.

        Raises:
            IndexError: a token id, slot or logits index is out of range; nothing was written.
            MemoryError: the workspace of a step of this size cannot be had.
        """
        logits = torch.empty(batch.logits_indices.shape[0], self._vocab_size)
        self._batch.logits, self._batch.chosen = logits.data_ptr(), None
        self._run(batch, kv_cache)
        return logits

    def forward_greedy(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        """The argmax of what `forward` gives, int64 [m]; the logits never leave the cache.

        Bit for bit numpy's argmax: the first of equals, and a NaN before all else. Raises what
        `forward` raises.
        """
        if not self._chooses:
            return torch.from_numpy(self.forward(batch, kv_cache).numpy().argmax(axis=-1))
        token_ids = torch.empty(batch.logits_indices.shape[0], dtype=torch.int64)
        self._batch.logits, self._batch.chosen = None, token_ids.data_ptr()
        self._run(batch, kv_cache)
        return token_ids

    def _run(self, batch: ForwardBatch, kv_cache: KvCache) -> None:
        if kv_cache is not self._bound:
            self._bind(kv_cache)
        describe_batch(batch, self._batch)
        status = self._step(self._engine, self._decoder, byref(self._cache), self._batch_reference)
        if status == BAD_INDEX:
            raise IndexError("a token id, slot or logits index of the step is out of range")
        if status == NO_MEMORY:
            raise MemoryError(f"no workspace for a step of {batch.num_tokens} tokens")

    def _bind(self, kv_cache: KvCache) -> None:
        """Note where the layers of this cache lie; a server has one cache for its whole life."""
        self._cache = describe_cache(kv_cache.layers)
        self._bound = kv_cache


class _Description:
    """The structures that tell the kernels a model, and all memory that these point into."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, screen: Tensor | None
    ) -> None:
        self._config = config
        self._kept: list[Tensor] = []
        self._ropes = list(dict.fromkeys(config.layer_ropes))
        self.decoder = self._describe(weights)
        if screen is not None:
            self.decoder.screen = self._pointer(screen)

    def _describe(self, weights: DecoderWeights) -> abi.Decoder:
        config = self._config
        layers = [self._layer(index, layer) for index, layer in enumerate(weights.layers)]
        # transformers rounds Gemma's scale to the embedding's dtype.
        scale = torch.tensor(config.embedding_scale, dtype=weights.embedding.dtype)
        tied = config.tie_word_embeddings
        return abi.Decoder(
            layers=(abi.Layer * len(layers))(*layers),
            ropes=(abi.Rope * len(self._ropes))(*map(self._rope, self._ropes)),
            head=self._linear(weights.head),
            final_norm=self._float32(weights.final_norm),
            embedding=None if tied else self._pointer(weights.embedding.contiguous()),
            embedding_dtype=DTYPE_CODES[weights.embedding.dtype],
            num_layers=config.num_layers,
            num_ropes=len(self._ropes),
            hidden_size=config.hidden_size,
            inner_size=config.intermediate_size,
            activation=ACTIVATION_CODES[config.activation],
            rms_norm_eps=config.rms_norm_eps,
            embedding_scale=float(scale),
            logits_soft_cap=config.logits_soft_cap or 0.0,
        )

    def _layer(self, index: int, layer: LayerWeights) -> abi.Layer:
        config = self._config
        attention = abi.Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.layer_windows[index] or 0,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap or 0.0,
        )
        return abi.Layer(
            qkv=self._linear(layer.qkv),
            output=self._linear(layer.output),
            gate_up=self._linear(layer.gate_up),
            down=self._linear(layer.down),
            attention=attention,
            rope=self._ropes.index(config.layer_ropes[index]),
            **self._norms(layer),
        )

    def _norms(self, layer: LayerWeights) -> dict[str, int | None]:
        norms = {
            "attention_norm": layer.attention_norm,
            "query_norm": layer.query_norm,
            "key_norm": layer.key_norm,
            "behind_attention_norm": layer.behind_attention_norm,
            "mlp_norm": layer.mlp_norm,
            "behind_mlp_norm": layer.behind_mlp_norm,
        }
        return {name: None if norm is None else self._float32(norm) for name, norm in norms.items()}

    def _rope(self, config: RopeConfig) -> abi.Rope:
        frequencies, scale = inverse_frequencies(config)
        return abi.Rope(self._float32(frequencies), config.rotary_dim // 2, scale)

    def _linear(self, weight: LinearWeight) -> abi.Linear:
        self._kept += [part for part in (weight.packed, weight.bias) if part is not None]
        self._kept += weight.grid.tensors if weight.grid is not None else []
        return describe_linear(weight)

    def _float32(self, tensor: Tensor) -> int:
        return self._pointer(tensor.float().contiguous())

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()
