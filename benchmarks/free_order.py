"""What the fixed order of sums costs inside our own kernels, at the two places where it could.

Projections of one row: more sums side by side, or the depth split over threads (free_order.c).
Attention of one row: the context is split at fixed places, every 256 tokens; here the kernels are
compiled with other sizes too, and a free choice would be the best of them for each context.
Contenders take turns on the same threads; the best time of each counts. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from ctypes import POINTER, byref, c_int64, c_void_p
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.invariance import attention_contenders
from benchmarks.kernels import Bench
from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native.abi import Linear
from executor_svc.ops.native.describe import describe_linear
from executor_svc.ops.native.library import INTERFACE, Library
from stages.native_library import open_library

SOURCES = Path(__file__).parents[1] / "executor_svc" / "ops" / "native"
DRIVER = Path(__file__).with_suffix(".c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast")
SIGNATURE = (c_void_p, POINTER(Linear), c_void_p, c_int64, c_int64, c_void_p, c_void_p)
# The projections of the Qwen3-0.6B shape, in memory; then two that stay in L2 and L1.
SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (256, 1024), (192, 64))
CACHED_BYTES, BYTES_OF_COPIES = 2**20, 2**27
LinearCall = Callable[[Tensor, LinearWeight], Tensor]
# Sums side by side, and segments of the depth that threads share.
ORDERS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
OWN_SPLIT, SPLITS = 256, (64, 128, 512, 1024)
SPLIT_LINE, STRIDE_LINE = f"SPLIT = {OWN_SPLIT},", f"ROW_STRIDE = {OWN_SPLIT} + 16,"
CONTEXTS = (128, 512, 2048, 8192)


def compile_library(folder: Path, sources: Path, source: Path) -> Library:
    """Compile one source beside the kernels for this very processor."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        sys.exit("there is no C compiler: install gcc")
    target = folder / "libprivate.so"
    command = [compiler, *FLAGS, "-shared", "-fPIC", f"-I{sources}", str(source), "-o", str(target)]
    subprocess.run([*command, "-lm", "-lpthread"], check=True)
    return Library("private", open_library(target, INTERFACE))


def with_split(folder: Path, split: int) -> Library:
    """The kernels with the context split every `split` tokens."""
    for path in SOURCES.glob("*.[ch]"):
        shutil.copy(path, folder)
    header = folder / "attention_split.h"
    text = header.read_text()
    if SPLIT_LINE not in text or STRIDE_LINE not in text:
        sys.exit(f"{header.name} does not say {SPLIT_LINE!r} and {STRIDE_LINE!r} any more")
    text = text.replace(SPLIT_LINE, f"SPLIT = {split},")
    header.write_text(text.replace(STRIDE_LINE, f"ROW_STRIDE = {max(split, OWN_SPLIT)} + 16,"))
    return compile_library(folder, folder, folder / "headrace.c")


def compare_linear(native: NativeOps, shape: tuple[int, int], bench: Bench) -> None:
    """One line: the fixed order, and the others relative to it; last our kernel, which has it."""
    out_size, in_size = shape
    num_bytes = 2 * out_size * in_size
    copies = BYTES_OF_COPIES // num_bytes if num_bytes > CACHED_BYTES else 1
    weights = [
        native.prepare_linear(torch.randn(shape).mul_(0.02).bfloat16()) for _ in range(copies)
    ]
    x = torch.randn(1, in_size)
    runs: list[LinearCall] = [partial(_free_linear, native, *order) for order in ORDERS]
    if not torch.equal(runs[0](x, weights[0]), native.linear(x, weights[0])):
        sys.exit("the kernel's order is not that of free_order.c any more")
    own, *others = bench.best(*(_rotate(run, x, weights) for run in (*runs, native.linear)))
    print(f"linear {out_size} x {in_size:<6} {own * 1e6:>9.1f} us", _ratios(own, others))


def _rotate(linear: LinearCall, x: Tensor, weights: list[LinearWeight]) -> Callable[[], Tensor]:
    turns = cycle(weights)
    return lambda: linear(x, next(turns))


def _free_linear(
    native: NativeOps, chains: int, segments: int, x: Tensor, weight: LinearWeight
) -> Tensor:
    out_size, in_size = weight.weight.shape
    out = torch.empty(1, out_size)
    space = torch.empty(in_size + 1 + segments * (out_size + 64))
    native.functions.free_order_linear(
        native.pool,
        byref(describe_linear(weight)),
        x.data_ptr(),
        chains,
        segments,
        out.data_ptr(),
        space.data_ptr(),
    )
    return out


def _ratios(own: float, others: list[float]) -> str:
    return "  ".join(f"{seconds / own:>6.2f}" for seconds in others)


def compare_attention(kernels: list[NativeOps], context: int, bench: Bench) -> None:
    """One line: our kernel, and the other splits relative to it; the first is ours."""
    calls = [partial(attention_contenders(native, 1, context)[0].run, 1) for native in kernels]
    own, *others = bench.best(*calls)
    print(f"attention 1 at {context:<6} {own * 1e6:>9.1f} us", _ratios(own, others))


@torch.inference_mode()
def main() -> None:
    """Print two tables of times; ratios are to the fixed order: below 1 a free one would gain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.05, help="a round of one contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.rounds, arguments.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {split: Path(scratch) / str(split) for split in (0, OWN_SPLIT, *SPLITS)}
        for folder in folders.values():
            folder.mkdir()
        private = compile_library(folders.pop(0), SOURCES, DRIVER)
        private.functions.free_order_linear.restype = None
        private.functions.free_order_linear.argtypes = SIGNATURE
        kernels = [
            NativeOps(with_split(folder, split), arguments.threads)
            for split, folder in folders.items()
        ]
        orders = "  ".join(f"{chains} x {segments:<2}" for chains, segments in ORDERS[1:])
        print(f"{'sums side by side x segments of the depth':42} {orders}  kernel")
        for shape in SHAPES:
            compare_linear(NativeOps(private, arguments.threads), shape, bench)
        print(f"{f'context split every {OWN_SPLIT}, and every':42}", *(f"{s:<7}" for s in SPLITS))
        for context in CONTEXTS:
            compare_attention(kernels, context, bench)


if __name__ == "__main__":
    main()
