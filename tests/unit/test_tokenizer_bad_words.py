"""`bad_words` become the token sequences that vLLM's rule gives, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stages.columns import i32, i32_bytes
from stages.errors import RequestError
from stages.messages import (
    Generate,
    RequestRejected,
    SamplingParams,
    TextPrompt,
    TokenizedRequest,
)
from tests.unit.tokenizer_folders import KINDS, byte_level_bpe, server_config
from tokenizer_svc.bad_words import with_bad_word_ids
from tokenizer_svc.encode import TextCodec, load_tokenizer
from tokenizer_svc.limits import MAX_BAD_WORD_TOKENS, complete_params
from tokenizer_svc.stage import TokenizerStage

Pair = tuple[TextCodec, Any]

PIECES = [" ", "\n", "▁", "wheel", "The ", "fließt", "水は", "🙂", "<|im_end|>", "</s>"]
words = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=4).map("".join)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """For each kind: our codec and the reference tokenizer."""
    folders = {kind: build(tmp_path_factory.mktemp(kind)) for kind, build in KINDS.items()}
    return {
        kind: (TextCodec(load_tokenizer(folder)), AutoTokenizer.from_pretrained(folder))
        for kind, folder in folders.items()
    }


@pytest.fixture(scope="module")
def codec(pairs: dict[str, Pair]) -> TextCodec:
    return pairs[byte_level_bpe.__name__][0]


def sequences(params: SamplingParams) -> list[list[int]]:
    ends = np.cumsum(i32(params.bad_word_lens))[:-1]
    return [ids.tolist() for ids in np.split(i32(params.bad_word_ids), ends)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(bad_words=st.lists(words, min_size=1, max_size=4))
def test_a_word_at_the_start_and_behind_a_space(
    pairs: dict[str, Pair], kind: str, bad_words: list[str]
) -> None:
    codec, reference = pairs[kind]
    expected: list[list[int]] = []
    for word in bad_words:
        bare = reference.encode(word.lstrip(), add_special_tokens=False)
        spaced = reference.encode(" " + word.lstrip(), add_special_tokens=False)
        expected.append(bare)
        if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
            expected.append(spaced)
    params = SamplingParams(bad_words=bad_words, seed=3)
    if not all(expected):
        with pytest.raises(
            RequestError, match=r"bad_words has .* no tokens; leave it out"
        ) as error:
            with_bad_word_ids(params, codec)
        assert error.value.param == "bad_words"
        return
    completed = with_bad_word_ids(params, codec)
    assert sequences(completed) == expected
    assert (completed.bad_words, completed.seed) == ([], 3)


def test_no_words_change_nothing(codec: TextCodec) -> None:
    params = SamplingParams(seed=3)
    assert with_bad_word_ids(params, codec) is params


def test_the_number_of_tokens_is_limited(tmp_path: Path) -> None:
    def complete(num_tokens: int) -> SamplingParams:
        params = SamplingParams(bad_word_ids=i32_bytes([5] * num_tokens))
        return complete_params(params, 1, server_config(tmp_path), "prompt")

    complete(MAX_BAD_WORD_TOKENS)
    with pytest.raises(
        RequestError, match=r"1025 tokens in all, .* send fewer or shorter"
    ) as error:
        complete(MAX_BAD_WORD_TOKENS + 1)
    assert error.value.param == "bad_words"


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    params = SamplingParams(bad_word_ids=i32_bytes([5, 512]))
    with pytest.raises(RequestError, match="bad_words has token id 512,") as error:
        complete_params(params, 1, server_config(tmp_path), "prompt")
    assert error.value.param == "bad_words"


def test_the_stage_sends_ids_or_names_the_field(tmp_path: Path) -> None:
    stage = TokenizerStage(server_config(byte_level_bpe(tmp_path)))
    message = Generate(7, 3, TextPrompt("The"), SamplingParams(bad_words=["wheel", "a mill"]))
    (said,) = stage.handle([message], now_ns=0)
    assert isinstance(said, TokenizedRequest)
    assert said.params.bad_words == [] and len(sequences(said.params)) >= 2
    too_many = msgspec.structs.replace(message.params, bad_words=["ßäöü" * 60] * 3)
    (said,) = stage.handle([msgspec.structs.replace(message, params=too_many)], now_ns=0)
    assert isinstance(said, RequestRejected)
    assert (said.param, said.status, said.code) == ("bad_words", 400, "invalid_value")
