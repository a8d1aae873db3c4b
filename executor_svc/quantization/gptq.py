"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

qweight [in * bits / 32, out] int32   codes along the input
qzeros [groups, out * bits / 32] int32  along the output; format 1 stores them minus one
scales [groups, out], g_idx [in] int32  the group of each column: in any order with `desc_act`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from executor_svc.quantization.int32_packing import center, unpack_columns, unpack_rows
from executor_svc.quantization.reader import TensorSource, group_order
from executor_svc.quantization.weight import Layout, QuantizedWeight


@dataclass(frozen=True)
class GptqReader:
    """`group_size` -1: one group. `zero_offset`: what is to be added to stored zeros."""

    bits: int
    group_size: int
    zero_offset: int

    def read(
        self, source: TensorSource, name: str, out_size: int, in_size: int
    ) -> QuantizedWeight | None:
        """See `ProjectionReader.read`."""
        if f"{name}.qweight" not in source:
            return None
        bits, size = self.bits, self.group_size if self.group_size > 0 else in_size
        groups = -(-in_size // size)
        words = source.stored(f"{name}.qweight", in_size * bits // 32, out_size)
        codes = center(unpack_rows(words, bits), bits).T
        scales = source.stored(f"{name}.scales", groups, out_size).float().T
        order = None
        if f"{name}.g_idx" in source:
            order = group_order(source.stored(f"{name}.g_idx", in_size), size, f"{name}.g_idx")
        if order is not None:
            codes = codes[:, order]
        return QuantizedWeight(
            Layout(bits, size),
            codes.contiguous(),
            scales.contiguous(),
            self._zeros(source, name, groups, out_size),
            order,
        )

    def _zeros(self, source: TensorSource, name: str, groups: int, out_size: int) -> Tensor | None:
        words = source.stored(f"{name}.qzeros", groups, out_size * self.bits // 32)
        unsigned = unpack_columns(words, self.bits).float() + self.zero_offset
        zeros = (unsigned - (1 << (self.bits - 1))).T
        return zeros.contiguous() if torch.any(zeros != 0) else None
