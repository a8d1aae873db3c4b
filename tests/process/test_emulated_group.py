"""A real group on the emulated device: predicted text through kills, and the step benchmark."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import msgspec
import pytest

from executor_svc.emulated import load_choices, predict_tokens
from stages.bench.group import process_cpu_seconds
from stages.bench.report import Report
from stages.config import EMBEDDED_MODEL
from stages.model_folder import embedded_model
from stages.trace import What, read_trace
from tests.pipeline import make_config
from tests.process.group import Group, decode, serving

NUM_STREAMS = 8
MAX_TOKENS = 150
# How many events all streams together have seen when stages are killed.
EVENTS_BEFORE_KILL = 200


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    arguments = ("--device", "emulated", "--emulated-step-ms", "3", "--max-restarts", "100")
    with serving(tmp_path_factory.mktemp("g") / "run", *arguments) as group:
        yield group


def post(group: Group, path: str, body: dict[str, Any]) -> Any:
    return urlopen(
        Request(group.url + path, msgspec.json.encode(body), {"Content-Type": "application/json"}),
        timeout=60,
    )


def prompt_of(index: int) -> list[int]:
    return [20 + index, 40, 60 + index]


def expected_text(group: Group, index: int) -> str:
    choices = load_choices(make_config(embedded_model(), model=EMBEDDED_MODEL))
    tokens = predict_tokens(prompt_of(index), MAX_TOKENS, choices)
    with post(group, "/detokenize", {"tokens": tokens}) as answer:
        return str(decode(answer.read())["prompt"])


def stream(group: Group, index: int, on_event: Callable[[], None]) -> str:
    body = {
        "model": "headrace-embedded",
        "prompt": prompt_of(index),
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }
    text = ""
    with post(group, "/v1/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                text += "".join(choice["text"] for choice in decode(line[6:])["choices"])
                on_event()
    return text


@pytest.mark.parametrize(
    "stages",
    [["executor"], ["scheduler"], ["sampler"], ["tokenizer", "scheduler", "executor", "sampler"]],
    ids="+".join,
)
def test_streams_have_the_predicted_text_through_kills(group: Group, stages: list[str]) -> None:
    pids = [group.pid(stage) for stage in stages]
    lock = threading.Lock()
    num_events = 0

    def on_event() -> None:
        nonlocal num_events
        with lock:
            num_events += 1
            if num_events == EVENTS_BEFORE_KILL:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        texts = list(pool.map(lambda index: stream(group, index, on_event), range(NUM_STREAMS)))
    assert texts == [expected_text(group, index) for index in range(NUM_STREAMS)]
    assert [group.pid(stage) for stage in stages] != pids


def test_the_device_takes_its_time_and_no_processor(group: Group) -> None:
    pid = group.pid("executor")
    before = process_cpu_seconds(pid)
    num_before = len(read_trace(pid))
    stream(group, 0, lambda: None)
    events = read_trace(pid)[num_before:]
    device = events[events["what"] == What.DEVICE]
    assert len(device) == MAX_TOKENS
    lengths_ms = (device["end_ns"] - device["start_ns"]) / 1e6
    assert (lengths_ms >= 3.0).all() and (lengths_ms < 3.1).all()
    assert (device["start_ns"][1:] >= device["end_ns"][:-1]).all()
    assert process_cpu_seconds(pid) - before < lengths_ms.sum() / 1e3


def test_bench_steps_writes_figures_and_a_plot(tmp_path: Path) -> None:
    json, plot = tmp_path / "steps.json", tmp_path / "steps.html"
    command = [sys.executable, "-m", "stages.cli", "bench", "steps", "--device", "emulated"]
    command += ["--step-ms", "2", "--batch", "1,4", "--seconds", "0.3", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--json", str(json), "--plot", str(plot)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode(json.read_bytes(), type=Report)
    assert [row.batch for row in report.rows] == [1, 4]
    for row in report.rows:
        for figures in (row.sequential, row.overlapped):
            assert figures.step_ms >= 2 and 0 < figures.device_busy <= 1
            assert figures.exposed_host_us >= 1 and figures.tokens_per_s > 0
            assert set(figures.host_cpu_us) >= {"gateway", "scheduler", "executor", "sampler"}
        assert row.exposed_ratio == pytest.approx(
            row.sequential.exposed_host_us / row.overlapped.exposed_host_us
        )
    page = plot.read_text()
    assert page.startswith("<!doctype html>") and "4 streams" in page
    assert "overlapped" in done.stdout
