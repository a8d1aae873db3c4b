"""Whatever a client sends, it gets an answer that is not a server error."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_svc.openai.fields import ChatFields, CompletionFields
from tests.unit.gateway_fakes import MODEL, serving

PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
NAMES = sorted(
    {field for kind in (ChatFields, CompletionFields) for field in kind.__struct_fields__}
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf")])
    | st.floats()
    | st.text()
    | st.sampled_from(["", "\x00", "\ud800", "text", "user", MODEL])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
GOOD = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "tokens": [1],
    "max_tokens": 2,
}
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(), VALUES, max_size=4)
JUNK = st.binary(max_size=64)


async def statuses(path: str, body: bytes) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    async with serving() as served:
        response = await served.client.post(path, data=body, headers=headers)
        text = await response.text()
        assert served.gateway.core.num_open == 0
        return response.status, text


def check(status: int, text: str) -> None:
    assert status in (200, 400, 404), text
    if status != 200:
        error = json.loads(text)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"]
        assert error["code"]


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(PATHS), fields=BODIES, is_good=st.booleans())
async def test_no_json_gives_a_server_error(
    path: str, fields: dict[str, Any], is_good: bool
) -> None:
    body = GOOD | fields if is_good else fields
    check(*await statuses(path, json.dumps(body).encode(errors="surrogatepass")))


@settings(max_examples=50, deadline=None)
@given(path=st.sampled_from(PATHS), body=JUNK)
async def test_no_bytes_give_a_server_error(path: str, body: bytes) -> None:
    check(*await statuses(path, body))
