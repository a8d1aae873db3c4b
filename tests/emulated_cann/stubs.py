"""Stubs for what torch_npu links to and the emulator does not have.

The names are read from the wheel: every undefined acl, rt or Msprof symbol of its libraries. A stub
refuses, as a card does whose driver lacks the feature.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

_FEATURE_NOT_SUPPORTED = 207000  # ACL_ERROR_RT_FEATURE_NOT_SUPPORT
_IS_CANN = re.compile(r"(acl|rt|Msprof)[a-zA-Z0-9]*[A-Z]\w*")


def stub_source(wheel: Path, objects: Iterable[Path]) -> str:
    """C source of a stub for each symbol of the wheel that the objects do not define."""
    libraries = [*wheel.glob("lib/*.so"), *wheel.glob("*.so")]
    wanted = {name for file in libraries for name in _symbols(file, "--undefined-only", "-D")}
    missing = {name for name in wanted if _IS_CANN.fullmatch(name)}
    for file in objects:
        missing -= _symbols(file, "--defined-only")
    return "\n".join(_stub(name) for name in sorted(missing)) + "\n"


def _stub(name: str) -> str:
    # What the profiler asks for is answered with success: there is nothing to profile.
    code = 0 if name.startswith("Msprof") else _FEATURE_NOT_SUPPORTED
    return f"long {name}(void) {{ return {code}; }}"


def _symbols(file: Path, *options: str) -> set[str]:
    command = ["nm", "--format=posix", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[0].split("@")[0] for line in done.stdout.splitlines() if line}
