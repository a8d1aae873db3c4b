"""The load client of the benchmarks against a scripted server: it must count right."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import (
    AnswerReader,
    Client,
    Load,
    make_requests,
    measure,
    percentile,
    summarize,
)
from benchmarks.server import tree_cpu_seconds

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"X-Request-Id: abc0\r\n\r\n"  # looks like the end of a chunked body, and is none
)
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def chunk(*events: str) -> bytes:
    """One HTTP chunk with these events."""
    data = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def piece(text: str) -> str:
    """An event with some text."""
    return json.dumps({"choices": [{"index": 0, "text": text}], "usage": None})


def usage(num_tokens: int) -> str:
    """The event that ends an answer."""
    return json.dumps({"choices": [], "usage": {"completion_tokens": num_tokens}})


def answer(num_events: int, num_tokens: int, merged: int = 1) -> bytes:
    """A whole answer of `num_events` events, `merged` of them in a chunk."""
    events = [piece(f"w{index} \n\n") for index in range(num_events)]
    chunks = [chunk(*events[i : i + merged]) for i in range(0, num_events, merged)]
    return HEAD + b"".join(chunks) + chunk(usage(num_tokens)) + chunk("[DONE]") + LAST_CHUNK


@asynccontextmanager
async def serving(*answers: bytes, cuts_off: bool = False) -> AsyncIterator[int]:
    """Give `answers` to requests in the order of arrival, over and over; yields the port."""
    served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            assert body["ignore_eos"] and body["stream_options"]["include_usage"]
            writer.write(answers[served % len(answers)])
            served += 1
            if cuts_off:
                break
        writer.close()

    async def until_left(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(until_left, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def run(port: int, load: Load) -> Client:
    """Put a load on a scripted server."""
    client = Client("127.0.0.1", port, "m", load)
    await client.run()
    return client


async def test_tokens_are_the_servers_count_though_events_merge_them() -> None:
    async with serving(answer(num_events=4, num_tokens=16)) as port:
        figures = await measure(f"http://127.0.0.1:{port}", Load(2, 6), "m")
    assert figures["successful"] == 6
    assert figures["failed"] == 0
    assert figures["output_tokens"] == 6 * 16
    assert figures["events"] == 6 * 4
    assert figures["tokens_per_s"] == pytest.approx(96 / figures["duration_s"])


async def test_a_gap_for_each_event_behind_the_first() -> None:
    async with serving(answer(num_events=7, num_tokens=7, merged=3)) as port:
        client = await run(port, Load(1, 2))
    assert [len(one.gaps_ns) for one in client.answers] == [6, 6]
    for one in client.answers:
        assert one.sent_ns < one.first_ns <= one.last_ns
        assert sum(one.gaps_ns) == one.last_ns - one.first_ns


async def test_refused_requests_fail_and_the_others_go_on() -> None:
    async with serving(answer(3, 3), REFUSAL) as port:
        client = await run(port, Load(1, 4))
    assert len(client.answers) == 2
    assert client.num_failed == 2


@pytest.mark.parametrize("end", [len(HEAD) - 1, len(HEAD) + 20, -len(LAST_CHUNK)])
async def test_an_answer_that_is_cut_off_fails(end: int) -> None:
    async with serving(answer(3, 3)[:end], cuts_off=True) as port:
        client = await run(port, Load(1, 2))
    assert client.num_failed == 2
    assert client.answers == []


async def test_a_server_that_hangs_up_behind_every_answer_is_asked_anew() -> None:
    async with serving(answer(3, 3), cuts_off=True) as port:
        client = await run(port, Load(2, 8))
    assert client.num_failed == 0
    assert len(client.answers) == 8


async def test_without_usage_an_end_by_length_means_all_tokens() -> None:
    end = json.dumps({"choices": [{"text": "", "finish_reason": "length"}]})
    stop = end.replace("length", "stop")
    whole, stopped = (
        HEAD + chunk(piece("a"), piece("b"), each, "[DONE]") + LAST_CHUNK for each in (end, stop)
    )
    async with serving(whole, stopped) as port:
        client = await run(port, Load(1, 2, max_tokens=5))
    assert [one.num_tokens for one in client.answers] == [5]
    assert client.num_failed == 1


def test_prompts_of_a_file_and_extra_fields_go_into_the_requests(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["some text", [1, 2, 3]]))
    load = Load(prompts=str(file), extra='{"temperature": 1, "top_k": 1}')
    bodies = [
        json.loads(request.partition(b"\r\n\r\n")[2]) for request in make_requests("h", "m", load)
    ]
    assert [body["prompt"] for body in bodies] == ["some text", [1, 2, 3]]
    assert all(body["temperature"] == 1 and body["top_k"] == 1 for body in bodies)


@given(st.data())
def test_no_split_of_the_bytes_changes_the_count(data: st.DataObject) -> None:
    num_events = data.draw(st.integers(1, 6))
    whole = answer(num_events, num_tokens=9, merged=data.draw(st.integers(1, 3)))
    # The status line comes in one piece: servers write it with the head.
    cuts = sorted(data.draw(st.sets(st.integers(12, len(whole) - 1), max_size=8)))
    bounds = [0, *cuts, len(whole)]
    loop = asyncio.new_event_loop()
    try:
        reader = AnswerReader()
        ended = loop.create_future()
        reader.begin(ended)
        for start, end in pairwise(bounds):
            assert not ended.done()
            reader.data_received(whole[start:end])
        assert ended.result() is True
    finally:
        loop.close()
    assert len(reader.answer.gaps_ns) == num_events - 1
    assert reader.answer.num_tokens == 9


async def test_the_same_load_asks_the_same() -> None:
    load = Load(1, 3, prompt_tokens=5, vocab_size=50, seed=7)
    first, second, other = (
        list(Client("h", 1, "m", each)._requests)
        for each in (load, load, Load(1, 3, prompt_tokens=5, vocab_size=50, seed=8))
    )
    assert first == second != other
    prompt = json.loads(first[0].partition(b"\r\n\r\n")[2])["prompt"]
    assert len(prompt) == 5 and max(prompt) < 50


@given(st.lists(st.integers(), min_size=1), st.floats(0.01, 1.0))
def test_percentile(values: list[int], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_nothing_answered_is_no_error() -> None:
    assert summarize([], 3, 1.0)["failed"] == 3


def test_cpu_time_counts_children_that_live_and_children_that_ended() -> None:
    burn = "import sys, time\nwhile time.process_time() < 0.3: pass\n"
    stay = burn + "print('spent', flush=True)\nsys.stdin.read()"
    script = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stay!r}], stdin=subprocess.PIPE)\n"
        "child.wait()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        spent = tree_cpu_seconds(process.pid)
        process.kill()
    assert 0.5 <= spent < 5
    assert tree_cpu_seconds(process.pid) == 0


def test_cpu_time_grows_with_work() -> None:
    before = tree_cpu_seconds(os.getpid())
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert tree_cpu_seconds(os.getpid()) - before >= 0.05
