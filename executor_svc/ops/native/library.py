"""Finds and loads the compiled kernels: the best build that this processor can run.

ctypes calls release the GIL. Knows nothing of torch.
"""

from __future__ import annotations

import ctypes
import platform
import weakref
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

from executor_svc.ops.native.abi import STRUCTURES, Attention, Batch, Cache, Decoder, Linear

FOLDER = Path(__file__).parent
MAX_HEAD_DIM = 256


class Build(NamedTuple):
    """One compiled variant and the processor flags, as in /proc/cpuinfo, that it needs."""

    name: str
    needs: frozenset[str]

    @property
    def file_name(self) -> str:
        return f"libheadrace_{self.name}.so"


# Best first; `baseline` is SSE2 on x86 and NEON on aarch64.
BUILDS = (
    Build("avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"})),
    Build("avx2", frozenset({"avx2", "fma", "f16c"})),
    Build("baseline", frozenset()),
)
# Result and argument types of what the library exports.
SIGNATURES = {
    "headrace_abi_sizes": (None, (POINTER(c_int64),)),
    "headrace_engine_create": (c_void_p, (c_int64,)),
    "headrace_engine_destroy": (None, (c_void_p,)),
    "headrace_engine_pool": (c_void_p, (c_void_p,)),
    "headrace_decoder_step": (
        c_int64,
        (c_void_p, POINTER(Decoder), POINTER(Cache), POINTER(Batch)),
    ),
    "headrace_packed_elements": (c_int64, (c_int64, c_int64)),
    "headrace_pack_weight": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "headrace_linear_workspace": (c_int64, (c_int64, c_int64)),
    "headrace_linear": (
        None,
        (c_void_p, POINTER(Linear), c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "headrace_rms_norm": (None, (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p)),
    "headrace_gated_activation": (None, (c_int64, c_void_p, c_int64, c_int64, c_void_p)),
    "headrace_soft_cap": (None, (c_void_p, c_float, c_int64)),
    "headrace_rotary": (None, (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p)),
    "headrace_write_kv": (
        None,
        (POINTER(Cache), POINTER(Attention), c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "headrace_attention_workspace": (c_int64, (c_void_p, POINTER(Attention), POINTER(Batch))),
    "headrace_attention": (
        None,
        (
            c_void_p,
            POINTER(Attention),
            POINTER(Cache),
            POINTER(Batch),
            c_void_p,
            c_void_p,
            c_void_p,
        ),
    ),
    "headrace_probe_read": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "headrace_probe_fma": (c_int64, (c_void_p, c_void_p, c_int64, c_void_p)),
}


class LibraryUnavailable(Exception):
    """There is no compiled library for this machine; the text says why and what to do."""


class Library(NamedTuple):
    """A loaded build."""

    name: str
    functions: ctypes.CDLL

    def start_engine(self, owner: object, num_threads: int) -> int:
        """Start threads and workspace that live as long as `owner`; returns their handle.

        Raises:
            MemoryError: the threads cannot be had.
        """
        engine: int | None = self.functions.headrace_engine_create(num_threads)
        if engine is None:
            raise MemoryError(f"{num_threads} threads cannot be had; lower --cpu-threads")
        weakref.finalize(owner, self.functions.headrace_engine_destroy, engine)
        return engine


def load_library(folder: Path = FOLDER, flags: frozenset[str] | None = None) -> Library:
    """Load the best build in `folder` that a processor with `flags` (default: this one) runs.

    Raises:
        LibraryUnavailable: none was built, or it was built from other sources.
    """
    found = processor_flags() if flags is None else flags
    for build in BUILDS:
        path = folder / build.file_name
        if build.needs <= found and path.exists():
            return Library(build.name, _open(path))
    raise LibraryUnavailable(
        "the CPU kernels were not compiled when Headrace was installed; "
        "install a C compiler (gcc or clang) and install Headrace again"
    )


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first processor can do; nothing where the system does not say so."""
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return frozenset()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    flags = (value.split() for key, _, value in lines if key.strip() == "flags")
    return frozenset(next(flags, []))


def _open(path: Path) -> ctypes.CDLL:
    try:
        functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LibraryUnavailable(f"{path} cannot be used ({error}); install again") from error
    sizes = (c_int64 * len(STRUCTURES))()
    functions.headrace_abi_sizes(sizes)
    if [*sizes] != [ctypes.sizeof(structure) for structure in STRUCTURES]:
        raise LibraryUnavailable(f"{path} belongs to another version; install Headrace again")
    return functions
