"""Runs any decoder that transformers knows with our paged attention in place of its own.

The ragged batch goes through as one sequence of T tokens with explicit positions; only attention
mixes tokens, and that is ours. A model for which this does not hold is refused at load, by name:
its class says so, or a short probe gives other logits than transformers' own attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvCache, KvSpec, allocate_kv_cache
from executor_svc.model_config import ModelLoadError
from executor_svc.models.adapter_attention import (
    ATTENTION_NAME,
    LayerRecorder,
    LayerShape,
    PagedStep,
    attention_forward,
)
from executor_svc.ops.interface import Ops

# What the probe's logits may differ by, relative to their norm: in float32, in half precision.
MAX_PROBE_ERROR = 1e-3
MAX_PROBE_ERROR_HALF = 0.1
PROBE_BLOCK_SIZE = 4


class TransformersModel:
    """A transformers decoder over the paged cache."""

    def __init__(self, network: Any, kv_spec: KvSpec, ops: Ops) -> None:
        self.kv_spec = kv_spec
        self._network = network
        self._ops = ops

    def forward(self, batch: ForwardBatch, kv_cache: KvCache) -> Tensor:
        """Logits [m, vocab] float32 of the tokens that `batch.logits_indices` names."""
        plan = self._ops.plan_attention(batch, kv_cache)
        step = PagedStep(self._ops, plan, kv_cache.layers)
        return _run(self._network, batch.token_ids, batch.positions, batch.logits_indices, step)

    def on_device(self, device: torch.device, ops: Ops) -> TransformersModel:
        """The same model with its weights moved there, over the operators of that device."""
        return TransformersModel(self._network.to(device), self.kv_spec, ops)


def load_with_transformers(folder: Path, dtype: torch.dtype, ops: Ops) -> TransformersModel:
    """Load any causal language model of transformers; never runs code from the folder.

    Raises:
        ModelLoadError: transformers does not know it, or it cannot use paged attention.
    """
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    transformers_logging.disable_progress_bar()  # it would fill the service's log
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _check_class(skeleton)
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation=ATTENTION_NAME, **options
        )
    except (ValueError, KeyError, OSError) as error:
        raise ModelLoadError(
            f"{folder}: transformers cannot load it as a causal language model from safetensors "
            f"without code of its own: {error}"
        ) from error
    network.eval().requires_grad_(False)
    with torch.inference_mode():
        model = TransformersModel(network, _kv_spec(network, dtype), ops)
        _compare_with_eager(model, network)
    return model


def _check_class(network: Any) -> None:
    name, config = type(network).__name__, network.config
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{name} has an encoder; only decoders are served")
    if network._is_stateful:
        raise ModelLoadError(
            f"{name} keeps recurrent state beside keys and values, which is not supported"
        )
    if not network.is_backend_compatible():
        raise ModelLoadError(
            f"{name} does not route its attention through transformers' AttentionInterface, so "
            "paged attention cannot take its place; it is not supported"
        )
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelLoadError(
            f"{name} has layers of type {', '.join(sorted(unknown))}; supported are full and "
            "sliding attention"
        )


def _kv_spec(network: Any, dtype: torch.dtype) -> KvSpec:
    """What the layers really store, seen in a forward pass of one token."""
    recorder = LayerRecorder()
    zero = torch.zeros(1, dtype=torch.int64)
    _run(network, zero, zero, zero, recorder)
    name, config = type(network).__name__, network.config.get_text_config()
    shapes = recorder.shapes
    if sorted(shapes) != list(range(config.num_hidden_layers)):
        raise ModelLoadError(
            f"{name} has {config.num_hidden_layers} layers, of which {len(shapes)} attend through "
            "AttentionInterface; it is not supported"
        )
    kinds = {(shape.num_kv_heads, shape.key_dim, shape.value_dim) for shape in shapes.values()}
    num_kv_heads, key_dim, value_dim = kinds.pop()
    if kinds or key_dim != value_dim:
        raise ModelLoadError(
            f"{name} stores keys and values of different sizes (per layer, or keys of {key_dim} "
            f"and values of {value_dim}); the paged cache has one size, it is not supported"
        )
    _check_windows(name, config, shapes)
    return KvSpec(config.num_hidden_layers, num_kv_heads, key_dim, dtype)


def _check_windows(name: str, config: Any, shapes: dict[int, LayerShape]) -> None:
    """A window that is only in a mask would be lost, and the probe is too short to notice."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        is_lost = all(shape.sliding_window != window for shape in shapes.values())
    else:
        is_lost = any(
            shapes[layer].sliding_window != window
            for layer, layer_type in enumerate(layer_types)
            if layer_type == "sliding_attention"
        )
    if is_lost:
        raise ModelLoadError(
            f"{name} does not hand its sliding window of {window} to its attention function; "
            "it is not supported"
        )


def _compare_with_eager(model: TransformersModel, network: Any) -> None:
    """Two short sequences, in two chunks each, side by side: paged against eager logits."""
    vocab_size = network.config.get_text_config().vocab_size
    first = [(7 * i + 3) % vocab_size for i in range(6)]
    second = [(5 * i + 1) % vocab_size for i in range(4)]
    cache = allocate_kv_cache(model.kv_spec, 5, PROBE_BLOCK_SIZE)
    tables = [3, 1], [2]
    spans = [Span(first[:4], 0, tables[0]), Span(second[:3], 0, tables[1])]
    model.forward(ForwardBatch.from_spans(spans, PROBE_BLOCK_SIZE), cache)
    spans = [Span(second[3:], 3, tables[1]), Span(first[4:], 4, tables[0])]
    paged = model.forward(ForwardBatch.from_spans(spans, PROBE_BLOCK_SIZE), cache)

    network.set_attn_implementation("eager")
    eager = torch.cat([_eager_logits(network, tokens) for tokens in (second, first)])
    network.set_attn_implementation(ATTENTION_NAME)
    error = float((paged - eager).norm() / eager.norm())
    is_full = model.kv_spec.dtype == torch.float32
    limit = MAX_PROBE_ERROR if is_full else MAX_PROBE_ERROR_HALF
    if not error <= limit:  # NaN is no better than a difference
        raise ModelLoadError(
            f"{type(network).__name__} computes something else with paged attention (logits differ "
            f"by {error:.2g} of their norm, {limit:.2g} is allowed); it is not supported"
        )


def _eager_logits(network: Any, tokens: list[int]) -> Tensor:
    token_ids = torch.tensor(tokens)
    last = torch.tensor([len(tokens) - 1])
    return _run(network, token_ids, torch.arange(len(tokens)), last, None)


def _run(
    network: Any,
    token_ids: Tensor,
    positions: Tensor,
    logits_indices: Tensor,
    step: PagedStep | LayerRecorder | None,
) -> Tensor:
    options = {} if step is None else {ATTENTION_NAME: step}
    output = network(
        input_ids=token_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        logits_to_keep=logits_indices,
        use_cache=False,
        **options,
    )
    logits: Tensor = output.logits[0].float()
    return logits
