"""The real torch_npu on the emulated CANN, in a child process for each set of knobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated_cann.build import unavailable
from tests.emulated_cann.load import environment

_INSIDE = Path(__file__).parent / "inside"
_REASON = unavailable()

pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def _run(*files: str, variables: dict[str, str] | None = None, **knobs: object) -> None:
    """Run test files of inside/ in a process with torch_npu on the emulator."""
    paths = [str(_INSIDE / file) for file in files]
    # The conftest of all other tests bars the import of torch_npu.
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={_INSIDE}"]
    command = [sys.executable, "-m", "pytest", *options, *paths]
    own = environment(**knobs) | (variables or {})
    done = subprocess.run(
        command, env=own, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.timeout(900)  # the first test of a checkout compiles the emulator
def test_tensors_and_operators() -> None:
    _run(
        "check_tensors.py",
        "check_operators.py",
        "check_matrices.py",
        "check_weights.py",
        "check_gelu.py",
        mem_mb=256,
    )


def test_fused_operators_their_constraints_and_graphs() -> None:
    _run("check_fused.py", "check_attention.py", "check_constraints.py", "check_graphs.py")


def test_memory_policy_and_sampling() -> None:
    _run("check_memory.py", "check_sampling.py")


def test_asynchrony_shows_the_bugs_of_a_host() -> None:
    _run("check_asynchrony.py", delay_us=300, allow_float32=1)


def test_clock(tmp_path: Path) -> None:
    _run("check_clock.py", clock=1, compute=0, report=tmp_path)
    [report] = tmp_path.iterdir()
    compute = json.loads(report.read_text())["compute"]
    assert compute["num_tasks"] > 200
    assert 0 < compute["busy_ns"] < compute["last_ns"] - compute["first_ns"]


def test_refusals_that_end_a_capture_or_a_device() -> None:
    # Without torch_npu's queue a refused call raises where it is made; in file order, because
    # the last tests leave devices that have failed.
    at_once = {"TASK_QUEUE_ENABLE": "0", "PYTEST_ADDOPTS": "-p no:randomly"}
    _run("check_refused_captures.py", "check_fault.py", variables=at_once, devices=4)
