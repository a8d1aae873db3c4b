"""Text that is written straight from its delivery: same bytes, same order, whoever writes them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.deliveries import Delta
from gateway_svc.inbox import Inbox
from gateway_svc.openai.chat import ChatWording
from gateway_svc.openai.completions import CompletionWording
from gateway_svc.openai.fields import ChatFields, CompletionFields
from gateway_svc.openai.outputs import Output
from gateway_svc.pacing import WritePacer
from gateway_svc.sse import EventTemplate, event
from stages.messages import AbortRequest, FinishReason, Generate, RequestRejected
from tests.unit.gateway_fakes import (
    Served,
    events,
    serving,
    silence,
    started,
    text_outputs,
)

BIG = "x" * 50_000
NUM_BIG = 200  # 10 MB: more than all buffers between server and client hold


def completion_wording() -> CompletionWording:
    """Of a plain streamed completion."""
    fields = CompletionFields(prompt=msgspec.Raw(b"[1]"), model="tiny", stream=True)
    return CompletionWording(fields, has_output=True)


def with_role(wording: ChatWording) -> ChatWording:
    """A chat wording that has told choice 2's role."""
    wording.chunks(Output(2, finish_reason=FinishReason.STOP), None)
    return wording


@given(st.text())
def test_a_filled_template_is_the_event_that_the_wording_makes(text: str) -> None:
    chat = with_role(ChatWording(ChatFields(messages=[], model="tiny", stream=True)))
    for wording in (completion_wording(), chat):
        document = wording.text_chunk(2)
        assert document is not None
        (chunk,) = wording.chunks(Output(2, _texts=[text or "x"]), None)
        assert EventTemplate(document).fill(text or "x") == event(chunk)


def test_no_template_before_the_role_and_with_logprobs() -> None:
    plain, logprobs = (ChatFields(messages=[], model="tiny", logprobs=has) for has in (None, True))
    assert ChatWording(plain).text_chunk(0) is None
    assert with_role(ChatWording(logprobs)).text_chunk(2) is None
    fields = CompletionFields(prompt=msgspec.Raw(b"[1]"), model="tiny", logprobs=1)
    assert CompletionWording(fields, has_output=True).text_chunk(0) is None


async def test_the_shortcut_never_overtakes_the_reader() -> None:
    inbox = Inbox(range(1, 2), max_backlog=10)
    offered: list[Delta] = []
    is_willing = False

    def shortcut(delta: Delta) -> bool:
        offered.append(delta)
        return is_willing

    deltas = [Delta(1, b"", str(index)) for index in range(5)]
    inbox.shortcut = shortcut
    inbox.put(deltas[0])  # nobody waits: the reader is at work on something older
    assert await inbox.take() == [deltas[0]] and not offered
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put(deltas[1])
    is_willing = True
    inbox.put(deltas[2])  # the reader has been woken, but has not run: deltas[1] is still its
    assert await reading == [deltas[1], deltas[2]] and offered == [deltas[1]]
    inbox.put(deltas[3])  # the reader has not come back
    assert await inbox.take() == [deltas[3]]
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put(deltas[4])
    assert offered == [deltas[1], deltas[4]] and not reading.done()
    inbox.put(RequestRejected(1, 1, 500, "c", "m"))
    assert len(await reading) == 1


async def test_only_first_and_last_event_wake_the_handler() -> None:
    async with serving() as served:
        taken = count_takes(served)
        response = await served.complete(stream=True, max_tokens=50)
        bodies = await events(response)
    assert [choice(body)["text"] for body in bodies[:-1]] == [f"w{i} " for i in range(50)]
    assert bodies[-1] == "[DONE]"
    assert len(taken) <= 4  # started, first token, last token


def count_takes(served: Served) -> list[int]:
    """Note each time that a handler takes its deliveries."""
    taken: list[int] = []
    original = served.gateway._open_inbox

    def open_inbox(count: int) -> Inbox:
        inbox = original(count)
        take = inbox.take

        async def counted() -> Any:
            items = await take()
            taken.append(len(items))
            return items

        inbox.take = counted  # type: ignore[method-assign]
        return inbox

    served.gateway._open_inbox = open_inbox  # type: ignore[method-assign]
    return taken


