"""Model folders (without weights) whose tokenizers are of the kinds that published models use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from executor_svc.make_tokenizer import CHATML_TEMPLATE, SPLIT_PATTERN
from stages.config import ModelFacts, ServerConfig

CORPUS = [
    "The water that drives a mill comes to the wheel through a channel, the headrace.",
    "A wheel that stands still grinds no corn; the miller watches the sluice, day and night.",
    "def race(head: int, tail: int) -> list[int]:\n    return [x for x in range(head, tail)]\n",
    "Das Wasser fließt über das Rad. L'eau coule, l'été aussi. 水は車輪を回す。",
] * 4

SENTENCEPIECE_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level_bpe(folder: Path) -> Path:
    """The kind of GPT-2, Llama 3, Qwen: bytes as characters, ChatML, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _write(folder, tokenizer, config | {"chat_template": CHATML_TEMPLATE})


def byte_level_bpe_with_bos(folder: Path) -> Path:
    """As Llama 3: the post-processor puts BOS in front, and so does the template."""
    byte_level_bpe(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    config = {"bos_token": "<bos>", "eos_token": "<|im_end|>"}
    return _write(
        folder, tokenizer, config | {"chat_template": "{{ bos_token }}" + CHATML_TEMPLATE}
    )


def metaspace_bpe(folder: Path) -> Path:
    """As Mistral: sentencepiece's ▁ for space, unknown characters as bytes, BOS."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _write(folder, tokenizer, SENTENCEPIECE_TOKENS)


def legacy_metaspace_bpe(folder: Path) -> Path:
    """As Llama 2: the same, but a normalizer writes the ▁, also behind special tokens."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _write(folder, tokenizer, SENTENCEPIECE_TOKENS)


def _byte_fallback_bpe() -> Tokenizer:
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials + byte_tokens, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    # The trainer made the byte tokens special, which they are not: build anew from its model.
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def unigram(folder: Path) -> Path:
    """As T5 and Gemma's ancestors: sentencepiece unigram with Metaspace and an EOS at the end."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return _write(folder, tokenizer, {"eos_token": "</s>", "unk_token": "<unk>"})


def word_level(folder: Path) -> Path:
    """Whole words; truncation and padding of a training run left in the file."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(pad_id=1, pad_token="[PAD]", length=8)
    return _write(folder, tokenizer, {"unk_token": "[UNK]", "pad_token": "[PAD]"})


KINDS: dict[str, Callable[[Path], Path]] = {
    kind.__name__: kind
    for kind in (
        byte_level_bpe,
        byte_level_bpe_with_bos,
        metaspace_bpe,
        legacy_metaspace_bpe,
        unigram,
        word_level,
    )
}


def edit_tokenizer_config(folder: Path, **changes: Any) -> None:
    """Change fields of tokenizer_config.json; None removes one."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


def server_config(folder: Path, **changes: Any) -> ServerConfig:
    """A configuration for a folder of `byte_level_bpe` or one like it."""
    settings: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": "test",
        "facts": ModelFacts("Qwen3ForCausalLM", 512, 4096, [2, 0]),
        "run_dir": str(folder),
        "max_model_len": 64,
        "start_timeout": 60.0,
    }
    return ServerConfig(**(settings | changes))


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # `AutoTokenizer` wants to know the model's type before it looks at the tokenizer.
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    content = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder
