"""A table of bad bodies: each is a 4xx in OpenAI's shape that names its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stages.messages import Generate, Message
from tests.unit.gateway_fakes import MODEL, VOCAB_SIZE, serving

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BOTH = (CHAT, TEXT)
TURN = {"role": "user", "content": "hi"}
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [TURN]},
    TEXT: {"model": MODEL, "prompt": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}
TYPE, VALUE = "invalid_type", "invalid_value"
MISSING, UNSUPPORTED = "missing_required_parameter", "unsupported_parameter"
UNSUPPORTED_VALUE, TOO_LONG = "unsupported_value", "context_length_exceeded"
HUGE = 10**30

# (fields that differ from a good body, offending field, code): refused by both endpoints
SHARED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 1}, "model", TYPE),
    ({"model": None}, "model", TYPE),
    ({"n": 0}, "n", VALUE),
    ({"n": 129}, "n", VALUE),
    ({"n": "2"}, "n", TYPE),
    ({"n": 1.5}, "n", TYPE),
    ({"n": True}, "n", TYPE),
    ({"n": HUGE}, "n", VALUE),
    ({"temperature": -0.1}, "temperature", VALUE),
    ({"temperature": 2.1}, "temperature", VALUE),
    ({"temperature": "hot"}, "temperature", TYPE),
    ({"temperature": True}, "temperature", TYPE),
    ({"temperature": [1]}, "temperature", TYPE),
    ({"top_p": 0}, "top_p", VALUE),
    ({"top_p": 1.01}, "top_p", VALUE),
    ({"top_k": -2}, "top_k", VALUE),
    ({"top_k": 2**31}, "top_k", VALUE),
    ({"top_k": 1.0}, "top_k", TYPE),
    ({"min_p": -1}, "min_p", VALUE),
    ({"min_p": 2}, "min_p", VALUE),
    ({"seed": HUGE}, "seed", VALUE),
    ({"seed": -HUGE}, "seed", VALUE),
    ({"seed": 0.5}, "seed", TYPE),
    ({"seed": False}, "seed", TYPE),
    ({"stop": 5}, "stop", TYPE),
    ({"stop": ""}, "stop", VALUE),
    ({"stop": [""]}, "stop", VALUE),
    ({"stop": ["a", 1]}, "stop", TYPE),
    ({"stop": ["x"] * 33}, "stop", VALUE),
    ({"stop": "x" * 257}, "stop", VALUE),
    ({"stop_token_ids": [-1]}, "stop_token_ids", VALUE),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", VALUE),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", VALUE),
    ({"stop_token_ids": 7}, "stop_token_ids", TYPE),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", TYPE),
    ({"min_tokens": -1}, "min_tokens", VALUE),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", VALUE),
    ({"min_tokens": 5000}, "min_tokens", VALUE),
    ({"max_tokens": -1}, "max_tokens", VALUE),
    ({"max_tokens": 2049}, "max_tokens", VALUE),
    ({"max_tokens": HUGE}, "max_tokens", VALUE),
    ({"max_tokens": "10"}, "max_tokens", TYPE),
    ({"max_tokens": True}, "max_tokens", TYPE),
    ({"ignore_eos": "yes"}, "ignore_eos", TYPE),
    ({"presence_penalty": 2.5}, "presence_penalty", VALUE),
    ({"frequency_penalty": -2.5}, "frequency_penalty", VALUE),
    ({"frequency_penalty": "0"}, "frequency_penalty", TYPE),
    ({"repetition_penalty": 0}, "repetition_penalty", VALUE),
    ({"repetition_penalty": -1}, "repetition_penalty", VALUE),
    ({"logit_bias": [1]}, "logit_bias", TYPE),
    ({"logit_bias": {"1": 101}}, "logit_bias", VALUE),
    ({"logit_bias": {"1": "x"}}, "logit_bias", TYPE),
    ({"logit_bias": {"one": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"-1": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"²": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"9" * 400: 1}}, "logit_bias", VALUE),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", VALUE),
    ({"logit_bias": {str(key): 1 for key in range(1025)}}, "logit_bias", VALUE),
    ({"bad_words": "x"}, "bad_words", TYPE),
    ({"bad_words": [1]}, "bad_words", TYPE),
    ({"bad_words": [["x"]]}, "bad_words", TYPE),
    ({"bad_words": [""]}, "bad_words", VALUE),
    ({"bad_words": ["x", " \n"]}, "bad_words", VALUE),
    ({"bad_words": ["x" * 257]}, "bad_words", VALUE),
    ({"bad_words": ["x"] * 129}, "bad_words", VALUE),
    ({"skip_special_tokens": 0}, "skip_special_tokens", TYPE),
    ({"priority": 2**31}, "priority", VALUE),
    ({"priority": "high"}, "priority", TYPE),
    ({"cache_salt": ""}, "cache_salt", VALUE),
    ({"cache_salt": "x" * 1025}, "cache_salt", VALUE),
    ({"cache_salt": 1}, "cache_salt", TYPE),
    ({"user": 1}, "user", TYPE),
    ({"stream": "true"}, "stream", TYPE),
    ({"stream": 1}, "stream", TYPE),
    ({"stream_options": {"include_usage": True}}, "stream_options", VALUE),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", TYPE),
    ({"stream": True, "stream_options": []}, "stream_options", TYPE),
    ({"response_format": {"type": "json_object"}}, "response_format", UNSUPPORTED_VALUE),
    ({"response_format": {"type": "json_schema"}}, "response_format", UNSUPPORTED_VALUE),
    ({"response_format": {}}, "response_format", MISSING),
    ({"response_format": "text"}, "response_format", TYPE),
    ({"structured_outputs": {"json": {}}}, "structured_outputs", UNSUPPORTED),
    ({"guided_regex": "a+"}, "guided_regex", UNSUPPORTED),
    ({"allowed_token_ids": [1]}, "allowed_token_ids", UNSUPPORTED),
    ({"use_beam_search": True}, "use_beam_search", UNSUPPORTED),
]
CHAT_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", VALUE),
    ({"messages": None}, "messages", TYPE),
    ({"messages": "hi"}, "messages", TYPE),
    ({"messages": ["hi"]}, "messages", TYPE),
    ({"messages": [{"content": "hi"}]}, "messages", MISSING),
    ({"messages": [{"role": "user"}]}, "messages", MISSING),
    ({"messages": [{"role": 1, "content": "hi"}]}, "messages", TYPE),
    ({"messages": [{"role": "user", "content": 1}]}, "messages", TYPE),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages", VALUE),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages", VALUE),
    ({"messages": [TURN | {"tool_calls": [{"id": "1"}]}]}, "messages", UNSUPPORTED_VALUE),
    ({"messages": [TURN | {"content": [{"type": "text"}]}]}, "messages", MISSING),
    ({"messages": [TURN | {"content": [{"text": "hi"}]}]}, "messages", MISSING),
    (
        {"messages": [TURN | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        UNSUPPORTED_VALUE,
    ),
    ({"messages": [TURN | {"content": "x" * (16 * 2048 + 1)}]}, "messages", TOO_LONG),
    ({"max_tokens": 0}, "max_tokens", VALUE),
    ({"max_completion_tokens": 0}, "max_completion_tokens", VALUE),
    ({"max_completion_tokens": 2049}, "max_completion_tokens", VALUE),
    ({"max_completion_tokens": 3, "min_tokens": 4}, "min_tokens", VALUE),
    ({"logprobs": 1}, "logprobs", TYPE),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", VALUE),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", VALUE),
    ({"top_logprobs": 2}, "top_logprobs", VALUE),
    ({"tools": [{"type": "function"}]}, "tools", UNSUPPORTED),
    ({"functions": [{"name": "f"}]}, "functions", UNSUPPORTED),
    ({"chat_template": "{{ x }}"}, "chat_template", UNSUPPORTED),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", TYPE),
    ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs", TYPE),
    ({"chat_template_kwargs": {"a": None}}, "chat_template_kwargs", TYPE),
    ({"chat_template_kwargs": {"a": HUGE}}, "chat_template_kwargs", VALUE),
    ({"chat_template_kwargs": {"a": "x" * 257}}, "chat_template_kwargs", VALUE),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        VALUE,
    ),
]
TEXT_ONLY: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", TYPE),
    ({"prompt": 5}, "prompt", TYPE),
    ({"prompt": {}}, "prompt", TYPE),
    ({"prompt": []}, "prompt", VALUE),
    ({"prompt": [[]]}, "prompt", VALUE),
    ({"prompt": [1, "a"]}, "prompt", TYPE),
    ({"prompt": ["a", 1]}, "prompt", TYPE),
    ({"prompt": [[1], 2]}, "prompt", TYPE),
    ({"prompt": [1.5]}, "prompt", TYPE),
    ({"prompt": [True]}, "prompt", TYPE),
    ({"prompt": [-1]}, "prompt", VALUE),
    ({"prompt": [VOCAB_SIZE]}, "prompt", VALUE),
    ({"prompt": [HUGE]}, "prompt", VALUE),
    ({"prompt": ["a"] * 257}, "prompt", VALUE),
    ({"prompt": "x" * (16 * 2048 + 1)}, "prompt", TOO_LONG),
    ({"prompt": [1] * 2048}, "prompt", TOO_LONG),
    ({"prompt": ["a"] * 200, "n": 6}, "n", VALUE),
    ({"logprobs": 21}, "logprobs", VALUE),
    ({"logprobs": -1}, "logprobs", VALUE),
    ({"logprobs": True}, "logprobs", TYPE),
    ({"echo": 1}, "echo", TYPE),
    ({"best_of": 2}, "best_of", UNSUPPORTED_VALUE),
    ({"suffix": "end"}, "suffix", UNSUPPORTED),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", UNSUPPORTED),
    ({"min_tokens": 17}, "min_tokens", VALUE),
    ({"max_tokens": 0, "min_tokens": 1}, "min_tokens", VALUE),
]
OTHER: list[tuple[str, dict[str, Any], str, str]] = [
    ("/tokenize", {"prompt": None}, "prompt", MISSING),
    ("/tokenize", {"prompt": [1]}, "prompt", TYPE),
    ("/tokenize", {"messages": []}, "messages", VALUE),
    ("/tokenize", {"tools": [1]}, "tools", UNSUPPORTED),
    ("/tokenize", {"prompt": "x" * (16 * 2048 + 1)}, "prompt", TOO_LONG),
    ("/tokenize", {"return_token_strs": 1}, "return_token_strs", TYPE),
    ("/detokenize", {"tokens": None}, "tokens", TYPE),
    ("/detokenize", {"tokens": [-1]}, "tokens", VALUE),
    ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens", VALUE),
    ("/detokenize", {"tokens": ["a"]}, "tokens", TYPE),
]
TABLE = [
    *((path, *row) for path in BOTH for row in SHARED),
    *((CHAT, *row) for row in CHAT_ONLY),
    *((TEXT, *row) for row in TEXT_ONLY),
    *OTHER,
]

# (raw body, offending field or None, code)
RAW: list[tuple[bytes, str | None, str]] = [
    (b"", None, "invalid_json"),
    (b"{", None, "invalid_json"),
    (b"[]", None, TYPE),
    (b'"text"', None, TYPE),
    (b"null", None, TYPE),
    (b"{}", "model", MISSING),
    (b'{"model": "tiny"}', "messages", MISSING),
    (b'{"temperature": NaN}', "temperature", VALUE),
    (b'{"temperature": Infinity}', "temperature", VALUE),
    (b'{"top_p": -Infinity}', "top_p", VALUE),
    (b'{"temperature": 1e400}', "temperature", VALUE),
    (b'{"seed": ' + b"9" * 5000 + b"}", "seed", VALUE),
    (b'{"model": "\\ud800"}', "model", VALUE),
    (b'{"user": "\\udc00 x"}', "user", VALUE),
    (b'{"logit_bias": {"\\ud800": 1}}', "logit_bias", VALUE),
    (b'{"unknown": "\\ud800"}', "unknown", VALUE),
    (b'{"\\ud800": 1}', "?", VALUE),
    (b'{"model": "\xff"}', None, "invalid_json"),
    (b'{"unknown": "\xed\xa0\x80"}', "unknown", VALUE),
    (b'\xef\xbb\xbf{"model": "tiny"}', None, "invalid_json"),
    (b'{"model": "tiny", "messages": [{"role": "user"}]} x', None, "invalid_json"),
    (b'{"model": "a\x00b"}', None, "invalid_json"),
    (b'{"unknown": ' + b"[" * 64 + b"]" * 64 + b"}", None, "too_deep"),
    (b"[" * 1_000_000, None, "too_deep"),
    (b'{"a":' * 100_000, None, "too_deep"),
]


def json_bytes(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


async def refusal(path: str, body: bytes) -> tuple[int, dict[str, Any], list[Message]]:
    """POST a body; give status, error, and what reached the pipeline."""
    async with serving() as served:
        response = await served.client.post(
            path, data=body, headers={"Content-Type": "application/json"}
        )
        document = await response.json()
        return response.status, document["error"], served.pipeline.sent


@pytest.mark.parametrize(("path", "fields", "param", "code"), TABLE)
async def test_bad_fields(path: str, fields: dict[str, Any], param: str, code: str) -> None:
    body = MINIMAL[path] | fields
    status, error, sent = await refusal(path, json_bytes(body))
    assert (status, error["param"], error["code"]) == (400, param, code), error
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert sent == []


@pytest.mark.parametrize(("body", "param", "code"), RAW)
async def test_bad_bodies(body: bytes, param: str | None, code: str) -> None:
    status, error, sent = await refusal(CHAT, body)
    assert (status, error["param"], error["code"]) == (400, param, code), error
    assert sent == []


@pytest.mark.parametrize("path", list(MINIMAL))
async def test_an_unknown_model_is_404(path: str) -> None:
    status, error, sent = await refusal(path, json_bytes(MINIMAL[path] | {"model": "other"}))
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert sent == []


@pytest.mark.parametrize(
    ("path", "name"), [(CHAT, "model"), (CHAT, "messages"), (TEXT, "model"), (TEXT, "prompt")]
)
async def test_a_missing_field_is_named(path: str, name: str) -> None:
    body = {key: value for key, value in MINIMAL[path].items() if key != name}
    status, error, _ = await refusal(path, json_bytes(body))
    assert (status, error["param"], error["code"]) == (400, name, MISSING)


@pytest.mark.parametrize("path", list(MINIMAL))
async def test_the_body_that_all_rows_start_from_is_good(path: str) -> None:
    async with serving() as served:
        response = await served.client.post(path, json=MINIMAL[path])
        assert response.status == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 128, "max_tokens": 1},
        {"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1, "repetition_penalty": 100},
        {"seed": -(2**63) + 1},
        {"stop": ["x" * 256] * 32, "stop_token_ids": [VOCAB_SIZE - 1] * 128},
        {"min_tokens": 8, "max_tokens": 8},
        {"logit_bias": {str(key % VOCAB_SIZE): 100 for key in range(1024)}},
        {"bad_words": ["x" * 256] * 128},
        {"bad_words": []},
        {"cache_salt": "x" * 1024, "priority": -(2**31) + 1},
        {"unknown": [[[["deep"]]]]},
    ],
)
async def test_values_at_their_limits_are_good(fields: dict[str, Any]) -> None:
    async with serving() as served:
        response = await served.complete(**fields)
        assert response.status == 200, await response.text()
        assert served.pipeline.of_kind(Generate)
