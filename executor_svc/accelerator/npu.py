"""The Ascend NPU through torch_npu; imported only where `--device npu` asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from executor_svc.accelerator.device import Captured, DeviceUnavailable
from executor_svc.accelerator.torch_device import TorchDevice
from executor_svc.kv_cache import KvCache, KvSpec, LayerKv
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.npu import NpuOps
from executor_svc.ops.npu_limits import FUSED_DTYPES, cache_head_dim
from executor_svc.ops.reference import ReferenceOps


class NpuDevice(TorchDevice):
    """Implements `Device`. Keys and values lie token by token, heads padded to what kernels take.

    Two captures a bucket: the attention's context lengths are host inputs of a replay.
    """

    num_captures = 2

    def __init__(
        self,
        index: int = 0,
        uses_fusion: bool = True,
        fused_dtypes: frozenset[torch.dtype] = FUSED_DTYPES,
    ) -> None:
        """`fused_dtypes`: see `NpuOps`.

        Raises:
            DeviceUnavailable: torch_npu, its driver or the card is missing.
        """
        import_torch_npu()
        fallbacks = Fallbacks()
        torch_device = torch.device("npu", index)
        torch.get_device_module("npu").set_device(torch_device)
        ops = NpuOps(fallbacks, torch_device, fused_dtypes) if uses_fusion else ReferenceOps()
        super().__init__("npu", ops, fallbacks, index)
        self._uses_fusion = uses_fusion
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

    def capture(self, run: Callable[[], Tensor], stream: Any) -> Captured:
        """See `Device`."""
        graph = self.module.NPUGraph()
        with self.module.graph(graph, pool=self._pool, stream=stream, auto_dispatch_capture=True):
            output = run()
        return _NpuGraph(graph, output, self.module, stream)

    def event(self) -> Any:
        """See `Device`."""
        return self.module.Event()


class _NpuGraph:
    """A recorded graph, in which each attention waits for its lengths.

    torch_npu records each attention as a task group behind an external event; `update` sets its
    lengths on a stream of its own and raises the event.
    """

    def __init__(self, graph: Any, output: Tensor, module: Any, stream: Any) -> None:
        self.output = output
        self._graph = graph
        self._stream = stream
        self._seq_lens: list[int] = []
        self._update_stream = graph.graph_dispatch_mode.update_stream
        self._finished = module.Event()
        self._finished.record(stream)

    def set_lengths(self, seq_lens: Sequence[int]) -> None:
        """See `Captured`."""
        self._seq_lens = list(seq_lens)
        # Its last replay must have read the old ones.
        self._update_stream.wait_event(self._finished)

    def replay(self) -> None:
        """See `Captured`."""
        self._graph.replay()
        self._graph.update([{"actual_seq_lengths_kv": self._seq_lens}])
        self._finished.record(self._stream)


def import_torch_npu() -> None:
    """Make `torch.npu` and its operators exist.

    Raises:
        DeviceUnavailable: the text names what is missing, and the remedy.
    """
    if find_spec("torch_npu") is None:
        raise DeviceUnavailable(
            "--device npu: torch_npu is not installed: pip install 'headrace[npu]'"
        )
    # A launch calls CANN at once. With torch_npu's queue and its thread in between, each of the
    # many updates of a recorded step waits until the queue is empty.
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
