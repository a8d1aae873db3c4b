"""What the interpreter takes, the compiler must take too, and the result must fit an H200."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="no triton: pip install headrace[cuda]"
)

# Of one program: 227 KiB (CUDA programming guide, compute capability 9.0).
MAX_SHARED_BYTES = 227 * 1024


def test_every_kernel_compiles_for_hopper_without_spilling(tmp_path: Path) -> None:
    # A process of its own, as this one may interpret; an empty cache, so that it does compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.hopper_compiler"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert len(kernels) == 18
    assert {name: use for name, use in kernels.items() if use["stack"] or use["local"]} == {}
    assert {name: use for name, use in kernels.items() if use["shared"] > MAX_SHARED_BYTES} == {}
