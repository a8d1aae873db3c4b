"""Compiles the CUDA backend's kernels for an H200 on a machine that has none.

Run as a program, it prints JSON: by kernel, registers a thread, bytes of local memory (spills) and
of shared memory. The operators run as they are, on CPU tensors; the launch alone is left out.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from executor_svc.batch import ForwardBatch, Span
from executor_svc.kv_cache import KvSpec, LayerKv, allocate_kv_cache
from executor_svc.ops.cuda.nucleus import draw_from_likeliest
from executor_svc.ops.cuda.ops import CudaAttentionPlan, CudaOps
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import AttentionParams, QkNorms

BLOCK_SIZE = 16
HEADS, KV_HEADS = 32, 8
DTYPE = torch.bfloat16


class AbsentHopper:
    """The part of Triton's driver that compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(found: dict[str, Any], prefix: str) -> Iterator[None]:
    """Collect the kernels that are launched within, and launch none."""
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[f"{prefix} {self.__name__.strip('_')}"] = run(
            self, *args, grid=grid, warmup=True, **kwargs
        )

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def make_plan(ops: CudaOps, head_dim: int) -> tuple[CudaAttentionPlan, LayerKv]:
    """A decoding sequence, a prompt, and a layer of the cache."""
    spans = [Span([0], 16, [1, 2]), Span([0] * 40, 0, [3, 4, 5])]
    batch = ForwardBatch.from_spans(spans, BLOCK_SIZE)
    cache = allocate_kv_cache(KvSpec(1, KV_HEADS, head_dim, DTYPE), 6, BLOCK_SIZE)
    return ops.plan_attention(batch, cache), cache.layers[0]


def launch_attention(head_dim: int) -> None:
    """Decode and prefill attention, of Qwen3 8B but for the size of the heads."""
    ops = CudaOps(Fallbacks())
    plan, layer = make_plan(ops, head_dim)
    query = torch.zeros(41, HEADS, head_dim, dtype=DTYPE)
    ops.paged_attention(query, layer, plan, AttentionParams(0.1))


def launch_others() -> None:
    """All that is not attention, in the shapes of Qwen3 8B."""
    ops, head_dim = CudaOps(Fallbacks()), 128
    plan, layer = make_plan(ops, head_dim)
    qkv = torch.zeros(41, HEADS + 2 * KV_HEADS, head_dim, dtype=DTYPE)
    query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    cos = sin = torch.zeros(41, head_dim // 2)
    weight = torch.ones(head_dim, dtype=DTYPE)
    norms = QkNorms(weight, weight, 1e-6)
    ops.rotary_and_write_kv(query, key, value, cos, sin, layer, plan, norms)
    ops.rotary(query, key, cos, sin)
    ops.write_kv(key, value, layer, plan)
    x = torch.zeros(2, 4096, dtype=DTYPE)
    ops.add_rms_norm(x, x, torch.ones(4096, dtype=DTYPE), 1e-6)
    ops.swiglu(x)
    ops.linear(x[:1], ops.prepare_linear(torch.zeros(16, 4096, dtype=DTYPE)))


def draw() -> None:
    """Call the sampling kernels, at the vocabulary of Qwen3."""
    weights, uniforms = torch.zeros(1, 151936, dtype=torch.int64), torch.zeros(1).double()
    draw_from_likeliest(weights, uniforms, None, torch.ones(1, 1).double())


def resources(kernel: Any) -> dict[str, int]:
    """Registers, local and shared memory, from the machine code itself."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(field.split(":") for field in text.split("Function")[1].split() if ":" in field)
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "shared": int(kernel.metadata.shared),
    }


def main() -> None:
    """Compile everything, print what it takes."""
    triton.runtime.driver.set_active(AbsentHopper())
    found: dict[str, Any] = {}
    for head_dim in (128, 256):
        with compiling(found, str(head_dim)):
            launch_attention(head_dim)
    with compiling(found, "any"):
        launch_others()
        draw()
    print(json.dumps({name: resources(kernel) for name, kernel in found.items()}, indent=2))


if __name__ == "__main__":
    main()
