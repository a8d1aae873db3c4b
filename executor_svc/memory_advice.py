"""Gives memory that a load has done with back to the system: file pages and holes in the heap."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_int, c_size_t, c_void_p


def advise_unneeded(address: int, num_bytes: int) -> None:
    """Drop the whole pages of a read-only file mapping that lie in this range.

    Advice only: a page that is read again comes from the file's cache, and a kernel that refuses
    does no harm.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (c_void_p, c_size_t, c_int)
        madvise(first, last - first, mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Return free pages inside the heap, which glibc keeps; other C libraries lack the call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(c_size_t(0))
