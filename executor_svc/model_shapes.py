"""The shapes that `headrace make-model` knows: config.json contents, published ones and tiny ones.

Data only: no torch, no files.
"""

from __future__ import annotations

from typing import Any

ConfigDict = dict[str, Any]

# What all these models share, under the names of the published files.
_COMMON: ConfigDict = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_cache": True,
}

_TINY: ConfigDict = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
}

_QWEN3: ConfigDict = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_QWEN2: ConfigDict = {key: value for key, value in _COMMON.items() if key != "attention_bias"} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_LLAMA: ConfigDict = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500_000.0,
    "vocab_size": 128256,
}

_MISTRAL: ConfigDict = {key: value for key, value in _COMMON.items() if key != "attention_bias"} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

_GEMMA: ConfigDict = _COMMON | {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10_000.0,
}

SHAPES: dict[str, ConfigDict] = {
    "qwen3-0.6b": _QWEN3
    | {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen2.5-0.5b": _QWEN2
    | {
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "llama-1b": _LLAMA
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "tiny-qwen3": _QWEN3 | _TINY | {"head_dim": 32, "max_window_layers": 2},
    "tiny-qwen2": _QWEN2 | _TINY | {"max_window_layers": 2},
    "tiny-llama": _LLAMA | _TINY | {"head_dim": 16},
    "tiny-mistral": _MISTRAL | _TINY | {"head_dim": 16},
    "tiny-gemma": _GEMMA | _TINY | {"num_key_value_heads": 1, "head_dim": 32},
}


def head_dim(config: ConfigDict) -> int:
    """Give the width of one head, which a config may leave to be derived."""
    derived = config["hidden_size"] // config["num_attention_heads"]
    return int(config.get("head_dim", derived))
