"""What this machine can do at most, measured: what the shares in benchmarks are shares of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch

from executor_svc.ops.native.describe import DTYPE_CODES
from executor_svc.ops.native.library import Library
from executor_svc.ops.native.packing import allocate_pages

PROBE_CHUNK = 1 << 16  # floats, as in probe.c
PROBE_BYTES = 256 << 20  # more than any cache holds
ROUNDS, ROUND_S = 3, 0.3
MOMENT_S = 0.1


class Limits(NamedTuple):
    """Bytes read from memory and operations on weights a second (a multiply-add is two)."""

    read: float
    flops: float


class Probe:
    """The two probes of probe.c on threads of their own, which end with it.

    `dtype` is that of the weights: a dot product of bfloat16 does two operations in the time of
    one.
    """

    def __init__(self, library: Library, num_threads: int, dtype: torch.dtype) -> None:
        self._functions = library.functions
        self._dtype_code = DTYPE_CODES[dtype]
        self._pool = self._functions.headrace_engine_pool(library.start_engine(self, num_threads))
        self._memory = allocate_pages(PROBE_BYTES // 4, torch.float32).fill_(1.0)
        self._factors = torch.full((64,), 1e-3)
        self._out = torch.empty(PROBE_BYTES // 4 // PROBE_CHUNK)

    def measure_limits(self) -> Limits:
        """Measure both for about a second each; the best pass counts."""
        rates = [
            (max(_rates(self._read, ROUND_S)), max(_rates(self._multiply, ROUND_S)))
            for _ in range(ROUNDS)
        ]
        return Limits(*map(max, zip(*rates, strict=True)))

    def read_now(self) -> float:
        """Bytes read a second at this moment: the median pass of a short while."""
        return median(_rates(self._read, MOMENT_S))

    def _read(self) -> int:
        """Read the memory once; returns how many bytes that are."""
        chunks, out = self._out.numel(), self._out.data_ptr()
        self._functions.headrace_probe_read(self._pool, self._memory.data_ptr(), chunks, out)
        return PROBE_BYTES

    def _multiply(self) -> int:
        """Multiply and add in registers; returns the number of operations."""
        chunks, out = self._out.numel(), self._out.data_ptr()
        count: int = self._functions.headrace_probe_multiply(
            self._pool, self._factors.data_ptr(), chunks, out, self._dtype_code
        )
        return 2 * count


def measure_limits(
    library: Library, num_threads: int, dtype: torch.dtype = torch.float32
) -> Limits:
    """What `Probe` measures, for those who ask once."""
    return Probe(library, num_threads, dtype).measure_limits()


def _rates(work: Callable[[], int], duration_s: float) -> Iterator[float]:
    """The amount of work a second of each pass within `duration_s`; one pass at least."""
    end = time.perf_counter() + duration_s
    while True:
        begin = time.perf_counter()
        amount = work()
        now = time.perf_counter()
        yield amount / (now - begin)
        if now >= end:
            return
