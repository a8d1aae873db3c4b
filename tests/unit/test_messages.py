"""Messages: they round-trip, and the order of their fields is append-only."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from stages import messages
from stages.messages import Message

KINDS = {
    name: kind
    for name, kind in vars(messages).items()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
}
UNIONS = {
    name: union
    for name, union in vars(messages).items()
    if name.endswith(("Inbound", "Record", "ToStage", "FromStage")) and get_args(union)
}


def fields(kind: type[Message]) -> list[str]:
    return [field.name for field in structs.fields(kind)]


@pytest.mark.parametrize("name", KINDS)
def test_every_message_is_frozen_positional_and_tagged(name: str) -> None:
    config = KINDS[name].__struct_config__
    assert config.frozen and config.array_like and config.tag == name


def any_value(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, of the range that msgpack carries."""
    if kind is int:
        return st.integers(-(2**63), 2**63 - 1)
    if kind is float:
        return st.floats(allow_nan=False)
    arguments = get_args(kind)
    if get_origin(kind) is list:
        return st.lists(any_value(arguments[0]), max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(st.text(max_size=5), any_value(arguments[1]), max_size=3)
    if arguments:
        return st.one_of(*(any_value(argument) for argument in arguments))
    if isinstance(kind, type) and issubclass(kind, Message):
        return st.builds(kind, **{f.name: any_value(f.type) for f in structs.fields(kind)})
    return st.from_type(kind)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_messages_round_trip(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    message = data.draw(any_value(kind))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind) == message


@pytest.mark.parametrize("name", KINDS)
def test_an_old_reader_accepts_a_message_with_a_field_more(name: str) -> None:
    kind = KINDS[name]
    newer = msgspec.defstruct(
        name,
        [*((f.name, Any) for f in structs.fields(kind)), ("one_more", int, 7)],
        frozen=True,
        array_like=True,
        tag=name,
    )
    values = [_example(field.type) for field in structs.fields(kind)]
    message = msgspec.msgpack.decode(msgspec.msgpack.encode(newer(*values)), type=kind)
    assert fields(type(message)) == fields(kind)


def _example(kind: Any) -> Any:
    for example in (0, "", b"", 0.0, False, [], {}, None, *_structs()):
        try:
            msgspec.msgpack.decode(msgspec.msgpack.encode(example), type=kind)
        except msgspec.ValidationError:
            continue
        return example
    raise AssertionError(f"no example of {kind}")


def _structs() -> list[Message]:
    prompt = messages.TextPrompt("")
    params = messages.SamplingParams()
    return [prompt, params, messages.ExecutorFacts(), messages.Generate(0, 0, prompt, params)]


@pytest.mark.parametrize("name", UNIONS)
@given(frame=st.binary(max_size=200))
def test_garbage_is_a_decode_error_and_nothing_else(name: str, frame: bytes) -> None:
    decoder = msgspec.msgpack.Decoder(UNIONS[name])
    try:
        decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
