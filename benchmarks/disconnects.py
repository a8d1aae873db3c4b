"""Ten thousand clients that hang up at a random moment: afterwards every KV block must be free.

    python benchmarks/disconnects.py --url http://127.0.0.1:8000 [--clients 10000]

Prints what was done and what the server holds afterwards; exit code 1 if it holds anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from urllib.parse import urlsplit

CONCURRENCY = 64
HELD = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")


async def hang_up(host: str, port: int, model: str, seed: int) -> str:
    """Send one request and leave before, during or after its answer; says when."""
    rng = random.Random(seed)
    body = json.dumps(
        {
            "model": model,
            "prompt": "Tell me a story about "
            + rng.choice(["a fox", "a river", "the mill"]) * rng.randint(1, 20),
            "max_tokens": rng.randint(1, 200),
            "stream": rng.random() < 0.7,
            "n": rng.choice([1, 1, 1, 3]),
            "ignore_eos": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection(host, port)
    request = head + body
    moment = rng.choice(["while sending", "at once", "later", "while reading"])
    try:
        writer.write(
            request[: rng.randint(1, len(request))] if moment == "while sending" else request
        )
        await writer.drain()
        if moment == "later":
            await asyncio.sleep(rng.random() * 0.3)
        elif moment == "while reading":
            await reader.read(rng.randint(1, 4000))
    finally:
        writer.transport.abort()
    return moment


async def fetch(host: str, port: int, path: str) -> str:
    """GET a page of the server."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return text.partition("\r\n\r\n")[2]


def sample(metrics: str, name: str) -> float:
    """One metric's value, from the metrics' text."""
    found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", metrics, re.MULTILINE)
    assert found is not None, f"no metric {name}"
    return float(found.group(1))


async def wait_idle(host: str, port: int, timeout_s: float) -> dict[str, float]:
    """Wait until the server holds nothing, or the time is over; the figures are a second old."""
    deadline = time.monotonic() + timeout_s
    while True:
        await asyncio.sleep(1.5)
        state = json.loads(await fetch(host, port, "/debug/state"))
        metrics = await fetch(host, port, "/metrics")
        values = {name: sample(metrics, name) for name in HELD}
        values["open requests"] = state["gateway"]["num_open"]
        if not any(values.values()) or time.monotonic() > deadline:
            return values


async def main(url: str, clients: int) -> int:
    """Run; returns the exit code."""
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    model = json.loads(await fetch(host, port, "/v1/models"))["data"][0]["id"]
    gate = asyncio.Semaphore(CONCURRENCY)
    moments: dict[str, int] = {}

    async def one(seed: int) -> None:
        async with gate:
            moment = await hang_up(host, port, model, seed)
            moments[moment] = moments.get(moment, 0) + 1

    started = time.monotonic()
    await asyncio.gather(*(one(seed) for seed in range(clients)))
    print(f"{clients} clients hung up in {time.monotonic() - started:.1f} s: {moments}")
    values = await wait_idle(host, port, 60)
    print("the server holds:", values)
    num_tokens = sample(await fetch(host, port, "/metrics"), "vllm:generation_tokens_total")
    print(f"it generated {num_tokens:.0f} tokens for them")
    return 1 if any(values.values()) or num_tokens == 0 else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=10_000)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.url, arguments.clients)))
