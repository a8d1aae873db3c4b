"""Lets torch_npu find the emulator: in this process, or through the environment of another."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tests.emulated_cann.build import build

_NO_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_LOAD_ORDER = (
    "ascendcl",
    "acl_op_compiler",
    "hccl",
    "ge_runner",
    "graph",
    "acl_tdt_channel",
    "opapi",
)


def environment(**knobs: object) -> dict[str, str]:
    """Give the environment under which a process's own `import torch_npu` loads the emulator.

    knobs: EMULATED_CANN_* without the prefix, in lower case: environment(delay_us=500).
    """
    folder = str(build())
    known = os.environ.get("LD_LIBRARY_PATH")
    own = {f"EMULATED_CANN_{name.upper()}": str(value) for name, value in knobs.items()}
    paths = folder if known is None else f"{folder}{os.pathsep}{known}"
    return {**os.environ, "LD_LIBRARY_PATH": paths, _NO_AUTOLOAD: "0", **own}


def load() -> None:
    """Import torch_npu on the emulator in this process. Its knobs are read at the first use."""
    os.environ.setdefault(_NO_AUTOLOAD, "0")
    import torch  # noqa: F401  the operators link to it

    folder = build()
    for name in _LOAD_ORDER:
        ctypes.CDLL(str(Path(folder) / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    import torch_npu  # noqa: F401
