"""The compiled sampling head: where it lies and what it exports."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

from sampler_svc.native.abi import STRUCTURES, Choice, Logprobs
from stages.native_library import AUTO, Interface, find_build, open_library

FOLDER = Path(__file__).parent
NAME = "sampling"
INTERFACE = Interface(
    signatures={
        "sampling_create": (c_void_p, (c_int64, c_int64)),
        "sampling_destroy": (None, (c_void_p,)),
        "sampling_choose_tokens": (None, (c_void_p, POINTER(Choice))),
        "sampling_logprobs": (None, (c_void_p, POINTER(Logprobs))),
        "sampling_token_masses": (None, (c_void_p, c_int64, c_float, c_float, c_void_p)),
    },
    sizes_function="sampling_abi_sizes",
    structures=STRUCTURES,
)


class SamplingLibrary(NamedTuple):
    """A loaded build."""

    name: str
    functions: ctypes.CDLL

    def start_head(self, owner: object, num_threads: int, vocab_size: int) -> int:
        """Start threads, each with memory, that live as long as `owner`; returns their handle.

        Raises:
            MemoryError: they cannot be had.
        """
        head: int | None = self.functions.sampling_create(num_threads, vocab_size)
        if head is None:
            raise MemoryError(
                f"{num_threads} threads that sample from {vocab_size} tokens cannot be had; "
                "lower --cpu-threads"
            )
        weakref.finalize(owner, self.functions.sampling_destroy, head)
        return head


def load_library(
    folder: Path = FOLDER, flags: frozenset[str] | None = None, choice: str = AUTO
) -> SamplingLibrary:
    """Load the best build in `folder` that a processor with `flags` (default: this one) runs.

    `choice`: auto, or the name of the build that it shall be.

    Raises:
        LibraryUnavailable: none was built, or it was built from other sources.
        ConfigError: the chosen one was not built, or this processor cannot run it.
    """
    build, path = find_build(folder, NAME, flags, choice)
    return SamplingLibrary(build.name, open_library(path, INTERFACE))
