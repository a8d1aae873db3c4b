"""The thread pool of the kernels, under sanitizers: jobs, threads that are held up, cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_native_build import SOURCES, _compiler, _run

DRIVER = Path(__file__).with_name("pool_driver.c")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_pool_is_clean_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """The driver runs jobs of all sizes on one to many threads and checks what pool.c decides."""
    program = tmp_path / "driver"
    flags = ["-std=gnu11", "-O1", "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}"]
    compiled = _run(_compiler(), *flags, f"-I{SOURCES}", DRIVER, "-o", program, "-lpthread")
    if "cannot find" in compiled.stderr and "san" in compiled.stderr:
        pytest.skip(f"the compiler has no runtime for -fsanitize={sanitizer}")
    assert compiled.returncode == 0, compiled.stderr
    ran = _run(program)
    assert ran.returncode == 0, ran.stderr
