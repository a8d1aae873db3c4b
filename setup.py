"""Compiles the CPU kernels, once for each instruction set; all else is in pyproject.toml.

The results are plain shared objects that ctypes loads, not Python modules. They are optional:
without a C compiler the package installs all the same and serves through torch.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("executor_svc/ops/native")
FLAGS = ("-std=gnu11", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast")
X86_FLAGS = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}


class BuildSharedObject(build_ext):
    """Names a result as library.py looks for it, and keeps the variants' objects apart."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        shared_temp = self.build_temp
        self.build_temp = str(Path(shared_temp) / ext.name)
        super().build_extension(ext)
        self.build_temp = shared_temp


def builds() -> dict[str, tuple[str, ...]]:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return {"baseline": (), **(X86_FLAGS if is_x86 else {})}


setup(
    ext_modules=[
        Extension(
            f"executor_svc.ops.native.libheadrace_{name}",
            sources=[str(FOLDER / "headrace.c")],
            depends=[str(path) for path in sorted(FOLDER.glob("*.[ch]"))],
            extra_compile_args=[*FLAGS, *flags],
            libraries=["m", "pthread"],
            optional=True,
        )
        for name, flags in builds().items()
    ],
    cmdclass={"build_ext": BuildSharedObject},
)
