"""The process group: it starts, serves, drains, and leaves nothing behind."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest
from openai import APIConnectionError, APIStatusError

from stages.topology import STAGES
from tests.process.group import Group, metric, serving

PROMPT = "What is 12 plus 34?"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def group(run_dir: Path) -> Iterator[Group]:
    with serving(run_dir) as group:
        yield group


def get(group: Group, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(group.url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask(group: Group, max_tokens: int = 16) -> str:
    answer = group.client().chat.completions.create(
        model="headrace-embedded",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=max_tokens,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def family(group: Group) -> list[psutil.Process]:
    return psutil.Process(group.process.pid).children(recursive=True)


def assert_all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


def test_it_serves_and_leaves_nothing(run_dir: Path) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    with Group(run_dir) as group:
        group.wait_ready()
        assert "46" in ask(group)
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        processes = family(group)
        assert len(processes) >= len(STAGES)
        for path in ("/live", "/ready", "/health", "/version", "/v1/models"):
            assert get(group, path)[0] == 200, path
        assert group.stop() == 0, group.text()
    assert_all_gone(processes)
    assert not run_dir.exists()
    assert set(os.listdir("/dev/shm")) == shared_memory


def test_status_shows_every_stage(group: Group) -> None:
    command = [sys.executable, "-m", "stages.cli", "status", "--run-dir", str(group.run_dir)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(stage in shown for stage in STAGES)
    answer = subprocess.run([*command, "--json"], capture_output=True, check=True).stdout
    stages = msgspec.json.decode(answer)["stages"]
    assert [stage["is_ready"] for stage in stages] == [True] * len(STAGES)


def test_sockets_listen_on_the_loopback_only(group: Group) -> None:
    listening = [
        connection.laddr
        for process in [psutil.Process(group.process.pid), *family(group)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert len({address.port for address in listening}) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_drains_open_requests(group: Group, number: signal.Signals) -> None:
    stream = group.client().completions.create(
        model="headrace-embedded",
        prompt=PROMPT,
        max_tokens=300,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )
    next(iter(stream))
    group.process.send_signal(number)
    group.wait_log("draining")
    chunks = list(stream)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 300
    assert group.wait_end() == 0, group.text()


def test_a_drain_refuses_new_requests(group: Group) -> None:
    stream = group.client().completions.create(
        model="headrace-embedded",
        prompt=PROMPT,
        max_tokens=1500,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    group.process.send_signal(signal.SIGTERM)
    group.wait_log("draining")
    with pytest.raises((APIStatusError, APIConnectionError)) as refused:
        ask(group)
    if isinstance(refused.value, APIStatusError):
        assert refused.value.status_code == 503
    stream.close()
    assert group.wait_end() == 0, group.text()


def test_a_second_signal_aborts(group: Group) -> None:
    processes = family(group)
    stream = group.client().completions.create(
        model="headrace-embedded",
        prompt=PROMPT,
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    group.process.send_signal(signal.SIGINT)
    group.wait_log("draining")
    assert group.stop(signal.SIGINT) == 130
    assert_all_gone(processes)
    stream.close()


def test_children_die_with_a_killed_supervisor(group: Group) -> None:
    processes = family(group)
    group.process.kill()
    assert_all_gone(processes)
    group.process.wait()


def test_a_killed_group_can_be_started_again(run_dir: Path) -> None:
    with Group(run_dir) as group:
        group.wait_ready()
        processes = family(group)
        group.process.kill()
        assert_all_gone(processes)
    with serving(run_dir) as group:
        assert ask(group)


def test_a_port_in_use_is_named_at_once(run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "stages.cli", "serve", "--port", port]
        started = time.monotonic()
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2 and port in ended.stderr and "--port" in ended.stderr
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-blocks", "1"], "--num-blocks"),
        (["--kv-cache-memory", "9000G"], "--kv-cache-memory"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_a_start_that_cannot_work_says_why(run_dir: Path, arguments: list[str], words: str) -> None:
    with Group(run_dir, *arguments) as group:
        assert group.wait_end() != 0
        assert words in group.text()
    assert not run_dir.exists()


def test_a_stage_that_keeps_dying_ends_the_group(run_dir: Path) -> None:
    with Group(run_dir, "--max-restarts", "1") as group:
        group.wait_ready()
        first = group.kill("tokenizer")
        group.wait_log("starting it again")
        while group.pid("tokenizer") == first or not group.stage("tokenizer")["is_ready"]:
            assert group.process.poll() is None, group.text()
        group.kill("tokenizer")
        assert group.wait_end() == 70
        assert "2 deaths" in group.text()


def test_help_is_fast() -> None:
    """No torch, no transformers, no HTTP on the way to a help text."""
    code = (
        "import sys; from stages.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch','transformers','aiohttp','zmq','numpy') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_a_thousand_disconnects_leave_every_block_free(group: Group) -> None:
    """Clients hang up at any moment; benchmarks/disconnects.py does the same 10,000 times."""

    def hang_up(index: int) -> None:
        body = {
            "model": "headrace-embedded",
            "prompt": PROMPT + str(index % 7) * (index % 40),
            "max_tokens": 200,
            "stream": index % 2 == 0,
            "ignore_eos": True,
        }
        connection = http.client.HTTPConnection(group.url.removeprefix("http://"), timeout=30)
        connection.request(
            "POST",
            "/v1/completions",
            msgspec.json.encode(body),
            {"Content-Type": "application/json"},
        )
        if index % 4 == 0:
            connection.getresponse().read(index % 600)
        connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hang_up, range(1000)))
    wait_until_idle(group)
    # Requests did run, and many of them were aborted on their way.
    text = get(group, "/metrics")[1].decode()
    assert metric(text, "vllm:generation_tokens_total") > 100
    assert metric(text, "vllm:request_success_total", 'finished_reason="abort"') > 100
    assert ask(group)


def wait_until_idle(group: Group, timeout_s: float = 60.0) -> None:
    """Wait until no request is open, and the scheduler has said since that it holds nothing."""
    deadline = time.monotonic() + timeout_s
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
    idle_since_ns = 0
    while True:
        state = msgspec.json.decode(get(group, "/debug/state")[1])
        if not idle_since_ns and state["gateway"]["num_open"] == 0:
            idle_since_ns = time.time_ns()
        beat_ns = next(s["heartbeat_ns"] for s in state["stages"] if s["stage"] == "scheduler")
        text = get(group, "/metrics")[1].decode()
        if idle_since_ns and beat_ns > idle_since_ns:
            assert [metric(text, name) for name in names] == [0, 0, 0]
            return
        assert time.monotonic() < deadline, state
