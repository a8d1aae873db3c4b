"""A group under measurement: started, asked for its stages, read from outside, stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.errors import HeadraceError, StageStartError
from stages.status import ask_status

_READY = re.compile(r" on (http://\S+) \(ready")


class BenchGroup:
    """A running group: its address and the process of each stage."""

    def __init__(self, url: str, run_dir: Path) -> None:
        self.url = url
        self.pids = {
            str(stage["stage"]): int(str(stage["pid"])) for stage in ask_status(run_dir).stages
        }

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time that each stage has taken so far."""
        return {stage: process_cpu_seconds(pid) for stage, pid in self.pids.items()}


def process_cpu_seconds(pid: int) -> float:
    """User and system time of all threads, from /proc/PID/stat; steps of 10 ms on most systems."""
    # The name in parentheses may hold anything; the fields behind it are numbered from 3.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise HeadraceError(f"a stage of the group has died (process {pid}: {error})") from None
    user_ticks, system_ticks = int(fields[11]), int(fields[12])
    return (user_ticks + system_ticks) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[BenchGroup]:
    """Serve on a free port while the `with` lasts."""
    with TemporaryDirectory(prefix="headrace-") as run_dir:
        command = [sys.executable, "-m", "stages.cli", "serve", "--port", "0"]
        with subprocess.Popen(
            [*command, "--run-dir", run_dir, "--log-level", "warning", *arguments],
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            try:
                yield BenchGroup(_url_of(server), Path(run_dir))
            finally:
                server.send_signal(signal.SIGTERM)


def _url_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        if found := _READY.search(line):
            return found.group(1)
    raise StageStartError("the server ended before it was ready; see its log above")
