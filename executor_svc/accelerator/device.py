"""What one kind of accelerator does its own way; all else is torch's device module.

The executor is written against `Device` alone: NPU, CUDA, and the CPU as their stand-in in tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from executor_svc.kv_cache import HostMemory, KvCache, KvSpec
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import Ops
from sampler_svc.sampling import DrawFromLikeliest, LikeliestKeeper
from stages.columns import Int32Array
from stages.errors import HeadraceError

# The context length of a row that only fills a batch up to its bucket: its own token.
PADDING_LEN = 1


class DeviceUnavailable(HeadraceError):
    """The device that was asked for is not there; the text says what is missing."""


class DecodeOutput(NamedTuple):
    """Of a decode step of n rows: logits float32 [n, vocab], the likeliest tokens int64 [n]."""

    logits: Tensor
    likeliest: Tensor


class Captured(Protocol):
    """A recorded decode step, which reads and writes the same memory at each replay."""

    @property
    def output(self) -> DecodeOutput:
        """What the recorded function gave; each replay writes it anew."""
        ...

    def set_lengths(self, seq_lens: Int32Array) -> None:
        """For kernels that take lengths from the host; in the order of the stream.

        `seq_lens`: the context lengths of the batch's first rows, this step's token included;
        the other rows are padding.
        """
        ...

    def replay(self) -> None:
        """Enqueue it on the current stream."""
        ...


class Device(Protocol):
    """One accelerator, chosen when the executor starts.

    module: `torch.npu`, `torch.cuda` or `torch.cpu`: Stream, Event, stream(), synchronize().
    torch_device: with its index. ops: its operators. fallbacks: what those could not do.
    is_pinning: whether copies run beside the host, from and to pinned memory.
    draw_from_likeliest, likeliest_keeper: its own kernels for rows with top-k or top-p, if it has
    any; see `TorchHead`.
    """

    @property
    def module(self) -> Any: ...

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def fallbacks(self) -> Fallbacks: ...

    @property
    def is_pinning(self) -> bool: ...

    @property
    def draw_from_likeliest(self) -> DrawFromLikeliest | None: ...

    @property
    def likeliest_keeper(self) -> LikeliestKeeper | None: ...

    def cache_spec(self, spec: KvSpec) -> KvSpec:
        """What the cache stores for a model of `spec`: heads may be padded."""
        ...

    def allocate_kv_cache(self, spec: KvSpec, num_blocks: int, block_size: int) -> KvCache:
        """Allocate the cache, zeroed, in the strides that `ops` wants; shapes as in `LayerKv`."""
        ...

    def memory(self) -> HostMemory:
        """Bytes of the device: in all, and free now, what torch's allocator keeps left out."""
        ...

    def release_unused(self) -> None:
        """Free what torch's allocator keeps for later."""
        ...

    def capture(self, run: Callable[[], DecodeOutput], stream: Any, capacity: int) -> Captured:
        """Run `run`, which compiles and loads what it needs, then record what it enqueues.

        `stream` is the current one; `capacity`: the longest context of a row. All captures share
        a pool of memory: an output holds until the next replay of any of them.
        """
        ...

    def use_stream(self, stream: Any) -> None:
        """Make it the calling thread's current stream."""
        ...

    def event(self) -> Any:
        """An event on which a thread can wait without spinning."""
        ...

    def timing_event(self) -> Any:
        """An event that notes the device's time."""
        ...

    def enter_thread(self) -> None:
        """Make this the device of the calling thread."""
        ...
