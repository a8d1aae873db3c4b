"""The common form of a quantized projection, whatever wrote it. Knows no file and no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What projections must share to become one: codes of `bits`, groups, activations.

    `group_size` columns share a scale (the last group may be shorter). `int8_activations`: each
    row of the input is rounded to int8 too, as w8a8 checkpoints expect.
    """

    bits: int
    group_size: int
    int8_activations: bool = False


@dataclass(frozen=True)
class QuantizedWeight:
    """A projection [out, in]: column `order[k]` is `(codes[:, k] - zeros) * scales` of its group.

    codes [out, in] int8, from -2^(bits - 1) up; scales [out, groups] float32; zeros like scales,
    absent where they are all 0; order [in] int64, absent where columns lie as they are.
    """

    layout: Layout
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        out_size, in_size = self.codes.shape
        return out_size, in_size

    def dequantize(self) -> Tensor:
        """The weight [out, in] in float32, columns in their original order."""
        group_of = torch.arange(self.shape[1]) // self.layout.group_size
        values = self.codes.float()
        if self.zeros is not None:
            values -= self.zeros[:, group_of]
        values *= self.scales[:, group_of]
        if self.order is None:
            return values
        original = torch.empty_like(values)
        original[:, self.order] = values
        return original


def join_quantized(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Projections of the same input as one, or None where their layouts or orders differ."""
    first, *others = parts
    if any(part.layout != first.layout or not _same(part.order, first.order) for part in others):
        return None
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([part.scales * 0 if part.zeros is None else part.zeros for part in parts])
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=zeros,
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
