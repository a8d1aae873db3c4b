"""Several gateways in a real group: clients are dealt among them; each dies alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
import pytest

from stages.topology import gateway_names
from tests.process.group import Group, metric, serving

NUM_GATEWAYS = 3
# So many that no gateway gets all of them or none, but once in 10^6 times.
NUM_CLIENTS = 36
MAX_TOKENS = 60
# How many chunks all streams together have seen when a gateway is killed.
CHUNKS_BEFORE_KILL = 300


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    with serving(tmp_path / "run", "--gateways", str(NUM_GATEWAYS)) as group:
        yield group


def stream(group: Group, index: int, on_chunk: Callable[[], object]) -> str | None:
    """The text for a client of its own connection; None if its gateway died."""
    body = {
        "model": "headrace-embedded",
        "prompt": f"Tell me a story about {index} stars.",
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    url = f"{group.url}/v1/completions"
    request = Request(url, msgspec.json.encode(body), {"Content-Type": "application/json"})
    text, is_done = "", False
    with suppress(ConnectionError, HTTPException), urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                text += msgspec.json.decode(line[6:])["choices"][0]["text"]
                on_chunk()
            is_done |= line == b"data: [DONE]\n"
    return text if is_done else None


def run_clients(group: Group, on_chunk: Callable[[], object] = lambda: None) -> list[str | None]:
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        indices = range(NUM_CLIENTS)
        return list(pool.map(lambda index: stream(group, index, on_chunk), indices))


def requests_ended(group: Group) -> list[int]:
    """What each gateway has told of itself."""
    stages = [group.stage(name) for name in gateway_names(NUM_GATEWAYS)]
    return [int(stage["stats"].get("requests_ended_total", 0)) for stage in stages]


def test_clients_are_dealt_among_the_gateways_and_counted_together(group: Group) -> None:
    assert all(run_clients(group))
    deadline = time.monotonic() + 30
    while sum(ended := requests_ended(group)) < NUM_CLIENTS:  # a heartbeat a second tells it
        assert time.monotonic() < deadline, ended
    assert sum(ended) == NUM_CLIENTS
    assert all(ended)
    finished = 0.0
    while finished < NUM_CLIENTS:
        assert time.monotonic() < deadline, finished
        with urlopen(f"{group.url}/metrics") as answer:
            finished = metric(answer.read().decode(), "vllm:request_success_total")
    assert finished == NUM_CLIENTS


def test_a_dead_gateway_takes_only_its_own_clients_with_it(group: Group) -> None:
    undisturbed = run_clients(group)
    assert None not in undisturbed
    lock, chunks = threading.Lock(), iter(range(1, NUM_CLIENTS * MAX_TOKENS + 1))

    def kill_once() -> None:
        with lock:
            is_time = next(chunks) == CHUNKS_BEFORE_KILL
        if is_time:
            group.kill("gateway-1")

    texts = run_clients(group, kill_once)
    kept = [text for text in texts if text is not None]
    assert 0 < len(kept) < NUM_CLIENTS
    assert all(text in (None, whole) for text, whole in zip(texts, undisturbed, strict=True))
    assert run_clients(group) == undisturbed
