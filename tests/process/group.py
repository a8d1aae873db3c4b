"""Real process groups for tests: `headrace serve` on a free port, and ways to disturb it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from openai import OpenAI

from stages.status import StatusReport, ask_status

READY = re.compile(r" on (http://\S+) \(ready in ([\d.]+) s\)")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class Group:
    """A running group: `url`, its stages' pids, its log, its end."""

    def __init__(self, run_dir: Path, *arguments: str) -> None:
        self.run_dir = run_dir
        self.url = ""
        self.ready_seconds = 0.0
        self.log: deque[str] = deque(maxlen=2000)
        self._clients: list[OpenAI] = []
        command = [sys.executable, "-m", "stages.cli", "serve", *arguments]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--run-dir", str(run_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._lines = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self) -> Self:
        """Wait until the group says that it serves."""
        found = self.wait_log(READY, START_TIMEOUT_S)
        self.url, self.ready_seconds = found.group(1), float(found.group(2))
        return self

    def wait_log(self, pattern: re.Pattern[str] | str, timeout_s: float = 30.0) -> re.Match[str]:
        """Wait until a line of the log matches; fails with the log when none does."""
        compiled = re.compile(pattern)

        def search() -> re.Match[str] | None:
            return next((m for line in self.log if (m := compiled.search(line))), None)

        with self._lines:
            self._lines.wait_for(lambda: search() or not self._reader.is_alive(), timeout_s)
            found = search()
        assert found is not None, f"no line matches {compiled.pattern!r} in:\n" + self.text()
        return found

    def text(self) -> str:
        """The whole log."""
        return "\n".join(self.log)

    def client(self) -> OpenAI:
        """An OpenAI client that retries nothing; closed with the group."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=90)
        self._clients.append(client)
        return client

    def status(self) -> StatusReport:
        """As `headrace status` sees it."""
        return ask_status(self.run_dir)

    def stage(self, name: str) -> dict[str, Any]:
        """One stage of `status`."""
        return next(stage for stage in self.status().stages if stage["stage"] == name)

    def pid(self, stage: str) -> int:
        """The process id of a stage."""
        return int(self.stage(stage)["pid"])

    def kill(self, stage: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Signal a stage; returns the pid that it had."""
        pid = self.pid(stage)
        os.kill(pid, number)
        return pid

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the supervisor and wait for its end; returns the exit code."""
        self.process.send_signal(number)
        return self.wait_end()

    def wait_end(self) -> int:
        """Wait for the supervisor's end."""
        code = self.process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(STOP_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._lines:
                self.log.append(line.rstrip("\n"))
                self._lines.notify_all()
        with self._lines:
            self._lines.notify_all()


@contextmanager
def serving(run_dir: Path, *arguments: str) -> Iterator[Group]:
    """A group that is ready, and stopped at the end."""
    with Group(run_dir, *arguments) as group:
        group.wait_ready()
        yield group
        if group.process.poll() is None:
            assert group.stop() == 0, group.text()


def metric(text: str, name: str, label: str = "") -> float:
    """The sum of a metric's samples, those with `label`, in a Prometheus text."""
    labels = rf"(?:{{[^}}]*{re.escape(label)}[^}}]*}})"
    values = re.findall(rf"^{re.escape(name)}{labels}{'' if label else '?'} (\S+)$", text, re.M)
    assert values, f"no metric {name}"
    return sum(float(value) for value in values)


def decode(data: bytes) -> Any:
    """Parse a JSON answer."""
    return msgspec.json.decode(data)
