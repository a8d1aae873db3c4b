"""NVIDIA GPUs through torch.cuda and Triton; imported only where `--device cuda` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from executor_svc.accelerator.device import Captured, DecodeOutput, DeviceUnavailable
from executor_svc.accelerator.torch_device import TorchDevice
from executor_svc.ops.fallback import Fallbacks
from executor_svc.ops.interface import Ops
from executor_svc.ops.reference import ReferenceOps
from stages.columns import Int32Array

# The first with bfloat16 tensor cores and asynchronous copies to shared memory (A100).
MIN_CAPABILITY = (8, 0)


class CudaDevice(TorchDevice):
    """Implements `Device`. A replay takes nothing from the host."""

    def __init__(self, index: int = 0, uses_fusion: bool = True) -> None:
        """`uses_fusion`: Triton's kernels, else plain torch.

        Raises:
            DeviceUnavailable: torch's CUDA build, the driver, the card or Triton is missing.
        """
        check_cuda(index)
        torch.cuda.set_device(index)
        fallbacks = Fallbacks()
        super().__init__("cuda", make_ops(fallbacks, uses_fusion), fallbacks, index)
        if uses_fusion:
            from executor_svc.ops.cuda.nucleus import draw_from_likeliest

            self.draw_from_likeliest = draw_from_likeliest
        self._pool: Any = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], DecodeOutput], stream: Any, capacity: int) -> Captured:
        """See `Device`."""
        run()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may copy results and wait for events meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            output = run()
        return _CudaGraph(graph, output)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: DecodeOutput) -> None:
        self.output = output
        self._graph = graph

    def set_lengths(self, seq_lens: Int32Array) -> None:
        """See `Captured`: the kernels read the lengths on the device."""

    def replay(self) -> None:
        """See `Captured`."""
        self._graph.replay()


def make_ops(fallbacks: Fallbacks, uses_fusion: bool) -> Ops:
    """The operators of a GPU: `CudaOps`, or plain torch."""
    if not uses_fusion:
        return ReferenceOps()
    # Imports triton, which only those who run on a GPU have.
    from executor_svc.ops.cuda.ops import CudaOps

    return CudaOps(fallbacks)


def check_cuda(index: int) -> None:
    """Look for everything that `--device cuda` needs.

    Raises:
        DeviceUnavailable: the text names what is missing, and the remedy.
    """
    if torch.version.cuda is None:
        raise DeviceUnavailable(
            f"--device cuda: torch {torch.__version__} was built without CUDA: "
            "pip install 'headrace[cuda]' with torch from PyPI"
        )
    if not torch.cuda.is_available():
        raise DeviceUnavailable(
            "--device cuda: no card: nvidia-smi must list one, with a driver for CUDA "
            f"{torch.version.cuda} or newer"
        )
    if index >= torch.cuda.device_count():
        raise DeviceUnavailable(f"--device cuda: there is no card {index}")
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        raise DeviceUnavailable(
            f"--device cuda: {name} is too old: the kernels need an A100 or newer"
        )
    if find_spec("triton") is None:
        raise DeviceUnavailable(
            "--device cuda: triton is not installed: pip install 'headrace[cuda]'"
        )
