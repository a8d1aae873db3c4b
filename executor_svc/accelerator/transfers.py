"""Copies between host and device beside the compute stream; the host never waits for one.

Pinned memory comes from torch's caching host allocator, which gives a block out again only after
the copy that used it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor_svc.accelerator.device import Device

Columns = Sequence[NDArray[np.generic]]


class Transfers:
    """The streams of one device.

    `num_side_streams`: 0 copies on the compute stream, 1 has one stream for both directions, 2 one
    for each, so that results come down while the next inputs go up.
    """

    def __init__(self, device: Device, num_side_streams: int) -> None:
        module = device.module
        self._device = device
        self.compute = module.Stream()
        side = [module.Stream() for _ in range(num_side_streams)] or [self.compute]
        self._up, self._down = side[0], side[-1]
        self._current = module.current_stream()

    def on_compute(self) -> AbstractContextManager[None]:
        """Work in this context goes to the compute stream."""
        return self._on(self.compute)

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        # torch's own context asks the device for its current stream: 18 us a time on an NPU.
        before, self._current = self._current, stream
        self._device.use_stream(stream)
        try:
            yield
        finally:
            self._current = before
            self._device.use_stream(before)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Memory of the device."""
        return torch.zeros(shape, dtype=dtype, device=self._device.torch_device)

    def upload(self, column: NDArray[np.generic]) -> Tensor:
        """The column on the device, ready for what is launched on the compute stream from now."""
        return self.upload_all([column])[0]

    def upload_all(self, columns: Columns) -> list[Tensor]:
        """One copy for all columns of a type."""
        places = {dtype: _of_dtype(columns, dtype) for dtype in {c.dtype for c in columns}}
        with self._on(self._up):
            packed = {dtype: self._copy_up(columns, own) for dtype, own in places.items()}
        if self._up is not self.compute:
            self.compute.wait_stream(self._up)
        tensors: list[Tensor] = [torch.empty(0)] * len(columns)
        for dtype, own in places.items():
            if self._device.is_pinning:
                # Its memory belongs to the side stream, where it must not be reused too early.
                packed[dtype].record_stream(self.compute)
            parts = torch.split(packed[dtype], [columns[i].size for i in own])
            for i, part in zip(own, parts, strict=True):
                tensors[i] = part.view(columns[i].shape)
        return tensors

    def download(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Copies in host memory of what the compute stream gives, and the event of their arrival.

        The caller keeps `tensors` alive until then, and nothing later may write to them.
        """
        if self._down is not self.compute:
            self._down.wait_stream(self.compute)
        with self._on(self._down):
            copies = [self._host_like(tensor) for tensor in tensors]
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            event = self._device.event()
            event.record(self._down)
        return copies, event

    def _copy_up(self, columns: Columns, own: list[int]) -> Tensor:
        total = sum(columns[i].size for i in own)
        dtype = torch.from_numpy(columns[own[0]][:0]).dtype
        staging = torch.empty(total, dtype=dtype, pin_memory=self._device.is_pinning)
        np.concatenate([columns[i].ravel() for i in own], out=staging.numpy())
        on_device = torch.empty(total, dtype=dtype, device=self._device.torch_device)
        return on_device.copy_(staging, non_blocking=True)

    def _host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.is_pinning)


def _of_dtype(columns: Columns, dtype: np.dtype[Any]) -> list[int]:
    return [i for i, column in enumerate(columns) if column.dtype == dtype]
