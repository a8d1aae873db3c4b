"""A server under test as a process group: start it, wait for it, load it, count its CPU time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import Request, urlopen

START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.2
MODEL_NAME = "m"
CPU_FIGURE = "cpu_s_per_1000_tokens"
LOAD = Path(__file__).with_name("load.py")
LOG_TAIL_BYTES = 3000
# Makes torch say that this processor has no more than AVX512.
CAPPED = Path(__file__).with_name("capped")

Figures = dict[str, float]


class ServerFailed(Exception):
    """The server did not start, or did not answer every request."""


@dataclass(frozen=True)
class Peer:
    """How to start a server that calls its model `MODEL_NAME`; the port is appended.

    `health` is a path that says 200 once it serves; `extra` goes into the body of every request.
    `library`: the name of a file that some process of it must have loaded by then.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    health: str = "/health"
    extra: dict[str, object] = field(default_factory=dict)
    library: str | None = None


class Server:
    """A running peer and all processes that it has started."""

    def __init__(self, peer: Peer, log: Path) -> None:
        self.name = peer.name
        self._peer = peer
        self._log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*peer.command, "--host", "127.0.0.1", "--port", str(port)],
                env=os.environ | peer.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process that was started; others are below it."""
        return self._process.pid

    def wait_healthy(self) -> float:
        """Poll until the server says 200; returns the seconds that this took."""
        started = time.monotonic()
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.name} has ended:\n{self._log_tail()}")
            if time.monotonic() - started > START_TIMEOUT_S:
                raise ServerFailed(f"{self.name} did not get healthy:\n{self._log_tail()}")
            time.sleep(POLL_S)
        return time.monotonic() - started

    def check_library(self) -> None:
        """Raise `ServerFailed` unless the library that the peer must run on is loaded."""
        library = self._peer.library
        if library is not None and library not in loaded_libraries(self._process.pid):
            raise ServerFailed(f"{self.name} does not run on {library}:\n{self._log_tail()}")

    def put_load(self, **flags: object) -> Figures:
        """Run the load client with these flags, its own process.

        Returns its figures and the CPU seconds of all processes of the server per 1,000 output
        tokens; raises `ServerFailed` if a request failed.
        """
        command = [sys.executable, str(LOAD), "--json", "--url", self.url, "--model", MODEL_NAME]
        for name, value in flags.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        if self._peer.extra:
            command += ["--extra", json.dumps(self._peer.extra)]
        cpu_s = tree_cpu_seconds(self._process.pid)
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
        cpu_s = tree_cpu_seconds(self._process.pid) - cpu_s
        figures: Figures = json.loads(printed)
        if figures["failed"]:
            raise ServerFailed(
                f"{self.name}: {figures['failed']:.0f} requests failed:\n{self._log_tail()}"
            )
        return figures | {CPU_FIGURE: 1000 * cpu_s / figures["output_tokens"]}

    def complete(self, prompt: str, max_tokens: int) -> str:
        """Give the greedy continuation of a text."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        request = Request(
            f"{self.url}/v1/completions",
            json.dumps(body | {"ignore_eos": True} | self._peer.extra).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urlopen(request, timeout=START_TIMEOUT_S) as reply:
                text: str = json.load(reply)["choices"][0]["text"]
        except OSError as error:
            raise ServerFailed(f"{self.name}: {error}\n{self._log_tail()}") from error
        return text

    def stop(self) -> None:
        """End the whole process group."""
        group = self._process.pid
        with suppress(ProcessLookupError):  # all of them may have ended by themselves
            os.killpg(group, signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                print(f"{self.name} did not stop; killing it", file=sys.stderr)
            os.killpg(group, signal.SIGKILL)
        self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urlopen(self.url + self._peer.health, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:  # HTTP errors are among them
            return False

    def _log_tail(self) -> str:
        return self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")


@contextmanager
def serving(peer: Peer) -> Iterator[Server]:
    """A healthy server, stopped in the end."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(peer, Path(folder) / "log")
        try:
            print(f"{peer.name}: healthy after {server.wait_healthy():.0f} s", flush=True)
            server.check_library()
            yield server
        finally:
            server.stop()


def headrace(model: Path | None, *flags: str) -> Peer:
    """The Headrace of this interpreter; without a model it serves the embedded one."""
    command = [sys.executable, "-m", "stages.cli", "serve", *([str(model)] if model else [])]
    return Peer("headrace", [*command, "--served-model-name", MODEL_NAME, *flags])


def vllm(venv: Path, model: Path, *flags: str) -> Peer:
    """The vLLM of `venv`, by its module: its command wants metadata that the CPU wheel lacks."""
    command = [str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", MODEL_NAME, *flags]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Else it looks for "cpu" in a package version, which depends on how it was installed.
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    }
    return Peer("vllm", command, environment)


def without_bf16(peer: Peer) -> Peer:
    """The same server as on a processor with AVX512 but neither AVX512-BF16 nor AMX, as most are.

    Headrace takes its build for it. vLLM chooses its library by what torch says of the processor,
    and oneDNN and MKL are told in the environment. Other servers cannot be capped.
    """
    if peer.name.startswith("headrace"):
        command = [*peer.command, "--cpu-kernels", "avx512"]
        return replace(peer, command=command, library="libheadrace_avx512.so")
    path = os.pathsep.join(filter(None, (str(CAPPED), os.environ.get("PYTHONPATH"))))
    capped = {
        "PYTHONPATH": path,
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    }
    return replace(peer, environment=peer.environment | capped, library="_C_AVX512.abi3.so")


def processes_below(root: int) -> list[int]:
    """A process and all below it."""
    return [*_tree(root, _children(_read_stats()[0]))]


def loaded_libraries(root: int) -> set[str]:
    """The names of all files that a process or one below it has mapped."""
    names: set[str] = set()
    for pid in processes_below(root):
        with suppress(OSError):  # it has ended meanwhile
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            names |= {line.rpartition("/")[2] for line in lines if "/" in line}
    return names


def tree_cpu_seconds(root: int) -> float:
    """User and system seconds of a process and all below it, from /proc.

    A process that has ended counts in its parent, once that has waited for it.
    """
    parents, ticks = _read_stats()
    below = _tree(root, _children(parents))
    return sum(ticks.get(pid, 0) for pid in below) / os.sysconf("SC_CLK_TCK")


def _read_stats() -> tuple[dict[int, int], dict[int, int]]:
    """Of every process: its parent, and the ticks that it has taken."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue  # it has ended meanwhile
        # The name, in parentheses, may hold anything; what follows it is the state, then numbers.
        values = text.rpartition(")")[2].split()
        pid = int(path.parent.name)
        parents[pid] = int(values[1])
        ticks[pid] = sum(map(int, values[11:15]))
    return parents, ticks


def _children(parents: Mapping[int, int]) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    return children


def _tree(pid: int, children: Mapping[int, list[int]]) -> Iterator[int]:
    yield pid
    for child in children.get(pid, ()):
        yield from _tree(child, children)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
