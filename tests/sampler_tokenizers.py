"""Small tokenizers of the three kinds that a model folder can hold, made in memory."""

from __future__ import annotations

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

CORPUS = [
    "The mill wheel turns, and the water of the headrace never stands still.",
    "Die Mühle mahlt, größer als übliche Räder; čeština, naïve café, Ελληνικά.",
    "数据流 水车 你好 世界 😀 👍🏽 👩‍👩‍👧 🇨🇳",
]
END = "<|end|>"
TOOL = "<tool call>"


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer has."""
    token_id: int | None = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


@cache
def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE as in GPT-2, Llama 3 and Qwen; characters span several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(TOOL, special=False)])
    return tokenizer


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece BPE as in Llama 2: a leading space is part of a piece, rare bytes are ids."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in ["\u2581", *sorted(set(CORPUS[0] + "Hi world") - {" "})]:
        vocab[char] = len(vocab)
    merges = [("\u2581", "H"), ("\u2581", "w"), ("\u2581H", "i")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@cache
def word_piece_tokenizer() -> Tokenizer:
    """WordPiece as in BERT: neither byte tokens nor spaces in the pieces."""
    pieces = ["[UNK]", "mill", "##s", "wheel", "water", "##y", ".", "turn"]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer
