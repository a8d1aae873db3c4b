"""Finds and opens compiled libraries: the best build that this processor can run, or a chosen one.

ctypes calls release the GIL. Knows no library by itself: each belongs to a service, which says what
it exports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_int64
from pathlib import Path
from typing import Any, NamedTuple

from stages.errors import ConfigError


class Build(NamedTuple):
    """One compiled variant and the processor flags, as in /proc/cpuinfo, that it needs.

    `machine`: as platform.machine() names it; '' where every machine compiles the variant.
    """

    name: str
    needs: frozenset[str]
    machine: str = ""

    def file_name(self, library: str) -> str:
        """What the variant of a library, 'headrace' say, is called in its folder."""
        return f"lib{library}_{self.name}.so"


_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"})
_DOTPROD = frozenset({"atomics", "asimddp"})
# Best first; `baseline` is SSE2 on x86 and NEON on aarch64.
BUILDS = (
    Build("avx512bf16", _AVX512 | {"avx512_bf16", "avx512_vnni"}, "x86_64"),
    Build("avx512", _AVX512, "x86_64"),
    Build("avx2", frozenset({"avx2", "fma", "f16c"}), "x86_64"),
    Build("neon_bf16", _DOTPROD | {"bf16"}, "aarch64"),
    Build("neon_dotprod", _DOTPROD, "aarch64"),
    Build("baseline", frozenset()),
)
# What --cpu-kernels takes besides the name of a build.
AUTO, TORCH = "auto", "torch"
KERNEL_CHOICES = (AUTO, *(build.name for build in BUILDS), TORCH)


class LibraryUnavailable(Exception):
    """There is no compiled library for this machine; the text says why and what to do."""


# Result and argument types, as ctypes has them, of each function.
Signatures = Mapping[str, tuple[Any, tuple[Any, ...]]]


class Interface(NamedTuple):
    """What a library exports.

    sizes_function: the name of a function that tells the bytes of the library's structures; where
    they differ from those of `structures`, it was built from other sources.
    """

    signatures: Signatures
    sizes_function: str
    structures: Sequence[type[ctypes.Structure]]


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first processor can do; nothing where the system does not say so."""
    if not cpuinfo.exists():
        return frozenset()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    # "flags" on x86, "Features" on aarch64.
    flags = (value.split() for key, _, value in lines if key.strip() in ("flags", "Features"))
    return frozenset(next(flags, []))


def find_build(
    folder: Path, library: str, flags: frozenset[str] | None = None, choice: str = AUTO
) -> tuple[Build, Path]:
    """The best build in `folder` for a processor with `flags` (default: this one), and its file.

    `choice`: auto, or the name of the build that it shall be.

    Raises:
        LibraryUnavailable: none was built.
        ConfigError: the chosen one was not built, or this processor cannot run it.
    """
    found = processor_flags() if flags is None else flags
    paths = {build: folder / build.file_name(library) for build in BUILDS}
    there = [build for build in BUILDS if build.needs <= found and paths[build].exists()]
    wanted = [build for build in there if choice in (AUTO, build.name)]
    if wanted:
        return wanted[0], paths[wanted[0]]
    if choice == AUTO:
        raise LibraryUnavailable(
            "the CPU kernels were not compiled when Headrace was installed; "
            "install a C compiler (gcc or clang) and install Headrace again"
        )
    raise ConfigError(_refusal(choice, found, [build.name for build in there]))


def _refusal(choice: str, flags: frozenset[str], there: list[str]) -> str:
    lacking = sorted(next(build.needs for build in BUILDS if build.name == choice) - flags)
    reason = (
        f"this processor lacks {', '.join(lacking)}"
        if lacking
        else "it was not compiled when Headrace was installed"
    )
    return f"--cpu-kernels {choice}: {reason}; there are {', '.join((AUTO, *there, TORCH))}"


def open_library(path: Path, interface: Interface) -> ctypes.CDLL:
    """Load a file and declare what it exports.

    Raises:
        LibraryUnavailable: it is damaged, or was built from other sources.
    """
    try:
        functions = ctypes.CDLL(str(path))
        sizes_function = getattr(functions, interface.sizes_function)
        sizes_function.restype, sizes_function.argtypes = None, (POINTER(c_int64),)
        for name, (result, arguments) in interface.signatures.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LibraryUnavailable(f"{path} cannot be used ({error}); install again") from error
    sizes = (c_int64 * len(interface.structures))()
    sizes_function(sizes)
    if [*sizes] != [ctypes.sizeof(structure) for structure in interface.structures]:
        raise LibraryUnavailable(f"{path} belongs to another version; install Headrace again")
    return functions
