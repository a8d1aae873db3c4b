"""The kernels' NEON builds, compiled by a cross-compiler and run by an emulator of the processor.

What cannot be seen here: speed, and an order of memory accesses that only a real one would choose.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.native_library import BUILDS

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "executor_svc" / "ops" / "native", ROOT / "sampler_svc" / "native")
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MARCH = {
    "baseline": "armv8-a",
    "neon_dotprod": "armv8.2-a+dotprod",
    "neon_bf16": "armv8.2-a+dotprod+bf16",
}
TIMEOUT_S = 100


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("driver", "build"),
    [
        *(("values_driver.c", build) for build in MARCH),
        ("native_driver.c", "neon_bf16"),
        ("sampling_driver.c", "baseline"),
    ],
)
def test_every_kernel_computes_the_right_values_on_neon(
    driver: str, build: str, tmp_path: Path
) -> None:
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    program = tmp_path / "driver"
    flags = ("-std=gnu11", "-O1", "-ffp-contract=fast", "-static", f"-march={MARCH[build]}")
    folders = [f"-I{folder}" for folder in FOLDERS]
    source = Path(__file__).with_name(driver)
    compiled = _run(COMPILER, *flags, *folders, source, "-o", program, "-lm", "-lpthread")
    assert compiled.returncode == 0, compiled.stderr
    ran = _run(EMULATOR, "-cpu", "max", program)
    assert ran.returncode == 0, ran.stderr


def test_setup_compiles_what_is_tested_here() -> None:
    setup = (ROOT / "setup.py").read_text()
    found = dict(re.findall(r'"(neon_\w+)": \("-march=(\S+)",\)', setup))
    assert found | {"baseline": MARCH["baseline"]} == MARCH
    assert {build.name for build in BUILDS if build.machine in ("", "aarch64")} == MARCH.keys()


def test_the_values_are_right_on_this_machine_too(tmp_path: Path) -> None:
    """Else the driver could be as wrong as what it compares with."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("this machine has no C compiler")
    program, source = tmp_path / "driver", Path(__file__).with_name("values_driver.c")
    flags = ("-std=gnu11", "-O1", "-ffp-contract=fast", "-march=native")
    compiled = _run(compiler, *flags, f"-I{FOLDERS[0]}", source, "-o", program, "-lm", "-lpthread")
    assert compiled.returncode == 0, compiled.stderr
    ran = _run(program)
    assert ran.returncode == 0, ran.stderr
