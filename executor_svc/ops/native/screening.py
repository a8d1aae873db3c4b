"""Makes the screen of a head: a rough copy by which greedy search passes over most of it."""

from __future__ import annotations

from ctypes import CDLL, byref

import torch
from torch import Tensor

from executor_svc.ops.interface import LinearWeight
from executor_svc.ops.native.describe import describe_linear
from executor_svc.ops.native.packing import allocate_pages


def make_screen(functions: CDLL, pool: int, head: LinearWeight) -> Tensor | None:
    """The screen of a packed head, bytes, or None where it would be of no use.

    That is for heads of codes or with a bias, for weights that are not all finite, and on builds
    without products of bytes. `functions`: the library's; `pool`: that of the engine which works.
    """
    if head.grid is not None or head.bias is not None:
        return None
    num_bytes = functions.headrace_screen_bytes(*head.weight.shape)
    if num_bytes == 0:
        return None
    screen = allocate_pages(num_bytes, torch.uint8)
    description = byref(describe_linear(head))
    is_useful = functions.headrace_make_screen(pool, description, screen.data_ptr())
    return screen if is_useful else None
