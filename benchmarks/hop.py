"""What one hop between two processes costs: the ring against ZMQ, blocking and on an event loop.

Measures, for each contender, the round trip of a small message (p50, p99) and the one-way rate.
The contenders take turns for several rounds on one machine and the table shows medians over the
rounds, so that a noisy minute hits all of them alike.
"""

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import uvloop
import zmq
import zmq.asyncio

from shm import (
    RingDescriptors,
    RingReader,
    RingWriter,
    create_ring,
    create_socket_pair,
    receive_message,
    send_message,
)

DEADLINE_S = 30.0
NUM_SLOTS = 64
ECHO, COUNT, ACKNOWLEDGE, QUIT = b"e", b"c", b"a", b"q"  # first byte of a message


class Link(Protocol):
    """Both directions between this process and its peer.

    A blocking link never suspends in its coroutines, so no event loop takes part in them.
    """

    async def send(self, payload: bytes) -> None: ...

    async def receive(self) -> bytes: ...


class BlockingRing:
    """Two rings, waited on in `poll`."""

    def __init__(self, outgoing: RingDescriptors, incoming: RingDescriptors) -> None:
        self.writer = RingWriter(outgoing, epoch=1)
        self.reader = RingReader(incoming, 0, epoch=1)

    async def send(self, payload: bytes) -> None:
        self.writer.put(payload, DEADLINE_S)

    async def receive(self) -> bytes:
        return self.reader.get(DEADLINE_S)


class AsyncRing(BlockingRing):
    """Two rings, waited on by the event loop."""

    def __init__(self, outgoing: RingDescriptors, incoming: RingDescriptors) -> None:
        super().__init__(outgoing, incoming)
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self.reader.fileno(), self.on_readable)
        self.waiter: asyncio.Future[bytes | None] | None = None

    def on_readable(self) -> None:
        if self.waiter is not None:
            self.waiter.set_result(self.reader.get_nowait())
            self.waiter = None

    async def receive(self) -> bytes:
        payload = self.reader.get_nowait()
        while payload is None:
            self.waiter = self.loop.create_future()
            payload = await self.waiter
        return payload


