"""Ids to text: whole characters only, right spaces, special tokens, bytes of single tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from sampler_svc.detokenizer import Detokenizer
from stages.columns import Int32Array
from stages.errors import ConfigError
from tests.sampler_tokenizers import (
    END,
    TOOL,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    id_of,
    word_piece_tokenizer,
)

ALL_KINDS = [byte_level_tokenizer, byte_fallback_tokenizer, word_piece_tokenizer]
NO_PROMPT = np.array([], dtype=np.int32)


def ids_of(tokenizer: Tokenizer, text: str) -> Int32Array:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def byte_ids(*values: int) -> list[int]:
    """Ids of bytes in the byte-fallback tokenizer."""
    return [id_of(byte_fallback_tokenizer(), f"<0x{value:02X}>") for value in values]


def deltas(
    detokenizer: Detokenizer, ids: list[int], prompt: Int32Array = NO_PROMPT, skip: bool = True
) -> list[str]:
    stream = detokenizer.stream(prompt, skip)
    return [stream.push(token_id) for token_id in ids]


@pytest.mark.parametrize("make", ALL_KINDS[:2])
def test_a_character_of_several_tokens_comes_out_whole(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = ids_of(tokenizer, "a😀b").tolist()
    assert len(ids) > 4
    texts = [text for text in deltas(Detokenizer(tokenizer), ids) if text.strip()]
    assert texts == ["a", "😀", "b"]


def test_an_open_character_at_the_end_is_not_shown() -> None:
    ids = byte_ids(0xE4, 0xBD)
    assert deltas(Detokenizer(byte_fallback_tokenizer()), ids) == ["", ""]


def test_a_word_behind_a_prompt_keeps_its_space() -> None:
    tokenizer = byte_fallback_tokenizer()
    piece = id_of(tokenizer, "\u2581Hi")
    assert deltas(Detokenizer(tokenizer), [piece], ids_of(tokenizer, "world")) == [" Hi"]
    assert deltas(Detokenizer(tokenizer), [piece]) == ["Hi"]


def test_a_prompt_that_ends_in_special_tokens_still_gives_the_space() -> None:
    tokenizer = byte_fallback_tokenizer()
    piece = id_of(tokenizer, "\u2581Hi")
    prompt = np.concatenate([ids_of(tokenizer, "world"), np.full(40, 2, dtype=np.int32)])
    assert deltas(Detokenizer(tokenizer), [piece], prompt) == [" Hi"]


def test_a_character_begun_by_the_prompt_is_finished() -> None:
    prompt = np.array(byte_ids(0xE4, 0xBD), dtype=np.int32)
    assert deltas(Detokenizer(byte_fallback_tokenizer()), byte_ids(0xA0), prompt) == ["你"]


def test_bytes_that_are_no_character_do_not_stop_the_stream() -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = [*byte_ids(0xE4, 0xBD, 0xA0, 0xFF), *ids_of(tokenizer, "Hi").tolist(), *byte_ids(0xC3)]
    texts = deltas(Detokenizer(tokenizer), [*ids, *byte_ids(0xBC)])
    assert "".join(texts) == "你\ufffd Hiü"


def test_endless_broken_bytes_are_shown_as_they_come() -> None:
    tokenizer = byte_level_tokenizer()
    broken = id_of(tokenizer, "Ģ")  # byte 0x80, which begins no character
    assert deltas(Detokenizer(tokenizer), [broken] * 100) == ["\ufffd"] * 100


@pytest.mark.parametrize("make", ALL_KINDS)
def test_ids_that_the_tokenizer_does_not_know_have_no_text(make: Callable[[], Tokenizer]) -> None:
    detokenizer = Detokenizer(make())
    assert deltas(detokenizer, [100_000, 100_001]) == ["", ""]
    assert detokenizer.token_text_and_bytes(100_000) == ("", b"")


@pytest.mark.parametrize(("skip", "shown"), [(True, ""), (False, END)])
def test_special_tokens_are_skipped_or_shown(skip: bool, shown: str) -> None:
    tokenizer = byte_level_tokenizer()
    ids = [id_of(tokenizer, END), id_of(tokenizer, TOOL)]
    assert deltas(Detokenizer(tokenizer), ids, skip=skip) == [shown, TOOL]


def test_word_pieces_join_as_the_library_joins_them() -> None:
    tokenizer = word_piece_tokenizer()
    ids = ids_of(tokenizer, "mills turn watery wheels.").tolist()
    texts = deltas(Detokenizer(tokenizer), ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_token_bytes_of_byte_level_tokens_are_the_true_ones() -> None:
    tokenizer = byte_level_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = ids_of(tokenizer, "naïve 水 😀")
    pairs = [detokenizer.token_text_and_bytes(token_id) for token_id in ids.tolist()]
    assert b"".join(token_bytes for _, token_bytes in pairs) == "naïve 水 😀".encode()
    assert any(text == "\ufffd" for text, _ in pairs)
    assert detokenizer.token_text_and_bytes(id_of(tokenizer, END)) == (END, END.encode())


def test_token_bytes_of_sentencepiece_tokens_are_the_true_ones() -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    piece = id_of(tokenizer, "\u2581Hi")
    assert detokenizer.token_text_and_bytes(piece) == (" Hi", b" Hi")
    assert detokenizer.token_text_and_bytes(byte_ids(0xE4)[0]) == ("\ufffd", b"\xe4")
    assert detokenizer.token_text_and_bytes(2) == ("</s>", b"</s>")


def test_decode_gives_the_prompt_back() -> None:
    tokenizer = byte_level_tokenizer()
    assert Detokenizer(tokenizer).decode(ids_of(tokenizer, "Räder 水"), True) == "Räder 水"


def test_a_model_folder_is_read_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        Detokenizer.from_model_folder(tmp_path)
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ids = ids_of(byte_level_tokenizer(), "wheel")
    assert Detokenizer.from_model_folder(tmp_path).decode(ids, True) == "wheel"
