"""Builds `TextOutputs`: one for the tokens of a step, one for ends that come without a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.columns import Int32Array, i8_bytes, i32_bytes, u64_bytes
from stages.messages import FinishReason, TextOutputs

StopReason = str | int | None


class Ending(NamedTuple):
    """The end of one request without a token; `text` is what had been held back."""

    request_id: int
    text: str
    reason: FinishReason
    stop_reason: StopReason = None


def endings_outputs(epoch: int, endings: Sequence[Ending]) -> TextOutputs:
    """Tell ends that no token brought."""
    return TextOutputs(
        epoch=epoch,
        request_ids=u64_bytes(ending.request_id for ending in endings),
        num_tokens=i32_bytes([0] * len(endings)),
        token_ids=b"",
        deltas=[ending.text for ending in endings],
        finish_reasons=i8_bytes(ending.reason for ending in endings),
        stop_reasons=[ending.stop_reason for ending in endings],
    )


def step_outputs(
    epoch: int,
    request_ids: NDArray[np.uint64],
    token_ids: Int32Array,
    deltas: list[str],
    reasons: NDArray[np.int8],
    stop_reasons: list[StopReason],
) -> TextOutputs:
    """Tell one new token for each request [n]; `stop_reasons` has the finished ones only."""
    return TextOutputs(
        epoch=epoch,
        request_ids=u64_bytes(request_ids),
        num_tokens=i32_bytes(np.ones(len(token_ids), dtype=np.int32)),
        token_ids=i32_bytes(token_ids),
        deltas=deltas,
        finish_reasons=i8_bytes(reasons),
        stop_reasons=stop_reasons,
    )
