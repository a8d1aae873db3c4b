"""Everything around the endpoints: keys, ids, sizes, clients that leave, full and draining."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from aiohttp import ClientError, web

from gateway_svc import sse
from gateway_svc.app import has_c_parser
from gateway_svc.middleware import OPEN_PATHS
from stages.messages import (
    AbortRequest,
    Drain,
    Drained,
    FinishReason,
    Generate,
    Message,
    Resend,
    Tokenize,
)
from tests.unit.gateway_fakes import (
    MODEL,
    Served,
    answer,
    events,
    group_state,
    serving,
    silence,
    started,
    text_outputs,
)

JSON = {"Content-Type": "application/json"}


async def error_of(response: Any) -> dict[str, Any]:
    body = await response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    error: dict[str, Any] = body["error"]
    return error


# ── keys ─────────────────────────────────────────────────────────────────────────────────────


def routes(served: Served) -> list[tuple[str, str]]:
    """Every (method, path) of the application, a name filled in where the path wants one."""
    app = served.client.app
    assert isinstance(app, web.Application)
    return [
        (route.method, route.resource.canonical.replace("{model}", MODEL))
        for route in app.router.routes()
        if route.resource is not None
    ]


async def test_every_route_but_the_open_ones_wants_a_key() -> None:
    async with serving(api_key=["right", "other"]) as served:
        table = routes(served)
        assert len(table) > 12
        for method, path in [*table, ("GET", "/no/such/path")]:
            for header in ("", "Bearer wrong", "right", "Basic right", "Bearer \N{SNOWMAN}"):
                headers = {"Authorization": header} if header else {}
                response = await served.client.request(method, path, headers=headers)
                if path in OPEN_PATHS:
                    assert response.status != 401
                else:
                    assert response.status == 401, (method, path)
                    if method != "HEAD":
                        assert (await error_of(response))["code"] == "invalid_api_key"
    assert {"/live", "/ready", "/health"} <= OPEN_PATHS


@pytest.mark.parametrize("header", ["Bearer right", "bearer other"])
async def test_each_key_opens(header: str) -> None:
    async with serving(api_key=["right", "other"]) as served:
        response = await served.client.get("/v1/models", headers={"Authorization": header})
        assert response.status == 200


async def test_without_keys_all_is_open_and_no_other_site_is_let_in() -> None:
    async with serving() as served:
        response = await served.client.get("/v1/models", headers={"Origin": "http://evil"})
        assert response.status == 200
        assert not [name for name in response.headers if name.startswith("Access-Control")]


# ── request ids ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_stream", [False, True])
async def test_the_clients_request_id_comes_back(is_stream: bool) -> None:
    async with serving() as served:
        response = await served.client.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "hi", "stream": is_stream},
            headers={"X-Request-Id": "My.id_1-2"},
        )
        assert response.headers["X-Request-Id"] == "My.id_1-2"


async def test_a_request_without_id_gets_one() -> None:
    async with serving() as served:
        ids = {(await served.client.get("/live")).headers["X-Request-Id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("request_id", ["a b", "x" * 129, "<script>", "ü"])
async def test_a_bad_request_id_is_refused_and_not_echoed(request_id: str) -> None:
    async with serving() as served:
        response = await served.client.get("/live", headers={"X-Request-Id": request_id})
        assert response.status == 400
        assert response.headers["X-Request-Id"] != request_id
        assert (await error_of(response))["param"] == "X-Request-Id"


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


async def test_a_body_that_is_too_large_is_413() -> None:
    async with serving(max_body_bytes=1000) as served:
        response = await served.complete(prompt="x" * 1000)
        assert response.status == 413
        assert (await error_of(response))["code"] == "body_too_large"


async def test_a_body_of_the_limit_is_read() -> None:
    async with serving(max_body_bytes=4096) as served:
        assert (await served.complete(prompt="x" * 3000)).status == 200


async def test_a_compressed_body_is_refused() -> None:
    async with serving() as served:
        response = await served.client.post(
            "/v1/completions", data=b"{}", headers=JSON | {"Content-Encoding": "gzip"}
        )
        assert response.status == 415
        assert (await error_of(response))["param"] == "Content-Encoding"


async def test_a_body_of_another_type_is_refused() -> None:
    async with serving() as served:
        response = await served.client.post(
            "/v1/completions", data=b"{}", headers={"Content-Type": "text/plain"}
        )
        assert response.status == 415
        assert (await error_of(response))["param"] == "Content-Type"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/unknown", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_wrong_addresses(method: str, path: str, status: int, code: str) -> None:
    async with serving() as served:
        response = await served.client.request(method, path)
        assert response.status == status
        assert (await error_of(response))["code"] == code


async def test_a_bug_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def script(generate: Generate) -> Sequence[Message]:
        raise ZeroDivisionError("secret")

    async with serving(script) as served:
        response = await served.chat()
        assert response.status == 500
        assert "secret" not in await response.text()
    assert "ZeroDivisionError" in caplog.text


async def test_a_bug_within_a_stream_breaks_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("gateway_svc.openai.generation.usage_of", fail)
    async with serving() as served:
        response = await served.chat(stream=True, stream_options={"include_usage": True})
        assert response.status == 200
        with pytest.raises(ClientError):
            await response.read()


async def test_a_body_that_does_not_arrive_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway_svc.body.BODY_TIMEOUT_S", 0.05)
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.client.port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: 100\r\n\r\n{")
        assert (await reader.readline()).split()[1] == b"408"
        writer.close()
        await writer.wait_closed()


# ── clients that leave ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_while_it_waits_aborts_its_requests(is_stream: bool) -> None:
    async with serving(silence) as served:
        call = asyncio.ensure_future(served.chat(n=2, stream=is_stream))
        await served.pipeline.receive(Generate)
        call.cancel()
        await served.pipeline.receive(AbortRequest, count=2)
        opened = [generate.request_id for generate in served.pipeline.of_kind(Generate)]
        aborts = served.pipeline.of_kind(AbortRequest)
    assert sorted(abort.request_id for abort in aborts) == opened


async def test_a_client_that_leaves_a_stream_aborts_its_request() -> None:
    def script(generate: Generate) -> Sequence[Message]:
        return [text_outputs(generate.epoch, (generate.request_id, [1], "a", 0))]

    async with serving(script) as served:
        response = await served.chat(stream=True)
        assert await response.content.readline()
        response.close()
        abort = await served.pipeline.receive(AbortRequest)
        assert abort.request_id == served.pipeline.of_kind(Generate)[0].request_id


async def test_a_client_that_reads_too_slowly_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway_svc.gateway.MAX_BACKLOG_PER_REQUEST", 4)

    def flood(generate: Generate) -> Sequence[Message]:
        text = "x" * 1_000_000
        step = text_outputs(generate.epoch, (generate.request_id, [1], text, 0))
        return [started(generate), *[step] * 64]

    async with serving(flood) as served:
        response = await served.chat(stream=True)
        await served.pipeline.receive(AbortRequest)
        with pytest.raises(ClientError):
            await response.read()


async def test_a_client_that_takes_nothing_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "WRITE_TIMEOUT_S", 0.05)

    def script(generate: Generate) -> Sequence[Message]:
        text = "x" * 20_000_000
        return [text_outputs(generate.epoch, (generate.request_id, [1], text, 0))]

    async with serving(script) as served:
        response = await served.chat(stream=True)
        await served.pipeline.receive(AbortRequest)
        with pytest.raises(ClientError):
            await response.read()


# ── full, starting, draining, recovering ─────────────────────────────────────────────────────


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async with serving(silence, max_num_seqs=1, max_queued_requests=1) as served:
        calls = [asyncio.ensure_future(served.chat()) for _ in range(2)]
        await served.pipeline.receive(Generate, count=2)
        response = await served.chat()
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        error = await error_of(response)
        assert (error["code"], error["type"]) == ("queue_full", "service_unavailable_error")
        assert len(served.pipeline.of_kind(Generate)) == 2
        for call in calls:
            call.cancel()


async def test_choices_are_taken_all_or_none() -> None:
    async with serving(silence, max_num_seqs=1, max_queued_requests=2) as served:
        call = asyncio.ensure_future(served.chat(n=2))
        await served.pipeline.receive(Generate)
        assert (await served.chat(n=2)).status == 503
        assert served.gateway.core.num_open == 2
        call.cancel()


async def test_what_can_never_be_taken_is_the_clients_fault() -> None:
    async with serving(max_num_seqs=1, max_queued_requests=2) as served:
        response = await served.chat(n=4)
        assert response.status == 400
        assert (await error_of(response))["param"] == "n"


async def test_before_the_first_epoch_nothing_is_taken() -> None:
    async with serving(has_begun=False) as served:
        response = await served.chat()
        assert response.status == 503
        assert (await error_of(response))["code"] == "starting"


async def test_draining_refuses_new_requests_and_ends_the_open_ones() -> None:
    async with serving(silence) as served:
        call = asyncio.ensure_future(served.chat())
        generate = await served.pipeline.receive(Generate)
        served.gateway.drain(Drain(0))
        response = await served.chat()
        assert response.status == 503
        assert (await error_of(response))["code"] == "draining"
        assert served.pipeline.of_kind(Drained) == []
        served.gateway.on_messages(answer(generate))
        assert (await call).status == 200
        assert len(served.pipeline.of_kind(Drained)) == 1


async def test_a_recovery_is_a_pause_and_no_more() -> None:
    def dies_once(generate: Generate) -> Sequence[Message]:
        if generate.epoch == 1:
            return answer(generate)[:3]
        return answer(generate)

    async with serving(dies_once) as served:
        response = await served.complete(max_tokens=5, stream=True)
        served.gateway.on_messages([Resend(2, unanswered_only=False)])
        *chunks, _ = await events(response)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == "w0 w1 w2 w3 w4 "


async def test_a_request_that_is_recovered_too_often_is_a_500() -> None:
    async with serving(silence, max_recoveries=0) as served:
        call = asyncio.ensure_future(served.chat())
        await served.pipeline.receive(Generate)
        served.gateway.on_messages([Resend(2, unanswered_only=False)])
        response = await call
        assert response.status == 500
        assert (await error_of(response))["code"] == "recovery_limit"


# ── small endpoints ──────────────────────────────────────────────────────────────────────────


async def test_models() -> None:
    async with serving(served_model_name="org/tiny") as served:
        body = await (await served.client.get("/v1/models")).json()
        card = await (await served.client.get("/v1/models/org/tiny")).json()
    assert body == {"object": "list", "data": [card]}
    assert (card["id"], card["object"], card["max_model_len"]) == ("org/tiny", "model", 2048)
    assert "/models/tiny" not in str(body)


@pytest.mark.parametrize(
    "fields", [{"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}]
)
async def test_tokenize(fields: dict[str, Any]) -> None:
    async with serving() as served:
        response = await served.client.post("/tokenize", json=fields)
        assert await response.json() == {
            "count": 3,
            "max_model_len": 2048,
            "tokens": [7, 8, 9],
            "token_strs": None,
        }
        fields["return_token_strs"] = True
        response = await served.client.post("/tokenize", json=fields)
        assert (await response.json())["token_strs"] == ["a", "b", "c"]
        assert len(served.pipeline.of_kind(Tokenize)) == 2
        assert served.gateway.core.num_open == 0


async def test_detokenize() -> None:
    async with serving() as served:
        response = await served.client.post("/detokenize", json={"tokens": [4, 5]})
        assert await response.json() == {"prompt": "4 5"}


async def test_version_and_state() -> None:
    async with serving() as served:
        version = await (await served.client.get("/version")).json()
        assert list(version) == ["version"]
        served.gateway.on_group_state(group_state(5, queue_len=3))
        state = await (await served.client.get("/debug/state")).json()
    assert state["stages"][2]["stage"] == "scheduler"
    assert state["stages"][2]["queue_len"] == 3
    assert (state["gateway"]["num_open"], state["gateway"]["epoch"]) == (0, 1)


def test_the_c_parser_is_there() -> None:
    assert has_c_parser()


async def test_one_event_a_step_for_a_client_that_keeps_up() -> None:
    async with serving(silence) as served:
        call = asyncio.ensure_future(served.complete(stream=True))
        generate = await served.pipeline.receive(Generate)
        steps = [
            text_outputs(1, (generate.request_id, [index], f"{index}", 0)) for index in range(3)
        ]
        served.gateway.on_messages(steps[:1])
        response = await call
        lines = [await response.content.readline(), await response.content.readline()]
        for step in steps[1:]:
            served.gateway.on_messages([step])
            lines += [await response.content.readline(), await response.content.readline()]
        last = text_outputs(1, (generate.request_id, [9], "", FinishReason.STOP))
        served.gateway.on_messages([last])
        await response.read()
    assert [b'"text":"%d"' % index in line for index, line in enumerate(lines[::2])] == [True] * 3


async def test_what_piles_up_becomes_one_event() -> None:
    async with serving(silence) as served:
        call = asyncio.ensure_future(served.complete(stream=True))
        generate = await served.pipeline.receive(Generate)
        served.gateway.on_messages(
            [
                text_outputs(1, (generate.request_id, [1], "a", 0)),
                text_outputs(1, (generate.request_id, [2], "b", 0)),
                text_outputs(1, (generate.request_id, [3], "c", FinishReason.STOP)),
            ]
        )
        (chunk, _) = await events(await call)
    assert chunk["choices"][0]["text"] == "abc"
