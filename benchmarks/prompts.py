"""Texts of an exact number of tokens, for servers that take no token ids."""

from __future__ import annotations

import random
import re
from pathlib import Path

from tokenizers import Tokenizer

# Tokens that stay one token each, whatever word follows.
WORD = re.compile(r"Ġ[a-z]+")


class Prompts:
    """Draws texts for the tokenizer of a model folder, a byte-level BPE.

    A word of the vocabulary with its space in front is a piece of its own to the tokenizer, and
    within a piece the merges lead to the one token that it is.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary = self._tokenizer.get_vocab()
        words = sorted(token for token in vocabulary if WORD.fullmatch(token))
        self._words = [" " + word[1:] for word in words]

    def draw(self, num_prompts: int, num_tokens: int, seed: int) -> list[str]:
        """Give other texts for every seed; no two begin alike, so that no cache knows them."""
        rng = random.Random(seed)
        texts = ["".join(rng.choices(self._words, k=num_tokens)) for _ in range(num_prompts)]
        for text in texts:
            length = len(self._tokenizer.encode(text).ids)
            assert length == num_tokens, f"{length} tokens, not {num_tokens}: {text!r}"
        return texts
