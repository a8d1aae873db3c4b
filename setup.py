"""Compiles the CPU kernels, once for each instruction set; all else is in pyproject.toml.

The results are plain shared objects that ctypes loads, not Python modules. They are optional:
without a C compiler the package installs all the same and serves through torch.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("executor_svc/ops/native")
# The sampling head takes the vectors and the thread pool of the kernels.
LIBRARIES = {
    "executor_svc.ops.native.libheadrace": KERNELS / "headrace.c",
    "sampler_svc.native.libsampling": Path("sampler_svc/native/sampling.c"),
}
FLAGS = ("-std=gnu11", "-g0", "-fvisibility=hidden", "-ffp-contract=fast")
AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
)
# By machine, as platform.machine() names it; `baseline` is compiled on all of them.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512bf16": (*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"),
        "avx512": AVX512_FLAGS,
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
    },
    "aarch64": {
        "neon_bf16": ("-march=armv8.2-a+dotprod+bf16",),
        "neon_dotprod": ("-march=armv8.2-a+dotprod",),
    },
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


def optimization() -> list[str]:
    """What CFLAGS say wins, as everywhere else; the compiler is given them before our flags."""
    return [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]


def builds() -> dict[str, tuple[str, ...]]:
    return {"baseline": (), **VARIANTS.get(platform.machine(), {})}


def extension(library: str, source: Path, build: str, flags: tuple[str, ...]) -> Extension:
    included = {*KERNELS.glob("*.[ch]"), *source.parent.glob("*.[ch]")}
    return Extension(
        f"{library}_{build}",
        sources=[str(source)],
        include_dirs=[str(KERNELS)],
        depends=sorted(map(str, included)),
        extra_compile_args=[*FLAGS, *optimization(), *flags],
        libraries=["m", "pthread"],
        optional=True,
    )


setup(
    ext_modules=[
        extension(library, source, build, flags)
        for library, source in LIBRARIES.items()
        for build, flags in builds().items()
    ],
    cmdclass={"build_ext": BuildSharedObject},
)
