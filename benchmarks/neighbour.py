"""What one busy process beside it does to the executor's decode step.

A process that spins is stopped and continued in turn (A B A B), so that whatever else the machine
does hits both. The mean of all steps counts, so that those are in it which waited for a thread that
the kernel had taken off its core. On two cores a fair share of the machine is three quarters: 1.33
times the quiet time is what a perfect pool reaches, 1.6 the bar.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import msgspec
import torch

from executor_svc.bench.latency import run_rounds
from executor_svc.bench.plans import Workload
from executor_svc.loading import load
from executor_svc.stage import ExecutorStage
from stages.bench.latency import latency_config

SPIN = "while True: pass"
INPUT_LEN = 16
QUIET, BUSY = False, True


class Case(NamedTuple):
    """A model folder at one batch size; `num_steps` decode steps make a round."""

    folder: Path
    batch_size: int
    num_steps: int


@contextmanager
def spinner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that wants a whole core; it is stopped at first."""
    with subprocess.Popen([sys.executable, "-c", SPIN]) as process:
        try:
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


def start(case: Case, cpu_threads: str) -> tuple[ExecutorStage, Workload]:
    """The executor of a server that holds this case."""
    config = latency_config(
        {
            "model": str(case.folder),
            "device": "cpu",
            "cpu_threads": cpu_threads,
            "input_len": INPUT_LEN,
            "output_len": case.num_steps + 1,
            "batch_size": case.batch_size,
            "rounds": 1,
            "warmup": 0,
        }
    )
    workload = Workload(
        input_len=INPUT_LEN,
        output_len=case.num_steps + 1,
        batch_size=case.batch_size,
        block_size=config.block_size,
        token_budget=config.max_num_batched_tokens,
        vocab_size=config.facts.vocab_size,
    )
    model, kv_cache = load(msgspec.structs.replace(config, num_blocks=workload.num_blocks))
    return ExecutorStage(config, model, kv_cache), workload


def measure(case: Case, cpu_threads: str, rounds: int) -> dict[bool, list[int]]:
    """Nanoseconds of all decode steps, beside a resting and beside a busy neighbour."""
    stage, workload = start(case, cpu_threads)
    run_rounds(stage, workload, rounds=1, warmup=0, seed=0)
    times: dict[bool, list[int]] = {QUIET: [], BUSY: []}
    with spinner() as neighbour:
        for _ in range(rounds):
            for is_busy, own in times.items():
                neighbour.send_signal(signal.SIGCONT if is_busy else signal.SIGSTOP)
                (measured,) = run_rounds(stage, workload, rounds=1, warmup=0, seed=0)
                own += measured.decode_ns
    return times


def print_line(case: Case, times: dict[bool, list[int]]) -> None:
    quiet, busy = (fmean(own) / 1e6 for own in times.values())
    quiet_p50, busy_p50 = (median(own) / 1e6 for own in times.values())
    print(
        f"{case.folder.name:16} {case.batch_size:>5} {torch.get_num_threads():>7} "
        f"{quiet:>9.3f} {quiet_p50:>9.3f} {busy:>9.3f} {busy_p50:>9.3f} {busy / quiet:>6.2f}x",
        flush=True,
    )


def main() -> None:
    """Print one line a batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-size", default="1", help="such as 1,64 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each, by turns")
    parser.add_argument("--cpu-threads", default="auto")
    arguments = parser.parse_args()
    print(
        f"{'model':16} {'batch':>5} {'threads':>7} {'quiet ms':>9} {'p50':>9} "
        f"{'busy ms':>9} {'p50':>9}   ratio"
    )
    for text in arguments.batch_size.split(","):
        case = Case(arguments.model, int(text), arguments.steps)
        print_line(case, measure(case, arguments.cpu_threads, arguments.rounds))


if __name__ == "__main__":
    main()
