"""Brings weights into the layout of the kernels, once, at load."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native.describe import DTYPE_CODES
from executor_svc.ops.native.library import Library

HUGE_PAGE = 2 << 20  # of x86-64, and of aarch64 with pages of 4 KiB


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
    """Zeros [num_elements] in memory of their own, in huge pages where the kernel gives them.

    From the size of one on, they begin and end with a huge page: what lies beside its borders is in
    small pages, which a weight is read from at two thirds of the pace.
    """
    num_bytes, begin = num_elements * dtype.itemsize, 0
    is_large = num_bytes >= HUGE_PAGE
    if is_large:  # the spare one, to move the beginning in, is never touched
        num_bytes += -num_bytes % HUGE_PAGE + HUGE_PAGE
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without transparent huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    if is_large:
        begin = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(pages, dtype=dtype, count=num_elements, offset=begin)
