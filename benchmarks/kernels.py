"""How near the compiled CPU kernels come to what this machine can do, and to the torch path.

First measures the limits, read bandwidth and multiply-adds (for bfloat16 weights with the dot
product where the processor has one), with the same threads; then each kernel and whole steps of
model folders. Contenders take turns and the best time of each counts: other processes only ever
add to a time. `memory` and `arithmetic` are shares of the limits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvCache, KvSpec, allocate_kv_cache
from executor_svc.model_config import load_model_config
from executor_svc.models.cpu import load_fused_decoder
from executor_svc.models.decoder_config import parse_decoder_config
from executor_svc.models.model import Model
from executor_svc.models.registry import load_model
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.cpu_native import NativeOps
from executor_svc.ops.interface import AttentionParams, LinearWeight, Ops
from executor_svc.ops.native.library import Library, load_library
from executor_svc.ops.native.limits import measure_limits
from executor_svc.ops.native.quantized_packing import QuantizedPacker
from executor_svc.ops.native.screening import make_screen
from executor_svc.quantization.weight import Layout, QuantizedWeight

Call = Callable[[], object]
BLOCK_SIZE = 16
DTYPES = (torch.bfloat16, torch.float32)
# A projection and attention of the Qwen3-0.6B shape; weights rotate through more than a cache.
OUT_SIZE, IN_SIZE, NUM_COPIES = 6144, 1024, 16
GROUP = 128
# Heads of a tiny model and of the Qwen3-0.6B shape.
HEAD_SHAPES = ((32768, 64), (32768, 1024))
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128


class Bench:
    """Times contenders in turns, for a number of rounds of a given length."""

    def __init__(self, rounds: int, seconds: float) -> None:
        self._rounds = rounds
        self._seconds = seconds

    def best(self, *contenders: Call) -> list[float]:
        """The shortest time in seconds of one call of each."""
        found = [float("inf")] * len(contenders)
        for _ in range(self._rounds):
            for index, call in enumerate(contenders):
                found[index] = min(found[index], *self._round(call))
        return found

    def _round(self, call: Call) -> Iterator[float]:
        end = time.perf_counter() + self._seconds
        while True:
            begin = time.perf_counter()
            call()
            now = time.perf_counter()
            yield now - begin
            if now > end:
                return


class Report:
    """One line a measurement; shares are of what the machine can do with weights of its dtype."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self._limits = {dtype: measure_limits(library, num_threads, dtype) for dtype in DTYPES}
        for dtype, limits in self._limits.items():
            print(
                f"read {limits.read / 1e9:.1f} GB/s, "
                f"multiply-adds in {_name(dtype)} {limits.flops / 1e9:.0f} GFLOP/s"
            )
        print(f"{'':34} {'ms':>9} {'memory':>7} {'arithmetic':>11} {'torch ms':>9} {'ratio':>6}")

    def line(
        self,
        name: str,
        dtype: torch.dtype,
        seconds: float,
        num_bytes: float,
        flops: float,
        torch_s: float,
    ) -> None:
        limits = self._limits[dtype]
        print(
            f"{name:34} {seconds * 1e3:9.3f} {num_bytes / seconds / limits.read:7.0%} "
            f"{flops / seconds / limits.flops:11.0%} {torch_s * 1e3:9.3f} "
            f"{torch_s / seconds:6.1f}",
            flush=True,
        )


def bench_linear(native: NativeOps, bench: Bench, report: Report) -> None:
    for dtype in DTYPES:
        weights = [torch.randn(OUT_SIZE, IN_SIZE).to(dtype) for _ in range(NUM_COPIES)]
        calls = [_rotating(native, weights), _rotating(CpuOps(), [w.float() for w in weights])]
        for rows in (1, 8, 32, 256):
            x = torch.randn(rows, IN_SIZE)
            seconds, torch_s = bench.best(*(partial(call, x) for call in calls))
            size = OUT_SIZE * IN_SIZE
            name = f"linear {rows} rows, {_name(dtype)}"
            num_bytes = size * dtype.itemsize
            report.line(name, dtype, seconds, num_bytes, 2 * size * rows, torch_s)


def bench_quantized_linear(
    native: NativeOps, packer: QuantizedPacker, bench: Bench, report: Report
) -> None:
    """Beside bfloat16 on the same kernels, which stands where the others have torch."""
    weights = [torch.randn(OUT_SIZE, IN_SIZE) for _ in range(NUM_COPIES)]
    plain = _rotating(native, [weight.bfloat16() for weight in weights])
    kinds = {
        "int8": [packer.quantize_linear(w, int8_activations=False) for w in weights],
        "w8a8": [packer.quantize_linear(w, int8_activations=True) for w in weights],
        "int4, groups of 128": [packer.prepare_quantized(_int4(w)) for w in weights],
    }
    for rows in (1, 8, 32, 256):
        x = torch.randn(rows, IN_SIZE)
        for name, prepared in kinds.items():
            call = partial(_call_next, native, cycle(prepared), x)
            seconds, plain_s = bench.best(call, partial(plain, x))
            flops, num_bytes = 2 * OUT_SIZE * IN_SIZE * rows, prepared[0].num_bytes
            name = f"linear {rows} rows, {name}"
            report.line(name, torch.float32, seconds, num_bytes, flops, plain_s)


def _int4(weight: torch.Tensor) -> QuantizedWeight:
    scales = weight.view(OUT_SIZE, -1, GROUP).abs().amax(-1) / 7
    codes = weight / scales.repeat_interleave(GROUP, 1)
    return QuantizedWeight(Layout(4, GROUP), codes.round().to(torch.int8), scales)


