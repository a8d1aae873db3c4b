"""Fills the shared decoder's weights from a checkpoint: names, shapes, fusing."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from executor_svc.model_config import ModelConfig
from executor_svc.models.decoder import Decoder, DecoderWeights, LayerWeights
from executor_svc.models.decoder_config import DecoderConfig, parse_decoder_config
from executor_svc.models.projections import (
    NO_QUANTIZATION,
    LinearPacker,
    ProjectionLoader,
    Quantization,
)
from executor_svc.ops.interface import LinearWeight, Ops
from executor_svc.progress import Progress
from executor_svc.quantization.checkpoint_config import make_reader
from executor_svc.weights import Checkpoint

logger = logging.getLogger(__name__)


def load_decoder(
    config: ModelConfig, dtype: torch.dtype, ops: Ops, device: torch.device | str = "cpu"
) -> Decoder:
    """Load a native family onto a device.

    Raises:
        ModelLoadError: the folder's config or weights are not what the family needs.
    """
    decoder_config = parse_decoder_config(config)
    reader = None
    if config.quantization is not None:
        reader = make_reader(config.quantization)
        logger.warning("The quantized weights are expanded to %s on this backend", dtype)
    weights = load_decoder_weights(
        config.folder, decoder_config, dtype, ops, device, Quantization(reader)
    )
    return Decoder(decoder_config, weights, ops)


def load_decoder_weights(
    folder: Path,
    config: DecoderConfig,
    dtype: torch.dtype,
    packer: LinearPacker,
    device: torch.device | str = "cpu",
    quantization: Quantization = NO_QUANTIZATION,
) -> DecoderWeights:
    """Read all weights of a native family, projections as `packer` wants them.

    Raises:
        ModelLoadError: the folder's weights are not what `config` needs.
    """
    with Checkpoint(folder, dtype, device) as checkpoint:
        projections = ProjectionLoader(checkpoint, packer, quantization)
        weights = _Loader(config, checkpoint, projections).load()
        checkpoint.check_all_taken(_is_ignored)
    return weights


def _is_ignored(name: str) -> bool:
    """A tied model may carry its head all the same; old Llama files carry frequencies, quantized
    ones scales for a KV cache of 8 bits.
    """
    return name == "lm_head.weight" or name.endswith(
        ("rotary_emb.inv_freq", ".k_scale", ".v_scale")
    )


class _Loader:
    def __init__(
        self, config: DecoderConfig, checkpoint: Checkpoint, projections: ProjectionLoader
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._projections = projections
        self._progress = Progress("Loading weights", config.num_layers + 1)

    def load(self) -> DecoderWeights:
        config = self._config
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        embedding = self._checkpoint.take("model.embed_tokens.weight", vocab_size, hidden_size)
        if config.tie_word_embeddings:
            head = self._projections.load_tied_head(embedding)
        else:
            head = self._projections.load({"lm_head": vocab_size}, hidden_size, is_head=True)
        self._progress.advance()
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            final_norm=self._norm("model.norm", hidden_size),
            head=head,
        )

    def _layer(self, index: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{index}"
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        query_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        sizes = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        # Gemma has norms on both sides of the MLP under names of their own; elsewhere
        # `post_attention_layernorm` is the one in front of the MLP.
        behind = "post_attention_layernorm" if config.sandwich_norms else None
        before_mlp = "pre_feedforward_layernorm" if behind else "post_attention_layernorm"
        layer = LayerWeights(
            attention_norm=self._norm(f"{prefix}.input_layernorm", hidden),
            qkv=self._fused(attention, sizes, hidden, config.qkv_bias),
            query_norm=self._norm(f"{attention}.q_norm", dim) if config.qk_norm else None,
            key_norm=self._norm(f"{attention}.k_norm", dim) if config.qk_norm else None,
            output=self._fused(attention, {"o_proj": hidden}, query_size, config.output_bias),
            behind_attention_norm=self._norm(f"{prefix}.{behind}", hidden) if behind else None,
            mlp_norm=self._norm(f"{prefix}.{before_mlp}", hidden),
            gate_up=self._fused(
                mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias
            ),
            down=self._fused(mlp, {"down_proj": hidden}, inner, config.mlp_bias),
            behind_mlp_norm=(
                self._norm(f"{prefix}.post_feedforward_layernorm", hidden) if behind else None
            ),
        )
        self._progress.advance()
        return layer

    def _fused(
        self, prefix: str, out_sizes: dict[str, int], in_size: int, has_bias: bool
    ) -> LinearWeight:
        """One projection out of several that read the same input."""
        named = {f"{prefix}.{name}": size for name, size in out_sizes.items()}
        return self._projections.load(named, in_size, has_bias=has_bias)

    def _norm(self, name: str, size: int) -> Tensor:
        weight = self._checkpoint.take(f"{name}.weight", size)
        # Gemma stores the distance from one, and 1 + w rounded to bfloat16 would lose it.
        return weight.float() + self._config.norm_offset if self._config.norm_offset else weight
