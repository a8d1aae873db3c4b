"""Brings weights into the layout of the kernels, once, at load."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native.describe import DTYPE_CODES
from executor_svc.ops.native.library import Library


class Packer:
    """The part of `Ops` that loading a model needs."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
        """Pack weight [out, in] in its own dtype; bias [out] becomes float32 in whole panels."""
        out_size, in_size = weight.shape
        weight = weight.contiguous()
        code = DTYPE_CODES[weight.dtype]
        size = self._functions.headrace_packed_elements(out_size, in_size, code)
        packed = allocate_pages(size, weight.dtype)
        self._functions.headrace_pack_weight(
            weight.data_ptr(), out_size, in_size, code, packed.data_ptr()
        )
        if bias is not None:
            padding = -out_size % self._functions.headrace_panel_width()
            bias = torch.nn.functional.pad(bias.float(), (0, padding))
        # The shape is all that is still asked of the plain weight: let the values go.
        stand_in = torch.empty((), dtype=weight.dtype).expand(weight.shape)
        return LinearWeight(stand_in, bias, packed)


def allocate_pages(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros [num_elements] in memory of their own, in huge pages where the kernel gives them."""
    pages = mmap.mmap(
        -1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    with suppress(OSError):  # a kernel built without transparent huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)
