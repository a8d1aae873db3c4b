"""Turns token ids into text, one at a time; owns the tokenizer file and no request.

Byte-level BPE is decoded here, through its bytes: exact and O(1) a token whatever a model says.
Every other tokenizer goes through the library's own `DecodeStream`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from stages.columns import Int32Array
from stages.errors import ConfigError

_PROMPT_TAIL = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_METASPACE = "\u2581"
_REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """The text of a growing sequence of ids.

    Invariant: what has been returned is a function of the ids pushed so far and never ends in
    the middle of a character; bytes that can become no character come out as U+FFFD.
    """

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; '' while a character is open."""


class Detokenizer:
    """The model's tokenizer, as far as going from ids to text is concerned."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = {token_id for token_id, token in added.items() if token.special}
        decoder_kinds = _decoder_kinds(tokenizer)
        self._is_byte_level = decoder_kinds == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in decoder_kinds
        self._byte_of_char = _byte_of_char() if self._is_byte_level else {}
        self._known: dict[int, tuple[str, bytes]] = {}
        # By whether special tokens are skipped: the text of tokens that begin and end between
        # characters, which is theirs wherever no character is open.
        self._whole_texts: dict[bool, dict[int, str]] = {True: {}, False: {}}

    @classmethod
    def from_model_folder(cls, folder: Path) -> Detokenizer:
        """Read tokenizer.json; raises `ConfigError` where there is none."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing: save the model's fast tokenizer there (transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        return cls(Tokenizer.from_file(str(path)))

    def decode(self, token_ids: Sequence[int] | Int32Array, skip_special_tokens: bool) -> str:
        """The text of all ids at once."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, prompt_token_ids: Int32Array, skip_special_tokens: bool) -> TextStream:
        """Start the text of an output behind a prompt.

        The end of the prompt goes in first: whether a token begins with a space can depend on what
        stands before it, and a prompt may end in the middle of a character.
        """
        stream: TextStream
        if self._is_byte_level:
            skipped = self._special if skip_special_tokens else set()
            stream = _ByteStream(self, skipped, self._whole_texts[skip_special_tokens])
        else:
            stream = _LibraryStream(self._tokenizer, skip_special_tokens)
        for token_id in self._prompt_tail(prompt_token_ids, skip_special_tokens):
            stream.push(token_id)
        return stream

    def token_text_and_bytes(self, token_id: int) -> tuple[str, bytes]:
        """One token by itself, as log-probabilities show it: special tokens by name, true bytes.

        A token that is part of a character has U+FFFD in its text. An id that the tokenizer does
        not know is empty.
        """
        known = self._known.get(token_id)
        if known is None:
            token_bytes = self._token_bytes(token_id)
            known = self._known[token_id] = (token_bytes.decode("utf-8", "replace"), token_bytes)
        return known

    def _prompt_tail(self, token_ids: Int32Array, skip_special_tokens: bool) -> list[int]:
        """The last few ids; more where these have no text or begin inside a character."""
        length = _PROMPT_TAIL
        while length < len(token_ids):
            text = self.decode(token_ids[-length:], skip_special_tokens)
            if text and not text.startswith(_REPLACEMENT):
                break
            length *= 2
        tail: list[int] = token_ids[-length:].tolist()
        return tail

    def _token_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            return self._byte_level_bytes(piece)
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        if _METASPACE in piece:
            return piece.replace(_METASPACE, " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _byte_level_bytes(self, piece: str) -> bytes:
        """As the library's ByteLevel decoder: a piece with any other character is plain text."""
        try:
            return bytes([self._byte_of_char[char] for char in piece])
        except KeyError:
            return piece.encode()


class _ByteStream:
    """Byte-level BPE: the bytes of the tokens are the bytes of the text."""

    def __init__(
        self, detokenizer: Detokenizer, skipped: set[int], whole_texts: dict[int, str]
    ) -> None:
        """`whole_texts`: filled on the way, and shared by all streams that skip the same."""
        self._bytes_of = detokenizer.token_text_and_bytes
        self._skipped = skipped
        self._whole_texts = whole_texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside_character = False

    def push(self, token_id: int) -> str:
        if not self._is_inside_character:
            text = self._whole_texts.get(token_id)
            if text is not None:
                return text
        return self._decode(token_id)

    def _decode(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        was_inside = self._is_inside_character
        text = self._decoder.decode(self._bytes_of(token_id)[1])
        self._is_inside_character = bool(self._decoder.getstate()[0])
        if not (was_inside or self._is_inside_character):
            self._whole_texts[token_id] = text
        return text


class _LibraryStream:
    """The library's incremental decoder, set right where it gives up.

    `DecodeStream` fails, and from then on with every token, when byte tokens behind text that is
    out already turn out to be no character. A new stream then takes over from the tokens whose
    text is not out yet. A true U+FFFD at the very end stays held: it looks like an open character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._step(token_id)
        if text:
            self._pending.clear()
        return text

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:  # the library raises nothing more precise
            if "Invalid prefix" not in str(error):
                raise
        self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
        texts = [self._stream.step(self._tokenizer, pending) for pending in self._pending]
        return "".join(text for text in texts if text)


def _decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    """The kinds of the steps of the tokenizer's decoder, in order."""
    if tokenizer.decoder is None:
        return []
    description: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps = description["decoders"] if description["type"] == "Sequence" else [description]
    return [step["type"] for step in steps]


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others,
    in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
