"""Runs golden cases on the emulated NPU, in the child process that may load torch_npu."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.emulated_cann.load import environment

Results = dict[str, dict[str, Any]]


def run_cases(cases: Results, folder: Path, timeout_s: float) -> Results:
    """The results of `tests.npu_golden` by the names of its cases; files go to `folder`."""
    inputs, outputs = folder / "cases.json", folder / "results.json"
    inputs.write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-m", "tests.npu_golden", str(inputs), str(outputs)],
        cwd=Path(__file__).parents[2],
        env=environment(allow_float32=1),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: Results = json.loads(outputs.read_text())
    return results
