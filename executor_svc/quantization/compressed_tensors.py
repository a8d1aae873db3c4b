"""compressed-tensors checkpoints, as llm-compressor writes them.

pack-quantized, weights only:
  weight_packed [out, in * bits / 32] int32  unsigned codes along the input, rows padded to words
  weight_scale [out, groups] or [1], weight_shape [2], weight_g_idx [in] with `actorder` group
  weight_zero_point [out * bits / 32, groups] int32, packed along the output like the weights
int-quantized, int8 activations:
  weight [out, in] int8, weight_scale [out, 1] or [1]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from executor_svc.model_config import ModelLoadError
from executor_svc.quantization.int32_packing import center, unpack_columns, unpack_rows
from executor_svc.quantization.reader import TensorSource, group_order
from executor_svc.quantization.weight import Layout, QuantizedWeight


@dataclass(frozen=True)
class CompressedTensorsReader:
    """`bits`: of packed weights. `int8_activations`: of int8 weights that are not packed."""

    bits: int
    int8_activations: bool

    def read(
        self, source: TensorSource, name: str, out_size: int, in_size: int
    ) -> QuantizedWeight | None:
        """See `ProjectionReader.read`."""
        if f"{name}.weight_packed" in source:
            return self._read_packed(source, name, out_size, in_size)
        if f"{name}.weight_scale" in source:
            codes = source.stored(f"{name}.weight", out_size, in_size)
            scales = _scales(source, name, out_size)
            layout = Layout(8, _group_size(name, in_size, scales), self.int8_activations)
            return QuantizedWeight(layout, codes, scales)
        return None

    def _read_packed(
        self, source: TensorSource, name: str, out_size: int, in_size: int
    ) -> QuantizedWeight:
        per_word = 32 // self.bits
        words = source.stored(f"{name}.weight_packed", out_size, -(-in_size // per_word))
        if f"{name}.weight_shape" in source:
            source.stored(f"{name}.weight_shape", 2)
        codes = center(unpack_columns(words, self.bits)[:, :in_size], self.bits)
        scales = _scales(source, name, out_size)
        size = _group_size(name, in_size, scales)
        if self.bits == 4 and size % 2 and size < in_size:
            raise ModelLoadError(f"'{name}' has groups of {size}; use a release with even groups")
        order = None
        if f"{name}.weight_g_idx" in source:
            group_of = source.stored(f"{name}.weight_g_idx", in_size)
            if torch.all(group_of >= 0):  # -1 everywhere: the groups are in order
                order = group_order(group_of, size, f"{name}.weight_g_idx")
        if order is not None:
            codes = codes[:, order].contiguous()
        zeros = self._zeros(source, f"{name}.weight_zero_point", scales)
        return QuantizedWeight(Layout(self.bits, size), codes, scales, zeros, order)

    def _zeros(self, source: TensorSource, name: str, scales: Tensor) -> Tensor | None:
        if name not in source:
            return None
        out_size, groups = scales.shape
        words = source.stored(name, -(-out_size * self.bits // 32), groups)
        return center(unpack_rows(words, self.bits)[:out_size], self.bits).float()


def _scales(source: TensorSource, name: str, out_size: int) -> Tensor:
    """One row of scales an output; a scale of the whole tensor is everyone's."""
    scales = source.stored(f"{name}.weight_scale").float()
    if scales.numel() == 1:
        return scales.reshape(1, 1).repeat(out_size, 1)
    if scales.ndim != 2 or len(scales) != out_size:
        raise ModelLoadError(
            f"tensor '{name}.weight_scale' has shape {[*scales.shape]}, served are [{out_size}, "
            "groups] and [1]; use a release with scales by tensor, channel or group"
        )
    return scales


def _group_size(name: str, in_size: int, scales: Tensor) -> int:
    groups = scales.shape[1]
    if in_size % groups:
        raise ModelLoadError(
            f"tensor '{name}.weight_scale' has {groups} groups, which do not divide {in_size} "
            "columns; the download is incomplete or config.json belongs to another model"
        )
    return in_size // groups