def _rotating(ops: Ops, weights: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    prepared = cycle([ops.prepare_linear(weight) for weight in weights])
    return lambda x: _call_next(ops, prepared, x)


def _call_next(ops: Ops, prepared: Iterator[LinearWeight], x: torch.Tensor) -> torch.Tensor:
    return ops.linear(x, next(prepared))


def bench_head(native: NativeOps, bench: Bench, report: Report) -> None:
    """The likeliest token by way of the screen, beside the full search, which stands where the
    others have torch. Bytes and operations are those of the full search.
    """
    for size, depth in HEAD_SHAPES:
        head = native.prepare_linear(torch.randn(size, depth).bfloat16())
        screen = make_screen(native.functions, native.pool, head)
        for rows in (1, 8, 32, 128):
            x = torch.randn(rows, depth)
            screened = partial(native.choose_tokens, x, head, screen)
            seconds, full_s = bench.best(screened, partial(native.choose_tokens, x, head))
            name = f"greedy head {size} x {depth}, {rows} rows"
            flops = 2 * size * depth * rows
            report.line(name, torch.bfloat16, seconds, head.num_bytes, flops, full_s)


def bench_attention(native: NativeOps, bench: Bench, report: Report) -> None:
    for num_seqs, context, queries in ((1, 2048, 1), (8, 2048, 1), (1, 1280, 256)):
        for dtype in DTYPES:
            spec = KvSpec(1, KV_HEADS, HEAD_DIM, dtype)
            batch, cache = _batch_and_cache(spec, num_seqs, context, queries)
            query = torch.randn(num_seqs * queries, HEADS, HEAD_DIM).to(dtype)
            calls = [_attention(ops, query, batch, cache) for ops in (native, CpuOps())]
            seconds, torch_s = bench.best(*calls)
            num_bytes = num_seqs * context * KV_HEADS * HEAD_DIM * 2 * dtype.itemsize
            pairs = num_seqs * queries * (context - (queries - 1) / 2)
            name = f"attention {num_seqs} x {queries} at {context}, {_name(dtype)}"
            flops = 4 * pairs * HEADS * HEAD_DIM  # attention multiplies in float32
            report.line(name, torch.float32, seconds, num_bytes, flops, torch_s)


def _attention(ops: Ops, query: torch.Tensor, batch: ForwardBatch, cache: KvCache) -> Call:
    plan, params = ops.plan_attention(batch, cache), AttentionParams(HEAD_DIM**-0.5)
    return lambda: ops.paged_attention(query, cache.layers[0], plan, params)


def bench_steps(folder: Path, bench: Bench, report: Report) -> None:
    config = load_model_config(folder)
    models: list[Model] = [
        load_fused_decoder(config, "bfloat16", load_library()),
        load_model(folder, config, "float32", CpuOps()),
    ]
    shape = parse_decoder_config(config)
    heads, dim, hidden = shape.num_heads + shape.num_kv_heads, shape.head_dim, shape.hidden_size
    layer = hidden * (2 * heads * dim + 3 * shape.intermediate_size)
    layers, head = shape.num_layers * layer, shape.vocab_size * hidden
    for num_seqs, context, queries in ((1, 256, 1), (8, 256, 1), (64, 256, 1), (1, 256, 256)):
        calls = [_step(model, num_seqs, context, queries) for model in models]
        seconds, torch_s = bench.best(*calls)
        kv = models[0].kv_spec.block_bytes(1) * num_seqs * context
        pairs = num_seqs * queries * (context - (queries - 1) / 2)
        flops = 2 * num_seqs * (queries * layers + head)
        flops += 4 * pairs * shape.num_layers * shape.num_heads * dim
        name = f"{folder.name} {num_seqs} x {queries} at {context}"
        report.line(name, torch.bfloat16, seconds, 2 * (layers + head) + kv, flops, torch_s)


def _step(model: Model, num_seqs: int, context: int, queries: int) -> Call:
    batch, cache = _batch_and_cache(model.kv_spec, num_seqs, context, queries)
    return lambda: model.forward(batch, cache)


def _batch_and_cache(
    spec: KvSpec, num_seqs: int, context: int, queries: int
) -> tuple[ForwardBatch, KvCache]:
    """The last `queries` tokens of contexts whose blocks lie scattered."""
    per_seq = -(-context // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    blocks = (1 + torch.randperm(num_seqs * per_seq, generator=generator)).view(num_seqs, per_seq)
    spans = [Span([7] * queries, context - queries, row) for row in blocks.tolist()]
    cache = allocate_kv_cache(spec, num_seqs * per_seq + 1, BLOCK_SIZE)
    for layer in cache.layers:
        layer.key.normal_()
        layer.value.normal_()
    return ForwardBatch.from_spans(spans, BLOCK_SIZE), cache


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="*", type=Path, help="folders of native families")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="a round of one contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = load_library()
    native = NativeOps(library, arguments.threads)
    bench = Bench(arguments.rounds, arguments.seconds)
    report = Report(library, arguments.threads)
    bench_linear(native, bench, report)
    bench_quantized_linear(native, QuantizedPacker(library), bench, report)
    bench_head(native, bench, report)
    bench_attention(native, bench, report)
    for folder in arguments.model:
        bench_steps(folder, bench, report)


if __name__ == "__main__":
    main()
