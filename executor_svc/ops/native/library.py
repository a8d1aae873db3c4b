"""The compiled kernels: where they lie and what they export.

ctypes calls release the GIL. Knows nothing of torch.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

from executor_svc.ops.native.abi import STRUCTURES, Attention, Batch, Cache, Decoder, Linear
from stages.native_library import (
    AUTO,
    BUILDS,
    Interface,
    LibraryUnavailable,
    Signatures,
    find_build,
    open_library,
    processor_flags,
)

__all__ = [
    "BUILDS",
    "MAX_HEAD_DIM",
    "Library",
    "LibraryUnavailable",
    "load_library",
    "processor_flags",
]

FOLDER = Path(__file__).parent
NAME = "headrace"
MAX_HEAD_DIM = 256
# Result and argument types of what the library exports.
SIGNATURES: Signatures = {
    "headrace_engine_create": (c_void_p, (c_int64,)),
    "headrace_engine_destroy": (None, (c_void_p,)),
    "headrace_engine_pool": (c_void_p, (c_void_p,)),
    "headrace_decoder_step": (
        c_int64,
        (c_void_p, POINTER(Decoder), POINTER(Cache), POINTER(Batch)),
    ),
    "headrace_packed_elements": (c_int64, (c_int64, c_int64, c_int64)),
    "headrace_panel_width": (c_int64, ()),
    "headrace_depth_group": (c_int64, (c_int64,)),
    "headrace_pack_weight": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "headrace_dot_layout": (None, (POINTER(c_int64), POINTER(c_int64), POINTER(c_int64))),
    "headrace_quantize_weight": (
        None,
        (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    ),
    "headrace_linear_workspace": (c_int64, (c_int64, c_int64)),
    "headrace_linear": (
        None,
        (c_void_p, POINTER(Linear), c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "headrace_screen_bytes": (c_int64, (c_int64, c_int64)),
    "headrace_make_screen": (c_int64, (c_void_p, POINTER(Linear), c_void_p)),
    "headrace_greedy_workspace": (c_int64, (POINTER(Linear), c_int64)),
    "headrace_choose_tokens": (
        None,
        (
            c_void_p,
            POINTER(Linear),
            c_void_p,
            c_float,
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
        ),
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
    "headrace_probe_multiply": (c_int64, (c_void_p, c_void_p, c_int64, c_void_p, c_int64)),
}
INTERFACE = Interface(SIGNATURES, "headrace_abi_sizes", STRUCTURES)


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


def load_library(
    folder: Path = FOLDER, flags: frozenset[str] | None = None, choice: str = AUTO
) -> Library:
    """Load the best build in `folder` that a processor with `flags` (default: this one) runs.

    `choice`: auto, or the name of the build that it shall be.

    Raises:
        LibraryUnavailable: none was built, or it was built from other sources.
        ConfigError: the chosen one was not built, or this processor cannot run it.
    """
    build, path = find_build(folder, NAME, flags, choice)
    return Library(build.name, open_library(path, INTERFACE))
