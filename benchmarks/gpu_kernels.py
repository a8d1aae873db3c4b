"""Each CUDA kernel alone, in the shapes of Qwen3 8B, against what the GPU's memory or units give.

For tuning: prints time, bytes or operations a second, and their share of a measured ceiling (a
large copy; a large bfloat16 product), for the kernel and for what torch has in its place. Inputs
are rotated, so that none lies in the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from gpu import copy_bandwidth

from executor_svc.accelerator.cuda import CudaDevice
from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import KvSpec
from executor_svc.ops.interface import AttentionParams, LinearWeight
from sampler_svc.draw import draw_from_top_p, token_weights
from stages.errors import HeadraceError

HIDDEN, INTERMEDIATE, VOCAB_SIZE = 4096, 12288, 151936
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZE = 16
DTYPE = torch.bfloat16
# Beyond the 50 MB of an H200's cache, several times.
ROTATED_BYTES = 400 * 2**20
MAX_ROTATED = 64
REPEATS = 50


@dataclass(frozen=True)
class Ceilings:
    """What the card was seen to do: bytes and bfloat16 operations a second."""

    bytes_per_s: float
    operations_per_s: float


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median GPU time of one call, each of the calls in a captured graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times)


def show(name: str, spent: float, done: float, ceiling: float) -> None:
    """One line; `done` and `ceiling`: bytes, or operations, and those a second."""
    print(f"{name:<44}{spent * 1e6:>10.1f} us{done / spent / ceiling:>8.1%}", flush=True)


def copies_of(num_bytes: int) -> int:
    """How many inputs of this size are rotated."""
    return min(max(ROTATED_BYTES // num_bytes, 2), MAX_ROTATED)


def random(*shape: int) -> torch.Tensor:
    """Half precision on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def products(device: CudaDevice, ceilings: Ceilings) -> None:
    """The projections of one token: the kernel and cuBLAS."""
    for name, out_size, in_size in (
        ("qkv", (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, HIDDEN),
        ("output", HIDDEN, NUM_HEADS * HEAD_DIM),
        ("gate_up", 2 * INTERMEDIATE, HIDDEN),
        ("down", HIDDEN, INTERMEDIATE),
        ("head", VOCAB_SIZE, HIDDEN),
    ):
        num_bytes = out_size * in_size * DTYPE.itemsize
        weights = [LinearWeight(random(out_size, in_size)) for _ in range(copies_of(num_bytes))]
        x = random(1, in_size)
        ours = [partial(device.ops.linear, x, weight) for weight in weights]
        theirs = [partial(F.linear, x, weight.weight) for weight in weights]
        show(f"{name}, one token", seconds(ours), num_bytes, ceilings.bytes_per_s)
        show(f"{name}, one token, cuBLAS", seconds(theirs), num_bytes, ceilings.bytes_per_s)


def attention_calls(device: CudaDevice, batch: ForwardBatch) -> list[Callable[[], object]]:
    """Calls that read different layers of one cache."""
    block_bytes = KvSpec(1, NUM_KV_HEADS, HEAD_DIM, DTYPE).block_bytes(BLOCK_SIZE)
    num_blocks = int(batch.block_tables.max()) + 1
    num_layers = copies_of(num_blocks * block_bytes)
    spec = KvSpec(num_layers, NUM_KV_HEADS, HEAD_DIM, DTYPE)
    cache = device.allocate_kv_cache(spec, num_blocks, BLOCK_SIZE)
    for layer in cache.layers:
        layer.key.normal_()
        layer.value.normal_()
    query = random(batch.num_tokens, NUM_HEADS, HEAD_DIM)
    plan = device.ops.plan_attention(batch, cache)
    params = AttentionParams(HEAD_DIM**-0.5)
    attend = device.ops.paged_attention
    return [partial(attend, query, layer, plan, params) for layer in cache.layers]


def make_batch(num_rows: int, query_len: int, seq_len: int) -> ForwardBatch:
    """Rows of equal lengths, their blocks scattered over the cache."""
    blocks_per_row = -(-seq_len // BLOCK_SIZE)
    ids = 1 + torch.randperm(num_rows * blocks_per_row, device="cuda").int()
    num_tokens = num_rows * query_len
    zeros = torch.zeros(num_tokens, dtype=torch.int64, device="cuda")
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device="cuda") * query_len
    return ForwardBatch(
        token_ids=zeros,
        positions=zeros,
        slot_mapping=zeros,
        query_start=starts,
        seq_lens=torch.full((num_rows,), seq_len, dtype=torch.int32, device="cuda"),
        block_tables=ids.view(num_rows, blocks_per_row),
        logits_indices=starts[1:].long() - 1,
        query_lens_host=(query_len,) * num_rows,
        seq_lens_host=(seq_len,) * num_rows,
        max_query_len=query_len,
        max_seq_len=seq_len,
        num_decode_rows=num_rows if query_len == 1 else 0,
    )


def attentions(device: CudaDevice, ceilings: Ceilings) -> None:
    """Decode by the bytes that it reads, prefill by its operations (the visible half)."""
    token_bytes = 2 * NUM_KV_HEADS * HEAD_DIM * DTYPE.itemsize
    for num_rows, seq_len in ((1, 512), (1, 4096), (1, 32768), (64, 1024), (256, 1024)):
        spent = seconds(attention_calls(device, make_batch(num_rows, 1, seq_len)))
        done = num_rows * seq_len * token_bytes
        show(f"decode, {num_rows} rows of {seq_len}", spent, done, ceilings.bytes_per_s)
    for num_rows, seq_len in ((1, 2048), (1, 8192), (16, 512)):
        spent = seconds(attention_calls(device, make_batch(num_rows, seq_len, seq_len)))
        done = 2 * num_rows * seq_len**2 * NUM_HEADS * HEAD_DIM
        show(f"prefill, {num_rows} rows of {seq_len}", spent, done, ceilings.operations_per_s)


def rows(device: CudaDevice, ceilings: Ceilings) -> None:
    """Norm and activation, at one token and at a prompt's."""
    weight = random(HIDDEN)
    for num_tokens in (1, 64, 4096):
        count = copies_of(num_tokens * HIDDEN * DTYPE.itemsize)
        inputs = [random(num_tokens, HIDDEN) for _ in range(count)]
        norms = [partial(device.ops.add_rms_norm, x, inputs[0], weight, 1e-6) for x in inputs]
        done = 4 * inputs[0].nbytes
        show(f"add_rms_norm, {num_tokens} tokens", seconds(norms), done, ceilings.bytes_per_s)
        wide = [random(num_tokens, 2 * INTERMEDIATE) for _ in range(max(count // 8, 2))]
        gates = [partial(device.ops.swiglu, x) for x in wide]
        done = wide[0].nbytes * 3 // 2
        show(f"swiglu, {num_tokens} tokens", seconds(gates), done, ceilings.bytes_per_s)


def draws(device: CudaDevice, ceilings: Ceilings) -> None:
    """A nucleus of 0.95: without sorting, and as torch sorts it. Ceiling: the weights once."""
    draw = device.draw_from_likeliest
    assert draw is not None
    for num_rows in (1, 64, 256):
        logits = 3 * torch.randn(num_rows, VOCAB_SIZE, device="cuda")
        weights = token_weights(logits, torch.ones(num_rows, 1, device="cuda"), None)
        uniforms = torch.rand(num_rows, dtype=torch.float64, device="cuda")
        top_p = torch.full((num_rows, 1), 0.95, dtype=torch.float64, device="cuda")
        ours, theirs = draw(weights, uniforms, None, top_p), draw_from_top_p
        assert torch.equal(ours, theirs(weights, uniforms, top_p)), "another token was drawn"
        for name, call in (
            ("bisected", partial(draw, weights, uniforms, None, top_p)),
            ("sorted", partial(theirs, weights, uniforms, top_p)),
        ):
            spent = seconds([call])
            show(f"top-p, {num_rows} rows, {name}", spent, weights.nbytes, ceilings.bytes_per_s)


PARTS = {"products": products, "attentions": attentions, "rows": rows, "draws": draws}


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    try:
        device = CudaDevice()
    except HeadraceError as error:
        sys.exit(f"gpu_kernels.py: {error}")
    square = random(8192, 8192)
    ceilings = Ceilings(
        copy_bandwidth(), 2 * 8192**3 / seconds([partial(torch.mm, square, square)])
    )
    print(
        f"copy {ceilings.bytes_per_s / 1e9:.0f} GB/s, "
        f"bfloat16 products {ceilings.operations_per_s / 1e12:.0f} TFLOP/s"
    )
    with torch.inference_mode():
        for name in arguments.parts:
            PARTS[name](device, ceilings)


if __name__ == "__main__":
    main()
