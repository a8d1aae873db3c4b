"""The Ascend NPU through torch_npu; imported only where `--device npu` asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from executor_svc.accelerator.device import Captured, DecodeOutput, DeviceUnavailable
from executor_svc.accelerator.npu_graph import LengthBounds, NpuGraph, TaskRecorder
from executor_svc.accelerator.torch_device import TorchDevice
from executor_svc.kv_cache import KvCache, KvSpec, LayerKv
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import Ops
from executor_svc.ops.npu import NpuOps
from executor_svc.ops.npu_gelu import ExactGelu
from executor_svc.ops.npu_limits import FUSED_DTYPES, cache_head_dim
from executor_svc.ops.npu_sampling import TopKTopP
from executor_svc.ops.reference import ReferenceOps


class NpuDevice(TorchDevice):
    """Implements `Device`. The cache lies token by token, its heads padded to what kernels take."""

    def __init__(
        self,
        index: int = 0,
        uses_fusion: bool = True,
        fused_dtypes: frozenset[torch.dtype] = FUSED_DTYPES,
        tiles_weights: bool = False,
    ) -> None:
        """`fused_dtypes`, `tiles_weights`: see `NpuOps`.

        Raises:
            DeviceUnavailable: torch_npu, its driver or the card is missing.
        """
        import_torch_npu()
        fallbacks = Fallbacks()
        torch_device = torch.device("npu", index)
        torch.get_device_module("npu").set_device(torch_device)
        ops: Ops = ReferenceOps()
        if uses_fusion:
            ops = NpuOps(fallbacks, torch_device, fused_dtypes, tiles_weights)
            self.likeliest_keeper = TopKTopP(fallbacks)
        super().__init__("npu", ops, fallbacks, index)
        self._uses_fusion = uses_fusion
        self._gelu = ExactGelu()
        self._pool: Any = self.module.graph_pool_handle()

    def cache_spec(self, spec: KvSpec) -> KvSpec:
        """See `Device`: heads of less than 128 are padded to it."""
        if not self._uses_fusion:
            return spec
        return replace(spec, head_dim=cache_head_dim(spec.head_dim))

    def allocate_kv_cache(self, spec: KvSpec, num_blocks: int, block_size: int) -> KvCache:
        """See `Device`: token by token, as the kernel that stores them wants it."""
        shape = (spec.num_layers, 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        storage = torch.zeros(shape, dtype=spec.dtype, device=self.torch_device)
        layers = tuple(LayerKv(*pair.transpose(2, 3).unbind(0)) for pair in storage.unbind(0))
        return KvCache(spec, block_size, num_blocks, layers)

    def capture(self, run: Callable[[], DecodeOutput], stream: Any, capacity: int) -> Captured:
        """See `Device`."""
        recorder = TaskRecorder(stream)
        graph = self.module.NPUGraph()
        assert isinstance(self.ops, NpuOps)  # steps of plain torch are not recorded
        with self.ops.recording(recorder):
            run()
            with self.module.graph(graph, pool=self._pool, stream=stream):
                output = run()
        bounds = LengthBounds(len(output.likeliest), capacity)
        return NpuGraph(graph, output, recorder.tasks, stream, bounds)

    def event(self) -> Any:
        """See `Device`."""
        return self.module.Event()


def import_torch_npu() -> None:
    """Make `torch.npu` and its operators exist.

    Raises:
        DeviceUnavailable: the text names what is missing, and the remedy.
    """
    if find_spec("torch_npu") is None:
        raise DeviceUnavailable(
            "--device npu: torch_npu is not installed: pip install 'headrace[npu]'"
        )
    # A launch calls CANN at once. Handing the few calls of a recorded step to torch_npu's thread
    # costs more than making them, and an update of its lengths waits until that queue is empty.
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    try:
        import_module("torch_npu")
    except ImportError as error:
        raise DeviceUnavailable(
            f"--device npu: torch_npu finds no CANN ({error}): install CANN 8.5 or newer and "
            "source its set_env.sh before headrace starts"
        ) from error
    if not torch.get_device_module("npu").is_available():
        raise DeviceUnavailable(
            "--device npu: no card: npu-smi info must list one, and its driver must be loaded"
        )
