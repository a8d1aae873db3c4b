"""How columns of the host get to a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

# Gives a tensor of the array's shape and dtype on the device; the array may change afterwards.
Upload = Callable[[NDArray[Any]], Tensor]


def upload_to(device: torch.device) -> Upload:
    """A plain copy; devices for which that makes the host wait bring their own."""
    return lambda array: torch.tensor(array, device=device)
