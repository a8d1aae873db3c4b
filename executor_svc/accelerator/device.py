"""What one kind of accelerator does its own way; all else is torch's device module.

The executor is written against `Device` alone: NPU, CUDA, and the CPU as their stand-in in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from executor_svc.kv_cache import HostMemory, KvCache, KvSpec
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import Ops
from sampler_svc.sampling import DrawFromLikeliest
from stages.errors import HeadraceError


class DeviceUnavailable(HeadraceError):
    """The device that was asked for is not there; the text says what is missing."""


class Captured(Protocol):
    """A recorded sequence of kernels that reads and writes the same memory at each replay."""

    @property
    def output(self) -> Tensor:
        """What the recorded function gave; each replay writes it anew."""
        ...

    def set_lengths(self, seq_lens: Sequence[int]) -> None:
        """For kernels that take lengths from the host; what follows on its stream waits for them.

        `seq_lens`: the context length of each row of the captured batch, this step's token
        included.
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
    draw_from_likeliest: its own kernel for rows with top-k or top-p, if it has one.
    num_captures: how often each decode bucket is captured. Two, used in turn, where a replay needs
    host inputs: those of the next step may be set while the one before still runs.
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
    def num_captures(self) -> int: ...

    @property
    def draw_from_likeliest(self) -> DrawFromLikeliest | None: ...

    def cache_spec(self, spec: KvSpec) -> KvSpec:
        """What the cache stores for a model of `spec`: heads may be padded."""
        ...

    def allocate_kv_cache(self, spec: KvSpec, num_blocks: int, block_size: int) -> KvCache:
        """Allocate the cache, zeroed, in the strides that `ops` wants; shapes as in `LayerKv`."""
        ...

    def memory(self) -> HostMemory:
        """Bytes of the device: in all, and free now."""
        ...

    def capture(self, run: Callable[[], Tensor], stream: Any) -> Captured:
        """Record what `run` enqueues on `stream`, without computing it.

        `run` has run before, so that nothing is compiled or loaded in between. All captures share
        a pool of memory: an output holds until the next replay of any of them.
        """
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
