"""The codec gives the ids and the text of AutoTokenizer, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stages.errors import ConfigError
from tests.unit.tokenizer_folders import KINDS, byte_level_bpe, edit_tokenizer_config
from tokenizer_svc.encode import TextCodec, load_tokenizer

Pair = tuple[TextCodec, Any]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """For each kind: our codec and the reference tokenizer."""
    pairs = {}
    for kind, build in KINDS.items():
        folder = build(tmp_path_factory.mktemp(kind))
        codec = TextCodec(load_tokenizer(folder))
        pairs[kind] = codec, AutoTokenizer.from_pretrained(folder)
    return pairs


# Spaces, line ends, digits and marks of special tokens are where tokenizers differ.
PIECES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "<|im_start|>",
    "<s>",
    "</s>",
    "<bos>",
    "▁",
    "🙂",
    "e\u0301",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=texts, add_special_tokens=st.booleans())
def test_ids_equal_the_reference(
    pairs: dict[str, Pair], kind: str, text: str, add_special_tokens: bool
) -> None:
    codec, reference = pairs[kind]
    expected = reference.encode(text, add_special_tokens=add_special_tokens)
    token_ids = codec.encode(text, add_special_tokens=add_special_tokens)
    assert token_ids.dtype == np.int32
    assert token_ids.tolist() == expected
    assert codec.decode(token_ids) == reference.decode(expected)


@pytest.mark.parametrize(
    ("kind", "tokenizer_class"),
    [("byte_level_bpe", "Qwen2Tokenizer"), ("metaspace_bpe", "LlamaTokenizer")],
)
def test_ids_equal_the_reference_of_the_class_that_the_folder_names(
    tmp_path: Path, kind: str, tokenizer_class: str
) -> None:
    folder = KINDS[kind](tmp_path)
    edit_tokenizer_config(folder, tokenizer_class=tokenizer_class)
    reference = AutoTokenizer.from_pretrained(folder)
    codec = TextCodec(load_tokenizer(folder))
    assert type(reference).__name__ == tokenizer_class
    for text in ("A wheel  stands\n\nstill", " <s>水 🙂", "it's 12345"):
        assert codec.encode(text, add_special_tokens=True).tolist() == reference.encode(text)


def test_truncation_and_padding_of_the_file_are_ignored(pairs: dict[str, Pair]) -> None:
    codec, _ = pairs["word_level"]
    assert len(codec.encode("water", add_special_tokens=True)) == 1
    assert len(codec.encode("water " * 20, add_special_tokens=True)) == 20


def test_bos_comes_from_the_post_processor_only_when_asked(pairs: dict[str, Pair]) -> None:
    codec, reference = pairs["byte_level_bpe_with_bos"]
    with_bos = codec.encode("wheel", add_special_tokens=True).tolist()
    assert with_bos[0] == reference.bos_token_id
    assert codec.encode("wheel", add_special_tokens=False).tolist() == with_bos[1:]


def test_token_strs_are_the_vocabulary_and_empty_beyond_it(pairs: dict[str, Pair]) -> None:
    codec, reference = pairs["byte_level_bpe"]
    token_ids = codec.encode("the wheel", add_special_tokens=False)
    assert codec.token_strs(token_ids) == reference.convert_ids_to_tokens(token_ids.tolist())
    assert codec.token_strs([len(reference) + 5]) == [""]


def test_a_folder_without_tokenizer_json_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_json_is_a_config_error(tmp_path: Path) -> None:
    folder = byte_level_bpe(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(folder)
