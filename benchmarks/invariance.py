"""What batch invariance costs: our kernels, whose sums have one order, beside torch's.

A kernel that may choose its order by the number of rows can split the depth of a projection or the
context of attention as it pays best. Ours may not. Contenders take turns at the same shapes, on the
same threads; the best time counts. `equal` says whether row 0 of the batch has the very bits
that it has alone. Attention of torch gets keys and values that lie in one piece, ours in pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Bench
from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvSpec, allocate_kv_cache
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.interface import AttentionParams, Ops
from executor_svc.ops.native.library import load_library

# Projections and attention of the Qwen3-0.6B shape; weights rotate through more than a cache.
SHAPES = {"gate_up": (6144, 1024), "down": (1024, 3072)}
NUM_COPIES = 16
ROWS = (1, 2, 4, 8, 16, 32)
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 16
BATCHES = ((1, 2048), (8, 2048), (32, 512))


class Contender(NamedTuple):
    """`run` computes the first so many rows; `run_again` always with the same weight."""

    name: str
    run: Callable[[int], Tensor]
    run_again: Callable[[int], Tensor]

    def is_invariant(self, num_rows: int) -> bool:
        alone, together = self.run_again(1)[0], self.run_again(num_rows)[0]
        return torch.equal(alone, together)


def linear_contenders(native: NativeOps, shape: tuple[int, int]) -> list[Contender]:
    """Ours on bfloat16 weights; torch on them (oneDNN), and on float32 packed by MKL."""
    weights = [torch.randn(shape).mul_(0.02).bfloat16() for _ in range(NUM_COPIES)]
    x = torch.randn(max(ROWS), shape[1])
    return [
        _linear("ours, bfloat16", native, weights, x),
        _linear("torch, bfloat16", CpuOps(), weights, x.bfloat16()),
        _linear("torch, float32", CpuOps(), [weight.float() for weight in weights], x),
    ]


def _linear(name: str, ops: Ops, weights: list[Tensor], x: Tensor) -> Contender:
    prepared = [ops.prepare_linear(weight) for weight in weights]
    turns = cycle(prepared)
    return Contender(
        name,
        lambda num_rows: ops.linear(x[:num_rows], next(turns)),
        lambda num_rows: ops.linear(x[:num_rows], prepared[0]),
    )


def attention_contenders(native: NativeOps, num_seqs: int, context: int) -> list[Contender]:
    """Ours over pages; torch over contiguous copies, bfloat16 and float32."""
    per_seq = context // BLOCK_SIZE
    cache = allocate_kv_cache(
        KvSpec(1, KV_HEADS, HEAD_DIM, torch.bfloat16), num_seqs * per_seq + 1, BLOCK_SIZE
    )
    (layer,) = cache.layers
    layer.key.normal_()
    layer.value.normal_()
    query = torch.randn(num_seqs, HEADS, HEAD_DIM).bfloat16()
    blocks = (1 + torch.randperm(num_seqs * per_seq)).view(num_seqs, per_seq)

    def ours(count: int) -> Tensor:
        return native.paged_attention(query[:count], layer, plans[count], params)

    spans = [Span([7], context - 1, row) for row in blocks.tolist()]
    batches = {n: ForwardBatch.from_spans(spans[:n], BLOCK_SIZE) for n in (1, num_seqs)}
    plans = {n: native.plan_attention(batch, cache) for n, batch in batches.items()}
    params = AttentionParams(HEAD_DIM**-0.5)
    flat = [
        part[blocks].transpose(1, 2).reshape(num_seqs, KV_HEADS, context, HEAD_DIM).contiguous()
        for part in (layer.key, layer.value)
    ]
    return [
        Contender("ours, bfloat16", ours, ours),
        _torch_attention("torch, bfloat16", query, flat),
        _torch_attention("torch, float32", query.float(), [part.float() for part in flat]),
    ]


def _torch_attention(name: str, query: Tensor, flat: list[Tensor]) -> Contender:
    rows, (key, value) = query.unsqueeze(2), flat

    def run(count: int) -> Tensor:
        return F.scaled_dot_product_attention(
            rows[:count], key[:count], value[:count], enable_gqa=True
        )

    return Contender(name, run, run)


def compare(name: str, contenders: list[Contender], num_rows: int, bench: Bench) -> None:
    """One line for each contender; the ratio is its time over ours."""
    times = bench.best(*(partial(contender.run, num_rows) for contender in contenders))
    for contender, seconds in zip(contenders, times, strict=True):
        is_equal = "yes" if contender.is_invariant(num_rows) else "no"
        print(
            f"{name:24} {contender.name:16} {seconds * 1e3:>9.3f} {is_equal:>6} "
            f"{seconds / times[0]:>7.2f}",
            flush=True,
        )


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2, help="a round of one contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native = NativeOps(load_library(), arguments.threads)
    bench = Bench(arguments.rounds, arguments.seconds)
    print(f"{'':24} {'':16} {'ms':>9} {'equal':>6} {'/ ours':>7}")
    for name, shape in SHAPES.items():
        contenders = linear_contenders(native, shape)
        for rows in ROWS:
            compare(f"{name}, {rows} rows", contenders, rows, bench)
    for num_seqs, context in BATCHES:
        contenders = attention_contenders(native, num_seqs, context)
        compare(f"attention {num_seqs} at {context}", contenders, num_seqs, bench)


if __name__ == "__main__":
    main()