class BlockingZmq:
    """A PUSH and a PULL socket over ipc."""

    def __init__(self, outgoing: str, incoming: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.push, self.pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self.pull.bind(incoming)
        self.push.connect(outgoing)

    async def send(self, payload: bytes) -> None:
        self.push.send(payload)

    async def receive(self) -> bytes:
        return self.pull.recv()


class AsyncZmq:
    """The same over zmq.asyncio."""

    def __init__(self, outgoing: str, incoming: str) -> None:
        context = zmq.asyncio.Context.instance()
        self.push, self.pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self.pull.bind(incoming)
        self.push.connect(outgoing)

    async def send(self, payload: bytes) -> None:
        await self.push.send(payload)

    async def receive(self) -> bytes:
        return await self.pull.recv()


RINGS: dict[str, Callable[[RingDescriptors, RingDescriptors], Link]] = {
    "ring, blocking": BlockingRing,
    "ring, uvloop add_reader": AsyncRing,
}
SOCKETS: dict[str, Callable[[str, str], Link]] = {
    "zmq ipc, blocking": BlockingZmq,
    "zmq.asyncio, uvloop": AsyncZmq,
}


@dataclass
class Sample:
    """One contender's numbers of one round, or their medians."""

    p50_us: float
    p99_us: float
    messages_per_s: float


def open_link(name: str, directory: str, control: socket.socket) -> Link:
    """Start the peer's half over `control` and return this process's half."""
    send_message(control, json.dumps([name, directory]).encode())
    if name in SOCKETS:
        return SOCKETS[name](f"ipc://{directory}/{name}-there", f"ipc://{directory}/{name}-here")
    with (
        create_ring("there", ["peer"], 4096, NUM_SLOTS) as there,
        create_ring("here", ["main"], 4096, NUM_SLOTS) as here,
        there.for_reader(0) as peer_reader,
        here.for_writer() as peer_writer,
    ):
        send_message(control, *peer_reader.to_wire())
        send_message(control, *peer_writer.to_wire())
        return RINGS[name](there.for_writer(), here.for_reader(0))


def accept_link(control: socket.socket) -> Link:
    """The peer's half."""
    name, directory = json.loads(receive_message(control)[0])
    if name in SOCKETS:
        return SOCKETS[name](f"ipc://{directory}/{name}-here", f"ipc://{directory}/{name}-there")
    incoming = RingDescriptors.from_wire(*receive_message(control))
    outgoing = RingDescriptors.from_wire(*receive_message(control))
    return RINGS[name](outgoing, incoming)


async def serve_peer(control: socket.socket) -> None:
    """Echo, count or acknowledge, as the first byte of each message says, until QUIT."""
    link = accept_link(control)
    num_counted = 0
    while True:
        message = await link.receive()
        kind = message[:1]
        if kind == COUNT:
            num_counted += 1
        elif kind == ECHO:
            await link.send(message)
        elif kind == ACKNOWLEDGE:
            await link.send(str(num_counted).encode())
            num_counted = 0
        elif kind == QUIT:
            return


async def measure(link: Link, size: int, num_round_trips: int, num_messages: int) -> Sample:
    """One round of one contender, with messages of `size` bytes."""
    echo, count = ECHO * size, COUNT * size
    times_ns = []
    for _ in range(num_round_trips):
        start = time.perf_counter_ns()
        await link.send(echo)
        await link.receive()
        times_ns.append(time.perf_counter_ns() - start)
    start = time.perf_counter_ns()
    for _ in range(num_messages):
        await link.send(count)
    await link.send(ACKNOWLEDGE)
    assert int(await link.receive()) == num_messages
    seconds = (time.perf_counter_ns() - start) / 1e9
    cuts = statistics.quantiles(times_ns, n=100)
    return Sample(cuts[49] / 1e3, cuts[98] / 1e3, num_messages / seconds)


async def compare(options: argparse.Namespace, stack: ExitStack) -> dict[str, Sample]:
    """Medians over `options.rounds` rounds in which the contenders take turns."""
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    links = {name: open_link(name, directory, start_peer(stack)) for name in (*RINGS, *SOCKETS)}
    samples: dict[str, list[Sample]] = {name: [] for name in links}
    for link in links.values():
        await measure(link, options.size, 200, 200)  # warm up
    for _ in range(options.rounds):
        for name, link in links.items():
            samples[name].append(
                await measure(link, options.size, options.round_trips, options.messages)
            )
    for link in links.values():
        await link.send(QUIT)
    return {name: median(rounds) for name, rounds in samples.items()}


def start_peer(stack: ExitStack) -> socket.socket:
    """Start a peer process; `stack` waits for its end."""
    here, there = create_socket_pair()
    stack.enter_context(here)
    with there:
        command = [sys.executable, __file__, "--peer", str(there.fileno())]
        process = subprocess.Popen(command, pass_fds=[there.fileno()])
    stack.callback(process.wait, DEADLINE_S)
    return here


def median(rounds: list[Sample]) -> Sample:
    """Field by field."""
    columns = zip(*(asdict(sample).values() for sample in rounds), strict=True)
    return Sample(*(statistics.median(column) for column in columns))


def print_table(results: dict[str, Sample]) -> None:
    """Contenders as rows of a Markdown table."""
    print("| contender | round trip p50 us | p99 us | one way, messages/s |")
    print("| --- | ---: | ---: | ---: |")
    for name, sample in results.items():
        print(
            f"| {name} | {sample.p50_us:.1f} | {sample.p99_us:.1f} | {sample.messages_per_s:,.0f} |"
        )


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="bytes of a message")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-trips", type=int, default=2000, help="in each round")
    parser.add_argument("--messages", type=int, default=10_000, help="one way, in each round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the comparison, or the peer of one."""
    options = parse_options()
    if options.peer is not None:
        with socket.socket(fileno=options.peer) as control:
            uvloop.run(serve_peer(control))
        return
    with ExitStack() as stack:
        results = uvloop.run(compare(options, stack))
    print_table(results)
    if options.json:
        facts = {"cpus": os.cpu_count(), "machine": platform.machine(), "size": options.size}
        numbers = {name: asdict(sample) for name, sample in results.items()}
        options.json.write_text(json.dumps(facts | {"contenders": numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
