"""From the bytes of a body to typed fields; every refusal names the field and what it must be.

The typed decoder checks types and ranges; the text for a field comes from its `Meta.description`,
so that a field is described where it is declared.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Generic, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from gateway_svc.limits import MAX_JSON_DEPTH
from stages.errors import RequestError

T = TypeVar("T")

MAX_EXPLAINED_BYTES = 64 * 1024
_FIELD_IN_PATH = re.compile(r"\$\.(\w+)")
_MISSING_FIELD = re.compile(r"missing required field `(\w+)`")
_BRACKETS_AND_QUOTES = b'"[]{}'
_ALL_OTHERS = bytes(set(range(256)) - set(_BRACKETS_AND_QUOTES))


class BodyDecoder(Generic[T]):
    """Decodes bodies into one kind of fields; unknown fields are ignored."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._expectations = expectations(kind)

    def decode(self, body: bytes) -> T:
        """Give the fields; raises RequestError."""
        check_depth(body)
        try:
            body.decode()
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            self._refuse(str(error))
        except ValueError as error:  # bad UTF-8, or msgspec.DecodeError: not JSON
            raise _not_json(body, error) from None

    def _refuse(self, reason: str) -> NoReturn:
        in_path = _FIELD_IN_PATH.search(reason)
        is_missing = _MISSING_FIELD.search(reason)
        if in_path is None and is_missing is None:
            raise RequestError(f"the body must be a JSON object: {reason}", code="invalid_type")
        match = in_path or is_missing
        assert match is not None
        param = match.group(1)
        code = "missing_required_parameter" if is_missing else reason_code(reason)
        expected = self._expectations.get(param)
        must_be = f"{param} must be {expected}: " if expected else f"{param}: "
        raise RequestError(must_be + reason, param=param, code=code)


def reason_code(reason: str) -> str:
    """Tell a wrong type from a wrong value by the decoder's words."""
    return "invalid_type" if "got `" in reason else "invalid_value"


def expectations(kind: type) -> dict[str, str]:
    """Collect what the fields of a struct say that they must be."""
    hints = get_type_hints(kind, include_extras=True)
    described = ((name, _description(hint)) for name, hint in hints.items())
    return {name: text for name, text in described if text}


def _description(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        for meta in hint.__metadata__:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    return next(filter(None, map(_description, get_args(hint))), "")


def check_depth(body: bytes) -> None:
    """Refuse JSON nested too deeply, before anything recursive reads it.

    Linear, without recursion: strings are cut out, then each bracket counts +1 or -1.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    # Behind these two replacements every quote begins or ends a string.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(unescaped.translate(None, _ALL_OTHERS).split(b'"')[::2])
    # The second bit is set in "[" and "{" and not in "]" and "}": it gives +1 and -1.
    steps = (np.frombuffer(outside, dtype=np.int8) & 2) - 1
    depth = np.cumsum(steps, dtype=np.int32).max(initial=0)
    if depth > MAX_JSON_DEPTH:
        raise RequestError(
            f"the body is nested {depth} levels deep; at most {MAX_JSON_DEPTH} are read",
            code="too_deep",
        )


def _not_json(body: bytes, error: ValueError) -> RequestError:
    reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
    param = _unwritable_field(body)
    if param:
        text = f"{param} has a value that JSON has no form for (NaN, Infinity or half a surrogate)"
        return RequestError(text, param=param, code="invalid_value")
    return RequestError(f"the body is not valid JSON: {reason}", code="invalid_json")


def _unwritable_field(body: bytes) -> str:
    """Find the field with a value that lenient JSON writers write and no JSON reader may take."""
    if len(body) > MAX_EXPLAINED_BYTES:
        return ""
    try:
        fields = json.loads(body)
    except ValueError:
        return ""
    if isinstance(fields, dict):
        for name, value in fields.items():
            try:
                json.dumps({name: value}, allow_nan=False, ensure_ascii=False).encode()
            except ValueError:
                return str(name.encode(errors="replace").decode())
    return ""
