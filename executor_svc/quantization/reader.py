"""What a quantized checkpoint's format must be able to do, and what it reads from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from executor_svc.model_config import ModelLoadError
from executor_svc.quantization.weight import QuantizedWeight


class TensorSource(Protocol):
    """The stored tensors of a model folder."""

    def __contains__(self, name: str) -> bool: ...

    def stored(self, name: str, *shape: int) -> Tensor:
        """The tensor as it is stored; raises `ModelLoadError` if absent or of another shape."""
        ...


class ProjectionReader(Protocol):
    """Reads the projections of one format into the common form."""

    def read(
        self, source: TensorSource, name: str, out_size: int, in_size: int
    ) -> QuantizedWeight | None:
        """The projection `name` [out, in], or None where the checkpoint left it unquantized.

        Raises:
            ModelLoadError: its tensors are not what the format says.
        """
        ...


def group_order(group_of: Tensor, group_size: int, name: str) -> Tensor | None:
    """Columns in the order of their groups ("act-order"), or None where they lie in it already.

    `group_of` [in] names each column's group.
    """
    expected = torch.arange(len(group_of)) // group_size
    if torch.equal(group_of.long(), expected):
        return None
    order = torch.argsort(group_of.long(), stable=True)
    if not torch.equal(group_of.long()[order], expected):
        raise ModelLoadError(
            f"tensor '{name}' does not deal the columns to groups of {group_size}; the folder is "
            "damaged or 'group_size' in its quantization_config is wrong, download it again"
        )
    return order
