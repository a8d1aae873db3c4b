"""What the shared decoder must know of a model folder: the fields of each native family.

Defaults are those that transformers gives to a field that config.json leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from executor_svc.model_config import ConfigFields, ModelConfig

ROPE_KINDS = ("default", "dynamic", "linear", "llama3", "yarn")
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
)


@dataclass(frozen=True)
class Family:
    """How one architecture differs from Llama."""

    qkv_bias: bool | None = None  # None: `attention_bias` of the config decides
    qk_norm: bool = False
    is_gemma: bool = False  # unit-offset norms around both sublayers, scaled embedding
    tie_word_embeddings: bool = False
    default_window: int | None = None  # where config.json has no `sliding_window`
    local_theta: float | None = None  # sliding layers have rotary frequencies of their own
    theta: float = 10_000.0
    head_dim: int | None = None  # where config.json has no `head_dim`


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(qkv_bias=None),
        "MistralForCausalLM": Family(qkv_bias=False, default_window=4096),
        "Qwen2ForCausalLM": Family(qkv_bias=True),
        "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128),
        "Gemma2ForCausalLM": Family(
            is_gemma=True, tie_word_embeddings=True, default_window=4096, head_dim=256
        ),
        "Gemma3ForCausalLM": Family(
            is_gemma=True,
            qk_norm=True,
            tie_word_embeddings=True,
            default_window=4096,
            theta=1_000_000.0,
            local_theta=10_000.0,
            head_dim=256,
        ),
    }
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and the scaling `kind` with its parameters."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that the shared decoder computes with; `layer_*` has one entry a layer."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    norm_offset: float
    embedding_scale: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sandwich_norms: bool
    attention_scale: float
    attention_soft_cap: float | None
    logits_soft_cap: float | None
    tie_word_embeddings: bool
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[RopeConfig, ...]


def parse_decoder_config(config: ModelConfig) -> DecoderConfig:
    """Read the fields of a native family (a key of `FAMILIES`).

    Raises:
        ModelLoadError: a field is malformed or asks for what the decoder does not compute.
    """
    family = FAMILIES[config.architecture]
    fields = config.fields
    implied = family.head_dim or config.hidden_size // config.num_heads
    head_dim = fields.integer("head_dim", default=implied)
    sliding = _sliding_layers(config, family)
    window = _window(fields, family)
    _check_supported(config, head_dim, window if any(sliding) else None)
    attention_bias = fields.boolean("attention_bias", False)
    scale_dim = fields.number("query_pre_attn_scalar", default=256) if family.is_gemma else head_dim
    ropes = _ropes(fields, family, head_dim, config.max_position_embeddings)
    return DecoderConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        norm_offset=1.0 if family.is_gemma else 0.0,
        embedding_scale=config.hidden_size**0.5 if family.is_gemma else 1.0,
        activation=_activation(fields, family),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=fields.boolean("mlp_bias", False),
        qk_norm=family.qk_norm,
        sandwich_norms=family.is_gemma,
        attention_scale=float(scale_dim) ** -0.5,
        attention_soft_cap=_attention_soft_cap(config),
        logits_soft_cap=_logits_soft_cap(config),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", family.tie_word_embeddings),
        layer_windows=tuple(window if is_sliding else None for is_sliding in sliding),
        layer_ropes=tuple(ropes[1 if is_sliding else 0] for is_sliding in sliding),
    )


def _check_supported(config: ModelConfig, head_dim: int, window: int | None) -> None:
    fields = config.fields
    if config.num_kv_heads <= 0 or config.num_heads % config.num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide {config.num_heads} heads")
    if head_dim <= 0 or head_dim % 2:
        raise fields.error("head_dim", f"must be positive and even, not {head_dim}")
    if window is not None and window <= 0:
        raise fields.error("sliding_window", f"must be positive, not {window}")
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "is set: that is not a decoder")


def _window(fields: ConfigFields, family: Family) -> int | None:
    # Present and null means "no window"; only an absent field takes the family's default.
    if "sliding_window" not in fields.values:
        return family.default_window
    found = fields.find("sliding_window")
    return None if found is None else fields.integer("sliding_window")


def _sliding_layers(config: ModelConfig, family: Family) -> list[bool]:
    """For each layer, whether it attends within the sliding window only."""
    fields, count = config.fields, config.num_layers
    if config.architecture == "LlamaForCausalLM":
        return [False] * count
    if config.architecture == "MistralForCausalLM":
        return [_window(fields, family) is not None] * count
    if not family.is_gemma and not fields.boolean("use_sliding_window", False):
        return [False] * count
    layer_types = fields.strings("layer_types")
    if layer_types is None:
        return _implied_sliding_layers(config, family)
    known = {"sliding_attention": True, "full_attention": False}
    if len(layer_types) != count or not known.keys() >= set(layer_types):
        raise fields.error("layer_types", f"must name {count} layers, each one of {[*known]}")
    return [known[layer_type] for layer_type in layer_types]


def _implied_sliding_layers(config: ModelConfig, family: Family) -> list[bool]:
    """The pattern of a family whose config.json predates `layer_types`."""
    layers = range(config.num_layers)
    if not family.is_gemma:
        first = config.fields.integer("max_window_layers", default=28)
        return [layer >= first for layer in layers]
    default = 2 if family.local_theta is None else 6
    pattern = config.fields.integer(
        "sliding_window_pattern", "_sliding_window_pattern", default=default
    )
    return [(layer + 1) % pattern != 0 for layer in layers]


def _activation(fields: ConfigFields, family: Family) -> str:
    if family.is_gemma:
        name, default = "hidden_activation", "gelu_pytorch_tanh"
    else:
        name, default = "hidden_act", "silu"
    found = fields.string(name, default=default)
    if found not in ACTIVATIONS:
        raise fields.error(name, f"is {found!r}, supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def _attention_soft_cap(config: ModelConfig) -> float | None:
    if config.architecture != "Gemma2ForCausalLM":
        return None  # Gemma 3 keeps the field and does not use it
    if "attn_logit_softcapping" not in config.fields.values:
        return 50.0
    return config.fields.optional_number("attn_logit_softcapping")


def _logits_soft_cap(config: ModelConfig) -> float | None:
    if not FAMILIES[config.architecture].is_gemma:
        return None
    if "final_logit_softcapping" not in config.fields.values:
        return 30.0 if config.architecture == "Gemma2ForCausalLM" else None
    return config.fields.optional_number("final_logit_softcapping")


def _ropes(
    fields: ConfigFields, family: Family, head_dim: int, max_position: int
) -> tuple[RopeConfig, RopeConfig]:
    """The rotary settings of full and of sliding layers.

    transformers 5 writes `rope_parameters` (one object, or one for each layer type); older
    folders write `rope_theta` and `rope_scaling`, and Gemma 3 `rope_local_base_freq`.
    """
    theta = fields.number("rope_theta", default=family.theta)
    modern = fields.nested("rope_parameters")
    scaling = modern or fields.nested("rope_scaling")
    full, local = scaling, None
    if modern is not None and family.local_theta is not None:
        full, local = modern.nested("full_attention"), modern.nested("sliding_attention")
    full_rope = _rope(full, fields, theta, head_dim, max_position)
    if family.local_theta is None:
        return full_rope, full_rope
    local_theta = fields.number("rope_local_base_freq", default=family.local_theta)
    return full_rope, _rope(local, fields, local_theta, head_dim, max_position)


def _rope(
    rope: ConfigFields | None,
    fields: ConfigFields,
    default_theta: float,
    head_dim: int,
    max_position: int,
) -> RopeConfig:
    partial = fields.number("partial_rotary_factor", default=1.0)
    if rope is None:
        return RopeConfig(default_theta, int(head_dim * partial))
    partial = rope.number("partial_rotary_factor", default=partial)
    theta, rotary_dim = rope.number("rope_theta", default=default_theta), int(head_dim * partial)
    kind = rope.string("rope_type", "type", default="default")
    if kind not in ROPE_KINDS:
        raise rope.error("rope_type", f"is {kind!r}, supported are {', '.join(ROPE_KINDS)}")
    # `dynamic` changes nothing within `max_position_embeddings`, and no request goes beyond.
    if kind in ("default", "dynamic"):
        return RopeConfig(theta, rotary_dim)
    original = fields.integer("original_max_position_embeddings", default=0)
    if original == 0:
        original = rope.integer("original_max_position_embeddings", default=max_position)
    factor = max_position / original if kind == "yarn" else None
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        kind=kind,
        factor=rope.number("factor", default=factor),
        original_max_position=original,
        low_freq_factor=rope.number("low_freq_factor", default=1.0),
        high_freq_factor=rope.number("high_freq_factor", default=4.0),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )
