"""A load client for any OpenAI-compatible server that costs far less CPU than the server.

Streams /v1/completions over raw asyncio protocols: it counts server-sent events in the bytes as
they come and parses nothing until an answer has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, pstdev
from urllib.parse import urlsplit

import uvloop

REQUEST_TIMEOUT_S = 600.0
OK = b"HTTP/1.1 200"
EVENT_END = b"\n\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"
TRAILING_EVENTS = 2
"""The event with the usage and `[DONE]`: they end an answer and bring no token."""
TAIL_BYTES = 2048
"""What is kept of an answer: enough for its last two events."""

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_ENDED_BY_LENGTH = re.compile(rb'"finish_reason":\s*"length"')
_FLAG_HELP = {
    "concurrency": "connections, each with one request at a time",
    "num_requests": "requests in all",
    "prompt_tokens": "random token ids a prompt",
    "max_tokens": "tokens an answer; all are generated (ignore_eos)",
    "temperature": "0: greedy",
    "top_p": "nucleus",
    "vocab_size": "prompt ids are below it",
    "seed": "of the prompts",
    "prompts": "JSON file with a list of prompts, texts or token ids, to ask instead",
    "extra": "JSON object that goes into every request, over what else is there",
}


@dataclass(frozen=True)
class Load:
    """What is asked of a server; the same load with the same seed asks the same."""

    concurrency: int = 8
    num_requests: int = 32
    prompt_tokens: int = 32
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    vocab_size: int = 32768
    seed: int = 0
    prompts: str = ""
    extra: str = ""


@dataclass(slots=True)
class Answer:
    """One streamed answer: moments in ns of one clock, and the gaps between its events.

    A read that brings k events brings k gaps, all but the first of them 0: so a client sees them.
    """

    sent_ns: int
    first_ns: int = 0
    last_ns: int = 0
    num_tokens: int = 0
    gaps_ns: list[int] = field(default_factory=list)

    @property
    def ttft_ns(self) -> int:
        """Time to the first event."""
        return self.first_ns - self.sent_ns

    @property
    def tpot_ns(self) -> float:
        """Time an output token after the first, whatever the events' grouping."""
        return (self.last_ns - self.first_ns) / (self.num_tokens - 1)


class AnswerReader(asyncio.Protocol):
    """Reads the answers of one connection, one at a time, counting events only.

    The number of tokens is the server's own count (`usage`), because one event may hold several.
    A server that streams no usage has still given `max_tokens` if it says that this was the end.
    """

    def __init__(self, max_tokens: int = 0) -> None:
        self._max_tokens = max_tokens
        self.answer = Answer(0)
        self.ended: asyncio.Future[bool] | None = None
        self._tail = b""
        self._events_ns: list[int] = []

    def begin(self, ended: asyncio.Future[bool]) -> None:
        """Expect the answer to a request that is sent now; `ended` says whether it was whole."""
        self.answer = Answer(time.perf_counter_ns())
        self.ended = ended
        self._tail = b""
        self._events_ns.clear()

    @property
    def has_begun(self) -> bool:
        """Whether something of the answer has come."""
        return bool(self._tail)

    def data_received(self, data: bytes) -> None:
        """Take some bytes of an answer."""
        now = time.perf_counter_ns()
        if not self._tail and not data.startswith(OK):
            self._tail = data[-TAIL_BYTES:]
            self._end(False)
            return
        num_events = data.count(EVENT_END)
        if data[0] == 10 and self._tail.endswith(b"\n"):
            num_events += 1  # an event's end came in two reads
        self._events_ns.extend([now] * num_events)
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if self._tail.endswith(LAST_CHUNK):
            self._end(self._sum_up())

    def connection_lost(self, error: Exception | None) -> None:
        """The answer that was going on, if one was, has failed."""
        self._end(False)

    def _sum_up(self) -> bool:
        moments = self._events_ns[:-TRAILING_EVENTS]
        num_tokens = self._count_tokens()
        if not num_tokens or not moments:
            return False
        answer = self.answer
        answer.num_tokens = num_tokens
        answer.first_ns, answer.last_ns = moments[0], moments[-1]
        answer.gaps_ns = [b - a for a, b in pairwise(moments)]
        return True

    def _count_tokens(self) -> int:
        if counts := _COMPLETION_TOKENS.findall(self._tail):
            return int(counts[-1])
        return self._max_tokens if _ENDED_BY_LENGTH.search(self._tail) else 0

    def _end(self, is_whole: bool) -> None:
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(is_whole)


