"""The load of a benchmark: endless streams, counted and not parsed, in a process of its own.

Speaks to its parent in lines: says `steady` once every stream flows; from `measure` on it notes
the gaps between events; at the end of its input it hangs up and says what it saw, as JSON.
"""

from __future__ import annotations

import gc
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from urllib.parse import urlsplit

import msgspec
import numpy as np

from stages.errors import HeadraceError

EVENT = b"data: "
LAST_EVENT = b"data: [DONE]"
# As the group under measurement serves it.
MODEL_NAME = "bench"
READ_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 60.0
# Of each stream, before the load is steady: the first comes from a prefill.
STEADY_EVENTS = 3


class StreamFigures(msgspec.Struct, frozen=True):
    """What a client saw while it measured; the gaps are those between events of one stream."""

    num_events: int = 0
    itl_ms_p50: float = 0.0
    itl_ms_p99: float = 0.0
    itl_ms_std: float = 0.0


class Client:
    """The parent's side: `batch` streams of at most `max_tokens` tokens each, again and again.

    `fields`: what every request says besides.
    """

    def __init__(
        self, url: str, batch: int, max_tokens: int, fields: Mapping[str, object] | None = None
    ) -> None:
        command = [sys.executable, "-m", "stages.bench.client", url, str(batch), str(max_tokens)]
        command.append(msgspec.json.encode(fields or {}).decode())
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_steady(self) -> None:
        """Wait until every stream flows; raises `HeadraceError` if the server refuses."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != b"steady":
            self._process.wait()
            raise HeadraceError("the load client failed; see its last words above")

    def measure(self) -> None:
        """Note gaps from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"measure\n")
        self._process.stdin.flush()

    def stop(self) -> StreamFigures:
        """End all streams and ask what was seen."""
        said, _ = self._process.communicate()
        if self._process.returncode != 0:
            raise HeadraceError("the load client failed; see its last words above")
        return msgspec.json.decode(said, type=StreamFigures)

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Stream:
    """One connection that asks the same again when an answer has ended."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.num_events = 0
        self.last_ns = 0
        self._is_accepted = False
        self._request = request
        self._tail = b""
        self.socket = socket.create_connection(address, CONNECT_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(request)

    def read(self) -> int:
        """Take what has come; returns how many events began in it."""
        data = self._tail + self.socket.recv(READ_BYTES)
        if len(data) == len(self._tail):
            raise HeadraceError(f"the server hung up: {data[-300:]!r}")
        if not self._is_accepted and not data.startswith(b"HTTP/1.1 200"):
            raise HeadraceError(f"the server refused: {data[:500]!r}")
        self._is_accepted = True
        if LAST_EVENT in data:
            # The rest of the answer is its last, empty chunk.
            self._tail = b""
            self.num_events = 0
            self.socket.sendall(self._request)
            return 0
        num_new = data.count(EVENT) - self._tail.count(EVENT)
        self._tail = data[-len(LAST_EVENT) :]  # may hold the beginning of an event
        self.num_events += num_new
        return num_new


def _request(host: str, index: int, max_tokens: int, fields: Mapping[str, object]) -> bytes:
    body = msgspec.json.encode(
        {
            "model": MODEL_NAME,
            "prompt": f"stream {index}",
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            # Weights without meaning may say nothing else, and every token has to show.
            "skip_special_tokens": False,
            "stream": True,
            **fields,
        }
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Load:
    """All streams, driven by one selector."""

    def __init__(self, url: str, batch: int, max_tokens: int, fields: Mapping[str, object]) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._address = (parts.hostname, parts.port)
        self._selector = selectors.DefaultSelector()
        self._streams = [
            Stream(self._address, _request(parts.netloc, index, max_tokens, fields))
            for index in range(batch)
        ]
        for stream in self._streams:
            self._selector.register(stream.socket, selectors.EVENT_READ, stream)
        self._num_unsteady = batch
        self._gaps_ns: list[int] = []
        self._is_measuring = False

    def run(self, orders: FileIO) -> None:
        self._selector.register(orders, selectors.EVENT_READ)
        while True:
            ready = self._selector.select(STALL_TIMEOUT_S)
            if not ready:
                raise HeadraceError(f"no stream moved for {STALL_TIMEOUT_S:.0f} s")
            for key, _ in ready:
                if key.data is not None:
                    self._read(key.data)
                elif orders.readline():
                    self._is_measuring = True
                else:
                    return

    def figures(self) -> StreamFigures:
        if not self._gaps_ns:
            return StreamFigures()
        gaps = np.array(self._gaps_ns) / 1e6
        p50, p99 = np.percentile(gaps, [50, 99]).tolist()
        return StreamFigures(len(gaps), p50, p99, float(gaps.std()))

    def _read(self, stream: Stream) -> None:
        before = stream.num_events
        num_new = stream.read()
        now_ns = time.monotonic_ns()
        if before < STEADY_EVENTS <= stream.num_events and self._num_unsteady:
            self._num_unsteady -= 1
            if self._num_unsteady == 0:
                print("steady", flush=True)
        if self._is_measuring and num_new and before:
            self._gaps_ns.append(now_ns - stream.last_ns)
            self._gaps_ns.extend([0] * (num_new - 1))  # came together: no gap between them
        if num_new:
            stream.last_ns = now_ns


def main(url: str, batch: int, max_tokens: int, fields: Mapping[str, object]) -> int:
    """Run until the input ends."""
    gc.disable()  # nothing here is a cycle, and a collection would look like the server's pause
    try:
        load = _Load(url, batch, max_tokens, fields)
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as orders:
            load.run(orders)
    except (HeadraceError, OSError) as error:
        print(f"load client: {error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(load.figures()).decode())
    return 0


if __name__ == "__main__":
    own_fields = msgspec.json.decode(sys.argv[4], type=dict[str, object])
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), own_fields))
