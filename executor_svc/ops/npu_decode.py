"""What a recorded decode step on an NPU attends to: bounds on the host, true lengths on the device.

The fused attention takes context lengths from the host, and a recorded call keeps those it has
until its task is updated. Here they are upper bounds that hold for many steps; a mask, made on the
device once a step for all layers, hides what lies between a row's length and its bound. See
docs/decisions/0010-lengths-as-bounds.md for what allows this and what it costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from executor_svc.batch import ForwardBatch


class VisibleKeys(NamedTuple):
    """What one decoding token a row may see, for all layers of one window.

    block_tables: int32 [B, blocks]; hidden: bool [B, 1, 1, blocks * block_size], the atten_mask.
    """

    block_tables: Tensor
    hidden: Tensor


class AttentionRecorder(Protocol):
    """Makes the attention calls of a decode step such that their bounds can be set later."""

    def attend(self, arguments: dict[str, Any], capacity: int) -> Tensor:
        """Call npu_fused_infer_attention_score without lengths; `capacity`: the longest of them.

        arguments: its keywords, in a layout of one query a row. Returns its output.
        """
        ...


def visible_keys(batch: ForwardBatch, block_size: int, window: int | None) -> VisibleKeys:
    """The whole context of each row, or those of its blocks that a window reaches."""
    tables, lens = batch.block_tables, batch.seq_lens
    width = tables.shape[1]
    num_blocks = width if window is None else min(width, window_blocks(window, block_size))
    places = torch.arange(num_blocks * block_size, dtype=torch.int32, device=lens.device)
    if window is None:
        return VisibleKeys(tables, _as_mask(places >= lens[:, None]))
    starts = (lens - window).clamp(min=0)
    # The window ends with the row's last token, so these blocks hold all of it.
    first = (starts.div(block_size, rounding_mode="floor")).clamp(max=width - num_blocks)
    columns = first[:, None] + torch.arange(num_blocks, dtype=torch.int32, device=lens.device)
    positions = first[:, None] * block_size + places
    is_hidden = (positions >= lens[:, None]) | (positions < starts[:, None])
    return VisibleKeys(tables.gather(1, columns.long()), _as_mask(is_hidden))


def window_blocks(window: int, block_size: int) -> int:
    """How many blocks a window can touch, wherever it begins."""
    return -(-(window - 1) // block_size) + 1


def _as_mask(is_hidden: Tensor) -> Tensor:
    return is_hidden[:, None, None]
