"""Builds tiny random Hugging Face folders, one for each model family, tokenizer included.

The weights are drawn wide, biases and norms too, so that a wrong operator changes the tokens.
Where a tied head would repeat the last token for ever (Gemma, GPT-2) it is untied.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

MODEL_VOCAB_SIZE = 384
TOKENIZER_VOCAB_SIZE = 320
PAD_ID, START_ID, END_ID = 0, 1, 2
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
CORPUS = (
    "A headrace is the channel that brings water to a mill wheel, so that the wheel never stands "
    "still. The device never waits for the host. No request is lost. user assistant system\n"
    "Here the wheel is the device and the water is the next step's work: 0123456789.\n"
)
SHAPE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": MODEL_VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "pad_token_id": PAD_ID,
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
    }
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
# What each family sets beside SHAPE, under transformers' name of its model type.
NATIVE: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
        "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
        "mistral": ("mistral", {"sliding_window": 40}),
        "qwen2": (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        ),
        "qwen3": (
            "qwen3",
            {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN_ROPE},
        ),
        "gemma2": (
            "gemma2",
            {
                "head_dim": 16,
                "tie_word_embeddings": False,
                "query_pre_attn_scalar": 24,
                "sliding_window": 32,
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 10.0,
            },
        ),
        "gemma3": (
            "gemma3_text",
            {
                "head_dim": 16,
                "num_hidden_layers": 3,
                "tie_word_embeddings": False,
                "query_pre_attn_scalar": 24,
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": GEMMA3_ROPE,
            },
        ),
    }
)
ADAPTED: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "olmo2": ("olmo2", {}),
        "phi3": ("phi3", {"sliding_window": 33}),
        "gpt_neox": ("gpt_neox", {}),
        "starcoder2": ("starcoder2", {"sliding_window": None}),
        "qwen3_moe": (
            "qwen3_moe",
            {
                "head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
            },
        ),
        "gpt2": ("gpt2", {"tie_word_embeddings": False}),
    }
)
NATIVE_FAMILIES = tuple(NATIVE)
ADAPTER_FAMILIES = tuple(ADAPTED)
FAMILIES = (*NATIVE_FAMILIES, *ADAPTER_FAMILIES)


def build_tiny_model(family: str, out_dir: Path) -> Path:
    """Write `out_dir/family` with config, generation config, float32 weights and tokenizer.

    The weights depend on the family alone. Returns the folder.
    """
    model_type, own = {**NATIVE, **ADAPTED}[family]
    config = AutoConfig.for_model(model_type, **{**SHAPE, **own})
    folder = out_dir / family
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _disturb_vectors(model)
    model.generation_config = GenerationConfig(
        bos_token_id=START_ID, eos_token_id=[END_ID], pad_token_id=PAD_ID
    )
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template; every id is below TOKENIZER_VOCAB_SIZE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    pad, start, end = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        additional_special_tokens=[start],
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _disturb_vectors(model: torch.nn.Module) -> None:
    """Biases start at zero and norms at one: a model that skipped them would look right."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