async def test_steps_that_come_at_once_make_one_event_and_keep_their_order() -> None:
    async with serving(silence) as served, raw_post(served, "1.1") as reader:
        request_id = (await served.pipeline.receive(Generate)).request_id
        texts = [f"w{index} " for index in range(9)]
        steps = [text_outputs(1, (request_id, [i], text, 0)) for i, text in enumerate(texts)]
        end = text_outputs(1, (request_id, [9], "end", FinishReason.LENGTH))
        served.gateway.on_messages(steps[:1])
        await reader.readuntil(b"w0 ")  # the handler has written and waits
        served.gateway.on_messages(steps[1:5])
        await reader.readuntil(b"w4 ")
        # The end goes through the handler, what stands before it does not.
        served.gateway.on_messages([*steps[5:], end])
        data = await reader.read()
    tail = data.partition(b"\r\n")[2]
    (event,) = decode(unchunk(tail))[:-1]
    assert choice(event)["text"] == "".join([*texts[5:], "end"])
    assert choice(event)["finish_reason"] == "length"


async def test_writes_that_take_long_make_text_wait_for_the_next_round() -> None:
    pacer = WritePacer()
    async with serving(silence, pacer=pacer) as served, raw_post(served, "1.1") as reader:
        request_id = (await served.pipeline.receive(Generate)).request_id

        def step(index: int) -> None:
            served.gateway.on_messages([text_outputs(1, (request_id, [index], f"w{index} ", 0))])

        step(0)
        await reader.readuntil(b"w0 ")
        now = time.perf_counter()
        pacer.observe(now, now + 1.0)
        step(1)
        step(2)
        step(3)
        data = await reader.readuntil(b"w3 ")
    assert b"w1 w2 w3 " in data


async def test_a_client_that_leaves_with_text_on_its_way_harms_nobody() -> None:
    async with serving(silence) as served:
        async with raw_post(served, "1.1") as reader:
            request_id = (await served.pipeline.receive(Generate)).request_id
            served.gateway.on_messages([text_outputs(1, (request_id, [0], "w0 ", 0))])
            await reader.readuntil(b"w0 ")
            inbox = served.gateway._routes[request_id].inbox
            served.gateway.on_messages([text_outputs(1, (request_id, [1], "w1 ", 0))])
            assert inbox.hang_up is not None
            inbox.hang_up()
        await served.pipeline.receive(AbortRequest)


@asynccontextmanager
async def raw_post(served: Served, version: str) -> AsyncIterator[asyncio.StreamReader]:
    """Ask for a stream over a bare socket; nothing is read until the caller does."""
    port = served.client.port
    assert port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    body = json.dumps({"model": "tiny", "prompt": "hi", "stream": True}).encode()
    writer.write(
        f"POST /v1/completions HTTP/{version}\r\nHost: h\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    yield reader
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_lags_and_catches_up_gets_everything_in_order() -> None:
    async with serving(silence) as served, raw_post(served, "1.1") as reader:
        generate = await served.pipeline.receive(Generate)
        request_id = generate.request_id
        served.gateway.on_messages([started(generate)])
        data = b""
        for index in range(NUM_BIG):
            output = (request_id, [index], f"{index:03}{BIG}", 0)
            served.gateway.on_messages([text_outputs(1, output)])
            if index < NUM_BIG // 2:
                await asyncio.sleep(0)
            else:  # twice as fast as more comes: the backlog has gone when the answer ends
                data += await reader.readexactly(2 * len(BIG))
        end = (request_id, [NUM_BIG], "end", FinishReason.LENGTH)
        served.gateway.on_messages([text_outputs(1, end)])
        data += await reader.read()
    body = data.partition(b"\r\n\r\n")[2]
    text = "".join(choice(each)["text"] for each in decode(unchunk(body))[:-1])
    assert text == "".join(f"{index:03}{BIG}" for index in range(NUM_BIG)) + "end"


async def test_http_1_0_has_no_chunks() -> None:
    async with serving() as served, raw_post(served, "1.0") as reader:
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert "".join(choice(each)["text"] for each in decode(body)[:-1]).startswith("w0 w1 w2 ")


def choice(body: Any) -> Any:
    """The only choice of an event."""
    (only,) = body["choices"]
    return only


def unchunk(body: bytes) -> bytes:
    """Undo the chunked encoding, strictly."""
    data = b""
    while True:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        if length == 0:
            assert rest == b"\r\n"
            return data
        data += rest[:length]
        body = rest[length + 2 :]


def decode(data: bytes) -> list[Any]:
    """The events of a stream, the last one `[DONE]`."""
    texts = data.decode().split("\n\n")
    assert texts.pop() == ""
    bodies = [text.removeprefix("data: ") for text in texts]
    assert bodies[-1] == "[DONE]"
    return [body if body == "[DONE]" else json.loads(body) for body in bodies]
