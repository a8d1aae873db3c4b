"""Brings quantized weights into the layouts of linear_quantized.c and linear_dot.c, at load."""

from __future__ import annotations

from ctypes import byref, c_int64
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.ops.interface import LinearWeight, QuantizationGrid
from executor_svc.ops.native.describe import DTYPE_CODES
from executor_svc.ops.native.library import Library
from executor_svc.ops.native.packing import Packer, allocate_pages
from executor_svc.quantization.weight import QuantizedWeight

INT8, INT4, INT8_DOT, INT8_DIGITS = 3, 4, 5, 6
# Laid out as linear_dot.c wants it.
DOT_CODES = (INT8_DOT, INT8_DIGITS)
# Codes that are unpacked at a time: few enough that they and their copies stay in a cache.
CHUNK_CODES = 1 << 21


class QuantizedPacker(Packer):
    """Packs for one build: the width of a panel and the layout of bytes in it are the build's."""

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.panel: int = library.functions.headrace_panel_width()
        dot, weight_zero, float_digits = c_int64(), c_int64(), c_int64()
        library.functions.headrace_dot_layout(byref(dot), byref(weight_zero), byref(float_digits))
        self._dot, self._weight_zero = dot.value, weight_zero.value
        self._int8 = INT8_DIGITS if float_digits.value else INT8  # a scale for each output
        engine = library.start_engine(self, torch.get_num_threads())
        self._pool = library.functions.headrace_engine_pool(engine)

    def prepare_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None = None
    ) -> LinearWeight:
        """Pack codes [out, in] with their grid; bias [out] becomes float32 in whole panels."""
        out_size, in_size = weight.shape
        weight = _in_order(weight)
        code, panel = self._code(weight), self.panel
        packed, panel_bytes = self._allocate(code, out_size, in_size)
        step = max(1, CHUNK_CODES // (panel * in_size)) * panel
        for begin in range(0, out_size, step):
            into = packed[begin // panel * panel_bytes :]
            self._lay_out(code, weight.codes[begin : begin + step], into)
        return self._finish(weight.shape, bias, packed, self._grid(weight, code))

    def quantize_linear(
        self, weight: Tensor, bias: Tensor | None = None, *, int8_activations: bool
    ) -> LinearWeight:
        """Round weight [out, in] to int8, a scale for each output, and pack it."""
        out_size, in_size = weight.shape
        weight = weight.contiguous()
        code = INT8_DOT if int8_activations else self._int8
        packed, _ = self._allocate(code, out_size, in_size)
        scales = torch.zeros(-(-out_size // self.panel) * self.panel)
        self._functions.headrace_quantize_weight(
            self._pool,
            weight.data_ptr(),
            out_size,
            in_size,
            DTYPE_CODES[weight.dtype],
            code,
            packed.data_ptr(),
            scales.data_ptr(),
        )
        return self._finish((out_size, in_size), bias, packed, QuantizationGrid(code, scales))

    def _allocate(self, code: int, out_size: int, in_size: int) -> tuple[Tensor, int]:
        """Zeroed bytes for all panels, and how many one takes."""
        per_byte, unit = (2, 1) if code == INT4 else (1, self._dot if code in DOT_CODES else 1)
        panel_bytes = -(-in_size // (per_byte * unit)) * unit * self.panel
        return allocate_pages(-(-out_size // self.panel) * panel_bytes, torch.uint8), panel_bytes

    def _finish(
        self,
        shape: tuple[int, int],
        bias: Tensor | None,
        packed: Tensor,
        grid: QuantizationGrid,
    ) -> LinearWeight:
        padded = None if bias is None else F.pad(bias.float(), (0, -shape[0] % self.panel))
        return LinearWeight(torch.empty(()).expand(shape), padded, packed, grid)

    def _lay_out(self, code: int, codes: Tensor, into: Tensor) -> None:
        """Codes [rows, in] into their panels; a last panel that is not full gets zeros."""
        panel, width = self.panel, 1
        codes = F.pad(codes, (0, 0, 0, -len(codes) % panel))
        if code == INT4:
            unsigned = (F.pad(codes, (0, codes.shape[1] % 2)) + 8).view(torch.uint8)
            codes = unsigned[:, ::2] | unsigned[:, 1::2] << 4
        elif code in DOT_CODES:
            width = self._dot
            codes = F.pad(codes, (0, -codes.shape[1] % width)).view(torch.uint8) ^ self._weight_zero
        panels = codes.view(torch.uint8).view(-1, panel, codes.shape[1] // width, width)
        target = into[: codes.numel()].view(-1, codes.shape[1] // width, panel, width)
        target.copy_(panels.transpose(1, 2))

    def _grid(self, weight: QuantizedWeight, code: int) -> QuantizationGrid:
        zeros, scales = weight.zeros, self._columns(weight.scales)
        order = None if weight.order is None else weight.order.to(torch.int32)
        if code in DOT_CODES or (code == INT8 and _is_ungrouped(weight)):
            return QuantizationGrid(code, scales)
        offsets = None
        if zeros is not None:  # of the code as it is stored: from 0 up for 4 bits
            offsets = self._columns(-(zeros + (8 if code == INT4 else 0)) * weight.scales)
        group_size = min(weight.layout.group_size, weight.shape[1])
        return QuantizationGrid(code, scales, offsets, order, group_size)

    def _columns(self, values: Tensor) -> Tensor:
        """[out, groups] -> [panels, groups, panel] float32."""
        padded = F.pad(values.float(), (0, 0, 0, -len(values) % self.panel))
        return padded.view(-1, self.panel, values.shape[1]).transpose(1, 2).contiguous()

    def _code(self, weight: QuantizedWeight) -> int:
        if weight.layout.bits == 4:
            return INT4
        if weight.layout.int8_activations:
            return INT8_DOT
        return self._int8 if _is_ungrouped(weight) else INT8


def _is_ungrouped(weight: QuantizedWeight) -> bool:
    """One scale an output is all that there is to its grid."""
    return weight.zeros is None and weight.scales.shape[1] == 1


def _in_order(weight: QuantizedWeight) -> QuantizedWeight:
    """Columns in their original order if there are no groups that need another."""
    if weight.order is None or not _is_ungrouped(weight):
        return weight
    return replace(weight, codes=weight.codes[:, torch.argsort(weight.order)], order=None)
