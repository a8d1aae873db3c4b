"""What rows that lag cost the others: streams with and without `bad_words` behind one device.

A group with the emulated device serves `--batch` streams, some of which have a bad word of several
tokens. Prints the device's busy share, and the gaps between tokens of those streams and of the
others.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from stages.bench.client import MODEL_NAME, Client, StreamFigures
from stages.bench.group import BenchGroup, serving
from stages.topology import EXECUTOR
from stages.trace import What, read_trace

MAX_MODEL_LEN = 64 * 1024
MAX_TOKENS = MAX_MODEL_LEN - 64
# Several tokens, of which the device never says the first: so tokens stay the same.
BAD_WORDS = {"bad_words": ["\N{SNOWMAN}\N{SNOWMAN}"]}
HEADING = (
    f"{'lagging':>8} {'others':>7} {'busy':>7} {'idle us p99':>12}   "
    f"{'others: ITL ms p50 / p99 / std':>31}   {'lagging: ITL ms p50 / p99 / std':>32}"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each number of lagging streams in turn, `--rounds` times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="streams in all")
    parser.add_argument("--lagging", default="0,8,32", help="how many of them lag")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(argv)
    arguments = {
        "--served-model-name": MODEL_NAME,
        "--device": "emulated",
        "--emulated-step-ms": options.step_ms,
        "--max-num-seqs": options.batch,
        "--max-model-len": MAX_MODEL_LEN,
    }
    print(HEADING)
    with serving([str(word) for setting in arguments.items() for word in setting]) as group:
        for _ in range(options.rounds):
            for num_lagging in map(int, options.lagging.split(",")):
                measure(group, num_lagging, options.batch - num_lagging, options.seconds)
    return 0


def measure(group: BenchGroup, num_lagging: int, num_others: int, seconds: float) -> None:
    """Print one line: a window in which all streams flow."""
    with ExitStack() as stack:
        clients = []
        for num_streams, fields in ((num_others, {}), (num_lagging, BAD_WORDS)):
            if num_streams:
                clients.append(Client(group.url, num_streams, MAX_TOKENS, fields))
                stack.callback(clients[-1].kill)
        for client in clients:
            client.wait_steady()
            client.measure()
        start_ns = time.time_ns()
        time.sleep(seconds)
        busy, idle_us = device_figures(group.pids[EXECUTOR], start_ns, time.time_ns())
        figures = [client.stop() for client in clients]
    others = figures.pop(0) if num_others else StreamFigures()
    lagging = figures.pop(0) if num_lagging else StreamFigures()
    print(
        f"{num_lagging:>8} {num_others:>7} {busy:>7.2%} {idle_us:>12.0f}   "
        f"{gaps(others):>31}   {gaps(lagging):>32}",
        flush=True,
    )


def device_figures(pid: int, start_ns: int, end_ns: int) -> tuple[float, float]:
    """The share of a window in which the device computed, and its idle us before a step (p99)."""
    events = read_trace(pid)
    steps = events[events["what"] == What.DEVICE]
    steps = steps[(steps["start_ns"] >= start_ns) & (steps["end_ns"] <= end_ns)]
    busy_ns = (steps["end_ns"] - steps["start_ns"]).sum()
    idle_us = (steps["start_ns"][1:] - steps["end_ns"][:-1]) / 1e3
    share = busy_ns / (steps["end_ns"][-1] - steps["start_ns"][0])
    return float(share), float(np.percentile(idle_us, 99))


def gaps(figures: StreamFigures) -> str:
    """Of one kind of stream, or nothing if there were none."""
    if not figures.num_events:
        return "-"
    return f"{figures.itl_ms_p50:.2f} / {figures.itl_ms_p99:.2f} / {figures.itl_ms_std:.2f}"


if __name__ == "__main__":
    sys.exit(main())
