"""How long `headrace serve` takes until it answers, and how much memory that needs.

Starts the group with the model's files on disk only and in the page cache by turns, waits until
/health says 200, reads the memory of its processes, asks for one token, stops it. No KV is in the
figures: its pages are taken when they are used. With `--flags '--quantization int8'` a cache of the
packed weights is written at the first start and read at the others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.server import Server, headrace, processes_below, tree_cpu_seconds

GIB, KIB = 2**30, 2**10


@dataclass(frozen=True)
class Start:
    """One start. Bytes: the highest that one process ever held; what all hold together now.

    `cpu_s`: of all processes; what noise moves least.
    """

    seconds: float
    cpu_s: float
    peak: int
    resident: int


def forget(folder: Path) -> None:
    """Have the kernel drop a folder's files from the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def keep(folder: Path) -> None:
    """Have them in the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass


def measure(model: Path, flags: list[str]) -> Start:
    """Start a group, wait for it, read its memory, stop it."""
    with tempfile.TemporaryDirectory() as folder, _started(model, flags, Path(folder)) as server:
        seconds = server.wait_healthy()
        cpu_s, pids = tree_cpu_seconds(server.pid), processes_below(server.pid)
        peak = max(_kib(pid, "status", "VmHWM") for pid in pids)
        resident = sum(_kib(pid, "smaps_rollup", "Pss") for pid in pids)
        server.complete("once", 1)
        return Start(seconds, cpu_s, peak, resident)


@contextmanager
def _started(model: Path, flags: list[str], folder: Path) -> Iterator[Server]:
    server = Server(headrace(model, *flags), folder / "log")
    try:
        yield server
    finally:
        server.stop()


def _kib(pid: int, file: str, field: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    return 0


def main() -> None:
    """Print a line a start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=2, help="starts of each kind (2)")
    parser.add_argument("--flags", default="", help="more flags of `headrace serve`")
    arguments = parser.parse_args()
    weights = sum(path.stat().st_size for path in arguments.model.glob("*.safetensors"))
    print(f"weights {weights / GIB:.2f} GiB; memory of the largest process and of all, in GiB")
    print(f"{'files':<8} {'ready s':>8} {'CPU s':>6} {'peak':>9} {'/ weights':>10} {'all':>9}")
    for _ in range(arguments.rounds):
        for name, prepare in (("on disk", forget), ("cached", keep)):
            prepare(arguments.model)
            start = measure(arguments.model, arguments.flags.split())
            print(
                f"{name:<8} {start.seconds:>8.1f} {start.cpu_s:>6.1f} {start.peak / GIB:>9.2f} "
                f"{start.peak / weights:>10.2f} {start.resident / GIB:>9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
