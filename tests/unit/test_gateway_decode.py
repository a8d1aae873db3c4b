"""Depth of JSON without recursion, and descriptions of fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.limits import MAX_JSON_DEPTH
from gateway_svc.openai.decode import check_depth, expectations
from gateway_svc.openai.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    TokenizeFields,
)
from stages.errors import RequestError

LEAVES = st.none() | st.booleans() | st.integers() | st.text(alphabet='[]{}"\\ab')
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text('[]{}"\\', max_size=3), inner)
)


def depth_of(value: Any) -> int:
    """The definition: how many containers are around the innermost one, it included."""
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 0


def is_too_deep(body: bytes) -> bool:
    try:
        check_depth(body)
    except RequestError as error:
        assert error.code == "too_deep"
        return True
    return False


@given(value=VALUES, wraps=st.lists(st.booleans(), min_size=50, max_size=70))
def test_depth_is_what_the_definition_says(value: Any, wraps: list[bool]) -> None:
    for is_list in wraps:
        value = [value, "]["] if is_list else {'{"\\': value}
    assert is_too_deep(json.dumps(value).encode()) == (depth_of(value) > MAX_JSON_DEPTH)


@given(st.binary(max_size=200), st.integers(0, 100))
def test_depth_of_anything_is_told_without_an_error(noise: bytes, count: int) -> None:
    is_too_deep(b"[" * count + noise)


def test_many_brackets_are_not_depth() -> None:
    assert not is_too_deep(b"[" + b",".join([b"[]"] * 1000) + b"]")


@pytest.mark.parametrize("kind", [ChatFields, CompletionFields, TokenizeFields, DetokenizeFields])
def test_every_field_says_what_it_must_be(kind: type) -> None:
    # Fields of any type are refused by name, `prompt` is read by its own decoder.
    typed = {
        name for name, hint in kind.__annotations__.items() if hint not in ("Any", "msgspec.Raw")
    }
    assert typed <= expectations(kind).keys()
