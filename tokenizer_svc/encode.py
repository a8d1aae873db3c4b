"""Text to token ids and back, as the model folder's fast tokenizer defines it.

Owns the Hugging Face tokenizer object; must not know requests or limits.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from stages.columns import Int32Array
from stages.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder; raises ConfigError where there is no fast one.

    `PreTrainedTokenizerFast` takes tokenizer.json as it stands. `AutoTokenizer` would import torch
    first, and run code of the folder if it were told to.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"{folder} has no {TOKENIZER_FILE}: load the model's tokenizer with transformers' "
            "AutoTokenizer and save it with save_pretrained(), which writes that file"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"the tokenizer of {folder} cannot be read: {error}") from error


class TextCodec:
    """Encodes and decodes; the same ids and text as the tokenizer's own `encode` and `decode`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        # A tokenizer.json may carry the truncation or padding of a training run: a prompt has none.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def encode(self, text: str, *, add_special_tokens: bool) -> Int32Array:
        """Give the ids int32 [n]; `add_special_tokens` runs its post-processor (BOS)."""
        # The "fast" call leaves out the character offsets, which nobody here reads.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, dtype=np.int32)

    def decode(self, token_ids: Int32Array) -> str:
        """Give the text of ids, special tokens included."""
        text: str = self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
        return text

    def token_strs(self, token_ids: Iterable[int]) -> list[str]:
        """Give each id's entry in the vocabulary, '' for an id that only pads the embedding."""
        id_to_token = self._backend.id_to_token
        return [id_to_token(int(token_id)) or "" for token_id in token_ids]
