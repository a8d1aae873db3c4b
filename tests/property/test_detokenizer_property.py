"""Incremental text equals the text of all ids, for every text and for every sequence of ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sampler_svc.detokenizer import Detokenizer
from tests.sampler_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
NO_PROMPT = np.array([], dtype=np.int32)

# The library cannot tell a true U+FFFD from an open character and holds it back.
any_character = st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])
texts = st.text(any_character, max_size=40) | st.text("añ水😀👍🏽 \u200d\n", max_size=30)


def ids_of(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), max_size=60)


def stream_all(tokenizer: Tokenizer, ids: list[int], prompt: list[int], skip: bool) -> list[str]:
    stream = Detokenizer(tokenizer).stream(np.array(prompt, dtype=np.int32), skip)
    return [stream.push(token_id) for token_id in ids]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
@settings(max_examples=150, deadline=None)
@given(text=texts, skip=st.booleans())
def test_a_text_comes_back_whole(tokenizer: Tokenizer, text: str, skip: bool) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas = stream_all(tokenizer, ids, [], skip)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=300, deadline=None)
@given(ids=ids_of(BYTE_LEVEL.get_vocab_size()), skip=st.booleans())
def test_any_ids_of_a_byte_level_model_give_the_librarys_text(ids: list[int], skip: bool) -> None:
    text = "".join(stream_all(BYTE_LEVEL, ids, [], skip))
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert whole.startswith(text)
    assert whole[len(text) :] in ("", "\ufffd")  # an open character at the end is dropped


@settings(max_examples=150, deadline=None)
@given(text=texts, prompt=texts)
def test_the_text_behind_a_prompt_continues_it(text: str, prompt: str) -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        prompt_ids = tokenizer.encode(prompt or "Hi", add_special_tokens=False).ids
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.decode(prompt_ids + ids)
        behind = whole.removeprefix(tokenizer.decode(prompt_ids))
        assert "".join(stream_all(tokenizer, ids, prompt_ids, True)) == behind


@settings(max_examples=300, deadline=None)
@given(
    ids=ids_of(BYTE_FALLBACK.get_vocab_size()) | st.lists(st.sampled_from(range(3, 262))),
    cut=st.integers(0, 60),
)
def test_any_ids_of_a_byte_fallback_model_are_replayed_alike(ids: list[int], cut: int) -> None:
    """What a prefix gives does not depend on what follows it, whatever nonsense it is."""
    deltas = stream_all(BYTE_FALLBACK, ids, [], True)
    assert stream_all(BYTE_FALLBACK, ids[:cut], [], True) == deltas[:cut]
