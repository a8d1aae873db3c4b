"""The CPU in the place of an accelerator: its copies and graphs are plain calls.

Everything but asynchrony is as on a device, so the executor's logic is tested without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from executor_svc.accelerator.device import Captured, DecodeOutput
from executor_svc.accelerator.stage import AcceleratorStage
from executor_svc.accelerator.steps import StepLauncher
from executor_svc.batch import ForwardBatch
from executor_svc.kv_cache import (
    HostMemory,
    KvCache,
    KvSpec,
    allocate_kv_cache,
    measure_host_memory,
)
from executor_svc.models.model import Model
from executor_svc.ops.cpu import CpuOps
from executor_svc.ops.cpu_attention import CpuAttentionPlan
from executor_svc.ops.fallback import Fallbacks
from sampler_svc.sampling import DrawFromLikeliest, LikeliestKeeper
from stages.columns import Int32Array
from stages.config import ServerConfig
from stages.trace import Trace


@dataclass
class RepeatedCall:
    """A capture that computes anew: what it reads and writes must be the same memory."""

    run: Callable[[], DecodeOutput]
    output: DecodeOutput
    num_replays: int = 0

    def set_lengths(self, seq_lens: Int32Array) -> None:
        """The operators read them from the batch."""

    def replay(self) -> None:
        self.num_replays += 1
        for part, new in zip(self.output, self.run(), strict=True):
            part.copy_(new)


class HostTimer:
    """A timing event: what was launched before has been computed."""

    time_ns = 0

    def record(self, stream: object = None) -> None:
        self.time_ns = time.monotonic_ns()

    def elapsed_time(self, end_event: HostTimer) -> float:
        return (end_event.time_ns - self.time_ns) / 1e6


class TensorLengthOps(CpuOps):
    """Reads lengths from the batch's tensors, as a kernel in a graph has to."""

    def plan_attention(self, batch: ForwardBatch, kv_cache: KvCache) -> CpuAttentionPlan:
        lens = batch.seq_lens.tolist()
        width = -(-max(lens) // kv_cache.block_size)
        known = replace(
            batch,
            seq_lens_host=tuple(lens),
            max_seq_len=max(lens),
            block_tables=batch.block_tables[:, :width],
        )
        return super().plan_attention(known, kv_cache)


class CpuDevice:
    """Implements `Device`."""

    module: Any = torch.cpu
    torch_device = torch.device("cpu")
    is_pinning = False

    def __init__(self, draw_from_likeliest: DrawFromLikeliest | None = None) -> None:
        self.draw_from_likeliest = draw_from_likeliest
        self.likeliest_keeper: LikeliestKeeper | None = None
        self.fallbacks = Fallbacks()
        self.ops = TensorLengthOps()
        self.event: Callable[[], Any] = torch.cpu.Event
        self.timing_event = HostTimer
        self.captures: list[RepeatedCall] = []

    def cache_spec(self, spec: KvSpec) -> KvSpec:
        return spec

    def allocate_kv_cache(self, spec: KvSpec, num_blocks: int, block_size: int) -> KvCache:
        cache = allocate_kv_cache(spec, num_blocks, block_size)
        for layer in cache.layers:  # whoever reads what was not written gets NaN
            layer.key.fill_(float("nan"))
            layer.value.fill_(float("nan"))
        return cache

    def memory(self) -> HostMemory:
        return measure_host_memory()

    def release_unused(self) -> None:
        """The host's allocator keeps nothing that counts."""

    def capture(self, run: Callable[[], DecodeOutput], stream: Any, capacity: int) -> Captured:
        self.captures.append(RepeatedCall(run, run()))
        return self.captures[-1]

    def use_stream(self, stream: Any) -> None:
        """There is one stream."""

    def enter_thread(self) -> None:
        """There is one CPU."""


def make_stage(
    model: Model,
    no_graphs_because: str | None,
    draw_from_likeliest: DrawFromLikeliest | None,
    config: ServerConfig,
    trace: Trace,
) -> AcceleratorStage:
    """The executor of an accelerator around a model on the CPU."""
    device = CpuDevice(draw_from_likeliest)
    cache = device.allocate_kv_cache(model.kv_spec, config.num_blocks, config.block_size)
    launcher = StepLauncher(config, device, model, cache, no_graphs_because)
    return AcceleratorStage(device, launcher, trace)


def stage_maker(
    model: Model,
    no_graphs_because: str | None = None,
    draw_from_likeliest: DrawFromLikeliest | None = None,
) -> Callable[[ServerConfig, Trace], AcceleratorStage]:
    """For `Pipeline(make_executor=...)`."""
    return partial(make_stage, model, no_graphs_because, draw_from_likeliest)
