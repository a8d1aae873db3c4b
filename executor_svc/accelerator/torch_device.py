"""What torch's accelerators have in common."""

from __future__ import annotations

from typing import Any

import torch

from executor_svc.kv_cache import HostMemory, KvCache, KvSpec, allocate_kv_cache
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import Ops
from sampler_svc.sampling import DrawFromLikeliest, LikeliestKeeper


class TorchDevice:
    """The parts of `Device` that torch's device module gives for any accelerator."""

    is_pinning = True
    draw_from_likeliest: DrawFromLikeliest | None = None
    likeliest_keeper: LikeliestKeeper | None = None

    def __init__(self, kind: str, ops: Ops, fallbacks: Fallbacks, index: int = 0) -> None:
        self.torch_device = torch.device(kind, index)
        self.module: Any = torch.get_device_module(kind)
        self.ops = ops
        self.fallbacks = fallbacks
        self.enter_thread()

    def cache_spec(self, spec: KvSpec) -> KvSpec:
        """See `Device`: as the model says."""
        return spec

    def allocate_kv_cache(self, spec: KvSpec, num_blocks: int, block_size: int) -> KvCache:
        """See `Device`: contiguous, in the order of `LayerKv`."""
        return allocate_kv_cache(spec, num_blocks, block_size, str(self.torch_device))

    def memory(self) -> HostMemory:
        """See `Device`."""
        free, total = self.module.mem_get_info()
        return HostMemory(total, free)

    def release_unused(self) -> None:
        """See `Device`."""
        self.module.empty_cache()

    def use_stream(self, stream: Any) -> None:
        """See `Device`."""
        self.module.set_stream(stream)

    def event(self) -> Any:
        """See `Device`."""
        return self.module.Event(blocking=True)

    def timing_event(self) -> Any:
        """See `Device`."""
        return self.module.Event(enable_timing=True)

    def enter_thread(self) -> None:
        """See `Device`."""
        self.module.set_device(self.torch_device)
