"""config.json in all its dialects, and the rotary frequencies that follow from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_svc.model_config import ModelConfig, ModelLoadError, load_model_config
from executor_svc.models.decoder_config import DecoderConfig, RopeConfig, parse_decoder_config
from executor_svc.models.rope import Rope, inverse_frequencies

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def _load(folder: Path, changes: dict[str, Any], generation: object = None) -> ModelConfig:
    values = {**BASE, **changes}
    values = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_model_config(folder)


def _decoder(folder: Path, changes: dict[str, Any]) -> DecoderConfig:
    return parse_decoder_config(_load(folder, changes))


def test_the_facts_of_a_plain_llama(tmp_path: Path) -> None:
    config = _load(tmp_path, {"eos_token_id": 2})
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (4, 8, 2)
    assert (config.head_dim, config.vocab_size) == (8, 100)
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (2,))
    assert config.max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        ({"eos_token_id": [7, 8]}, 2, (7, 8)),
        ({"eos_token_id": 0}, 2, (0,)),
        ({}, [2, 3], (2, 3)),
        (None, 2, (2,)),
        (None, None, ()),
    ],
)
def test_eos_ids_come_from_generation_config_first(
    tmp_path: Path, generation: object, own: object, expected: tuple[int, ...]
) -> None:
    assert _load(tmp_path, {"eos_token_id": own}, generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"torch_dtype": ...}, "float32"),
    ],
)
def test_both_names_of_the_dtype(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert _load(tmp_path, changes).dtype == expected


def test_gpt2_names_of_the_sizes(tmp_path: Path) -> None:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    changes: dict[str, Any] = {name: ... for name in (*names, "num_key_value_heads")}
    changes |= {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 512}
    config = _load(tmp_path, changes)
    assert (config.hidden_size, config.num_layers, config.num_kv_heads) == (48, 3, 6)
    assert config.max_position_embeddings == 512


def test_a_text_config_holds_the_decoders_fields(tmp_path: Path) -> None:
    config = _load(tmp_path, {"text_config": {**BASE, "vocab_size": 55}, "vocab_size": ...})
    assert (config.vocab_size, config.architecture) == (55, "LlamaForCausalLM")


def test_longrope_is_served_within_its_original_length(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    changes = {"rope_scaling": scaling, "original_max_position_embeddings": 512}
    assert _load(tmp_path, changes).max_position_embeddings == 512
    inside = {**scaling, "original_max_position_embeddings": 256}
    assert _load(tmp_path, {"rope_parameters": inside}).max_position_embeddings == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "'hidden_size' must be an integer"),
        ({"vocab_size": "100"}, "'vocab_size' must be an integer, not '100'"),
        ({"num_attention_heads": True}, "'num_attention_heads' must be an integer"),
        ({"num_attention_heads": 0}, "must be positive"),
        ({"architectures": []}, "'architectures' is missing"),
        ({"torch_dtype": "int8"}, "'dtype' is 'int8', supported are float32"),
        ({"eos_token_id": "x"}, "'eos_token_id' must be a token id"),
        ({"num_key_value_heads": 3}, "'num_key_value_heads' must divide 8 heads"),
        ({"head_dim": 7}, "'head_dim' must be positive and even"),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu', supported are silu"),
        ({"rope_scaling": {"type": "wild"}}, "'rope_type' is 'wild', supported are default"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' must be a number"),
        ({"rope_scaling": [1]}, "'rope_scaling' must be an object"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        _decoder(tmp_path, changes)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json does not exist"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="is not valid JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="must hold a JSON object"):
        load_model_config(tmp_path)


def test_old_and_new_rope_fields_mean_the_same(tmp_path: Path) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 1024
    old = _decoder(tmp_path, {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}})
    parameters = {"rope_theta": 5e5, "rope_type": "llama3", **llama3}
    new = _decoder(tmp_path, {"rope_parameters": parameters})
    assert old.layer_ropes == new.layer_ropes
    assert old.layer_ropes[0].kind == "llama3" and old.layer_ropes[0].theta == 5e5


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "head_dim": 32, "sliding_window": 512}


def test_old_and_new_rope_fields_of_gemma3(tmp_path: Path) -> None:
    old = {
        **GEMMA3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    new = {
        **GEMMA3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    first, second = _decoder(tmp_path, old), _decoder(tmp_path, new)
    assert first.layer_ropes == second.layer_ropes
    assert first.layer_windows == second.layer_windows == (512, None, 512, None)
    assert first.layer_ropes[1].factor == 8.0 and first.layer_ropes[0].theta == 1e4


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 9}, (None,) * 4),  # Llama has no such field
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 9}, (9,) * 4),
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 4),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}, (None,) * 4),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (None, None, None, 9),
        ),
        ({"architectures": ["Gemma2ForCausalLM"]}, (4096, None) * 2),
    ],
)
def test_which_layers_have_a_window(
    tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert _decoder(tmp_path, changes).layer_windows == windows


def test_a_gemma_without_optional_fields_takes_the_family_defaults(tmp_path: Path) -> None:
    config = _decoder(tmp_path, {"architectures": ["Gemma2ForCausalLM"]})
    assert config.tie_word_embeddings and config.sandwich_norms and config.head_dim == 256
    assert (config.attention_soft_cap, config.logits_soft_cap) == (50.0, 30.0)
    assert config.attention_scale == 256**-0.5 and config.embedding_scale == 8.0
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = _decoder(tmp_path, {"architectures": ["Gemma2ForCausalLM"], **uncapped})
    assert config.attention_soft_cap is None and config.logits_soft_cap is None


def test_linear_scaling_stretches_positions() -> None:
    plain, _ = inverse_frequencies(RopeConfig(10_000.0, 16))
    scaled, _ = inverse_frequencies(RopeConfig(10_000.0, 16, "linear", factor=4.0))
    torch.testing.assert_close(scaled * 4, plain)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(10_000.0, 64),
        RopeConfig(10_000.0, 64, "linear", factor=3.0),
        RopeConfig(500_000.0, 128, "llama3", 8.0, 8192, 1.0, 4.0),
        RopeConfig(10_000.0, 64, "yarn", 4.0, 4096),
        RopeConfig(10_000.0, 64, "yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=0.7),
        RopeConfig(10_000.0, 64, "yarn", 4.0, 4096, attention_factor=1.5, truncate=False),
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn_mscale", "yarn_factor"],
)
def test_frequencies_equal_those_of_transformers(rope: RopeConfig) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "yarn":
        parameters |= {"truncate": rope.truncate}
        optional = {name: getattr(rope, name) for name in ("mscale", "mscale_all_dim")}
        optional["attention_factor"] = rope.attention_factor
        parameters |= {name: value for name, value in optional.items() if value is not None}
    config = LlamaConfig(
        hidden_size=rope.rotary_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=rope.original_max_position * int(rope.factor) or 4096,
        rope_parameters=parameters,
    )
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    expected, scale = {**ROPE_INIT_FUNCTIONS, "default": default}[rope.kind](config)
    actual, own_scale = inverse_frequencies(rope)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert own_scale == pytest.approx(scale)
    cos, sin = Rope(rope).cos_sin(torch.tensor([0, 5]))
    torch.testing.assert_close(cos[1], (5 * expected).cos() * scale)
    torch.testing.assert_close(sin[0], torch.zeros(rope.rotary_dim // 2))
