"""Trains a small byte-level BPE tokenizer on this machine's own text; needs no network.

Owns tokenizer.json and tokenizer_config.json of a made model; must not know the model's weights.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]
# One entry for each byte, so that every text can be encoded.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# How Qwen's published tokenizers split a text into the pieces that merges stay within.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def corpus(max_bytes: int) -> Iterator[str]:
    """Give the texts of Python's standard library, always in the same order, up to `max_bytes`.

    The manual's topics come first: they are English prose, the rest is source code.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    topics = folder / "pydoc_data" / "topics.py"
    sources = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    for path in (topics, *(source for source in sources if source != topics)):
        # A few test files of the library are in other encodings on purpose.
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > max_bytes:
            yield text[:max_bytes]
            return
        max_bytes -= len(text)
        yield text


def train_tokenizer(vocab_size: int, corpus_bytes: int) -> Tokenizer:
    """Train a tokenizer of at most `vocab_size` entries (fewer where the corpus has no more)."""
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
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(corpus_bytes), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Write what `AutoTokenizer` reads, with a ChatML template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