class Client:
    """Asks one server, `load.concurrency` requests at a time."""

    def __init__(self, host: str, port: int, model: str, load: Load) -> None:
        self._host, self._port, self._load = host, port, load
        self._requests = make_requests(host, model, load)
        self.answers: list[Answer] = []
        self.num_failed = 0

    async def run(self) -> float:
        """Ask everything; returns the seconds from the first request to the last answer's end."""
        connections = await asyncio.gather(
            *(self._connect() for _ in range(self._load.concurrency))
        )
        started = time.perf_counter()
        await asyncio.gather(*(self._work(*connection) for connection in connections))
        return time.perf_counter() - started

    async def _connect(self) -> tuple[asyncio.Transport, AnswerReader]:
        return await asyncio.get_running_loop().create_connection(
            lambda: AnswerReader(self._load.max_tokens), self._host, self._port
        )

    async def _work(self, transport: asyncio.Transport, reader: AnswerReader) -> None:
        for request in self._requests:
            if transport.is_closing():
                transport, reader = await self._connect()
            is_whole = await self._ask(transport, reader, request)
            if transport.is_closing() and not reader.has_begun:
                # Some servers hang up behind an answer, when the next request is on its way.
                transport, reader = await self._connect()
                is_whole = await self._ask(transport, reader, request)
            if is_whole:
                self.answers.append(reader.answer)
            else:
                self.num_failed += 1
                transport.abort()  # whatever is left of that answer must not be read as the next
        transport.close()

    async def _ask(
        self, transport: asyncio.Transport, reader: AnswerReader, request: bytes
    ) -> bool:
        ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        reader.begin(ended)
        transport.write(request)
        return await self._is_whole(ended)

    async def _is_whole(self, ended: asyncio.Future[bool]) -> bool:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                return await ended
        except TimeoutError:
            return False


def make_requests(host: str, model: str, load: Load) -> Iterator[bytes]:
    """Yield whole HTTP requests, made before the clock starts.

    They carry no seed: some servers draw seeded requests one by one, and few clients seed theirs.
    """
    bodies = [
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": load.max_tokens,
            "temperature": load.temperature,
            "top_p": load.top_p,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(json.loads(load.extra) if load.extra else {}),
        }
        for prompt in _prompts(load)
    ]
    return iter([_post(host, json.dumps(body).encode()) for body in bodies])


def _prompts(load: Load) -> list[str | list[int]]:
    if load.prompts:
        prompts: list[str | list[int]] = json.loads(Path(load.prompts).read_text())
        return prompts
    rng = random.Random(load.seed)
    return [
        [rng.randrange(load.vocab_size) for _ in range(load.prompt_tokens)]
        for _ in range(load.num_requests)
    ]


def _post(host: str, body: bytes) -> bytes:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def served_model(host: str, port: int) -> str:
    """Ask the server for the name of its first model."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    _, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    name: str = json.loads(body)["data"][0]["id"]
    return name


def summarize(answers: Sequence[Answer], num_failed: int, duration_s: float) -> dict[str, float]:
    """Give the figures of a run: times in milliseconds, throughput in tokens a second."""
    num_tokens = sum(answer.num_tokens for answer in answers)
    result: dict[str, float] = {
        "successful": len(answers),
        "failed": num_failed,
        "duration_s": duration_s,
        "output_tokens": num_tokens,
        "events": sum(len(answer.gaps_ns) + 1 for answer in answers),
        "tokens_per_s": num_tokens / duration_s,
    }
    ttft = [answer.ttft_ns / 1e6 for answer in answers]
    tpot = [answer.tpot_ns / 1e6 for answer in answers if answer.num_tokens > 1]
    gaps = [gap / 1e6 for answer in answers for gap in answer.gaps_ns]
    for name, values in (("ttft_ms", ttft), ("tpot_ms", tpot), ("itl_ms", gaps)):
        if values:
            result |= {
                f"{name}_mean": fmean(values),
                f"{name}_p50": median(values),
                f"{name}_p99": percentile(values, 0.99),
                f"{name}_std": pstdev(values),
            }
    return result


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


async def measure(url: str, load: Load, model: str | None = None) -> dict[str, float]:
    """Put `load` on the server at `url`; returns `summarize`'s figures."""
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    client = Client(host, port, model or await served_model(host, port), load)
    duration_s = await client.run()
    return summarize(client.answers, client.num_failed, duration_s)


def main() -> int:
    """Print the figures; the exit code is 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="name of the model (default: the server's first)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    for name, default in vars(Load()).items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            default=default,
            help=f"{_FLAG_HELP[name]} (default: {default})",
        )
    arguments = vars(parser.parse_args())
    url, model, as_json = (arguments.pop(name) for name in ("url", "model", "json"))
    result = uvloop.run(measure(url, Load(**arguments), model))
    if as_json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:<16} {value:>12,.2f}" for name, value in result.items()))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
