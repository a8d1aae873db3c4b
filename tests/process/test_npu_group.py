"""A real group on `--device npu` (the emulated CANN), and one where torch_npu finds no CANN."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated_cann.build import unavailable
from tests.process.group import Group, serving

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

PROMPT = "Tell me a story about a fox and two stars."
MAX_TOKENS = 120
# How many chunks a stream has brought when the executor is killed.
CHUNKS_BEFORE_KILL = 20
COMMON = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "2")


@pytest.fixture(autouse=True, scope="module")
def without_cann() -> Iterator[None]:
    """A machine with the wheel alone, until a test asks for more."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LD_LIBRARY_PATH", "ASCEND_HOME_PATH"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def cpu_text(tmp_path_factory: pytest.TempPathFactory, without_cann: None) -> str:
    with serving(tmp_path_factory.mktemp("cpu") / "run", "--device", "cpu", *COMMON) as group:
        return stream(group)


def stream(group: Group, kill_at: int = 0) -> str:
    """The text of one stream; the executor is killed when so many chunks have come."""
    chunks = group.client().completions.create(
        model="headrace-embedded",
        prompt=PROMPT,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    for index, chunk in enumerate(chunks, start=1):
        text += chunk.choices[0].text if chunk.choices else ""
        if index == kill_at:
            group.kill("executor")
    return text


@pytest.mark.timeout(300)  # the first test of a checkout compiles the emulator
def test_an_npu_gives_the_text_of_a_cpu_through_kill(
    cpu_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.emulated_cann.load import environment

    for name, value in environment(allow_float32=1).items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "npu", "--device", "npu", *COMMON) as group:
        assert stream(group) == cpu_text
        incarnation = group.stage("executor")["incarnation"]
        assert stream(group, CHUNKS_BEFORE_KILL) == cpu_text
        assert group.stage("executor")["incarnation"] == incarnation + 1


def test_without_cann_a_group_serves_on_its_cpu(cpu_text: str) -> None:
    """torch_npu is installed here, and fails when something imports it."""
    assert len(cpu_text) > MAX_TOKENS


def test_without_cann_device_npu_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.cli", "serve", "--device", "npu"]
    done = subprocess.run(
        [*command, "--port", "0", "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "--device npu: torch_npu finds no CANN" in done.stderr
    assert "source its set_env.sh" in done.stderr
    assert "restart" not in done.stderr
    assert "CPU binding: " in done.stderr
