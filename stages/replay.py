"""Feeds a recording to a fresh core and compares what it says: `headrace replay STAGE FILE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import msgspec
import numpy as np

from stages import messages
from stages.columns import f32
from stages.config import ServerConfig, decode_config
from stages.errors import HeadraceError
from stages.messages import (
    BeginEpoch,
    Message,
    OutputLogprobs,
    StepLogits,
    StepLogprobs,
    StepPromptLogprobs,
)
from stages.recorder import Frame, Header, read_recording, schema
from stages.stage import Stage

CoreFactory = Callable[[ServerConfig, int], Stage]

# Kernels of another machine may round differently; tokens must be equal all the same.
TOLERANCE = 1e-3
ROUNDED_FIELDS = ("logits", "logprobs", "top_logprobs")


class ReplayError(HeadraceError):
    """The recording cannot be replayed, or a stage now says something else."""


@dataclass
class ReplayResult:
    """How much was compared."""

    num_frames: int = 0
    num_inbound: int = 0
    num_outbound: int = 0


def any_message_decoder() -> msgspec.msgpack.Decoder[Any]:
    """Decode every message there is."""
    kinds = [
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
    ]
    return msgspec.msgpack.Decoder(Union[tuple(kinds)])  # noqa: UP007 - built at run time


def replay(stage: str, path: Path, make_core: CoreFactory) -> ReplayResult:
    """Replay `path`; raises `ReplayError` at the first difference."""
    decoder = any_message_decoder()
    result = ReplayResult()
    core: Stage | None = None
    for record in read_recording(path):
        if isinstance(record, Header):
            _check_header(record, stage)
            core = make_core(decode_config(record.config), record.incarnation)
            continue
        if core is None:
            raise ReplayError(f"{path}: a frame before the header; the file is no recording")
        inbound = [decoder.decode(data) for data in record.inbound]
        said = _call(core, record, inbound)
        _compare(result.num_frames, record.outbound, said)
        result.num_frames += 1
        result.num_inbound += len(inbound)
        result.num_outbound += len(said)
    if core is None:
        raise ReplayError(f"{path}: no recording in it")
    return result


def _call(core: Stage, frame: Frame, inbound: list[Message]) -> list[Message]:
    if frame.is_epoch:
        assert isinstance(inbound[0], BeginEpoch)
        core.begin_epoch(inbound[0])
        return []
    return core.handle(inbound, frame.now_ns)


def _check_header(header: Header, stage: str) -> None:
    if header.stage != stage:
        raise ReplayError(f"the recording is of stage {header.stage}, not {stage}")
    today = schema()
    for name, fields in header.schema.items():
        # Fields are append-only: those of then are the first of today's.
        if today.get(name, [])[: len(fields)] != fields:
            raise ReplayError(
                f"{name} had the fields {fields} when this was recorded (version "
                f"{header.version}): replay it with that version"
            )


def _compare(frame: int, recorded: Sequence[bytes], said: Sequence[Message]) -> None:
    now = [msgspec.msgpack.encode(message) for message in said]
    if len(recorded) != len(now):
        raise ReplayError(
            f"frame {frame}: {len(recorded)} messages recorded, {len(now)} now:"
            f"\n  recorded {_show(recorded)}\n  now      {_show(now)}"
        )
    for index, message in enumerate(said):
        if recorded[index] != now[index] and not _within_tolerance(recorded[index], message):
            raise ReplayError(
                f"frame {frame}, message {index} differs:"
                f"\n  recorded {_show(recorded[index : index + 1])}\n  now      {message}"
            )


def _show(encoded: Sequence[bytes]) -> list[object]:
    return [msgspec.msgpack.decode(data) for data in encoded]


def _within_tolerance(recorded: bytes, message: Message) -> bool:
    """Whether both are the same logits or log-probabilities but for rounding."""
    if isinstance(message, OutputLogprobs):
        now = msgspec.msgpack.encode(message)
        return _equal_but_rounded(msgspec.msgpack.decode(recorded), msgspec.msgpack.decode(now))
    if not isinstance(message, StepLogits | StepLogprobs | StepPromptLogprobs):
        return False
    try:
        was = msgspec.msgpack.decode(recorded, type=type(message))
    except msgspec.ValidationError:
        return False
    return all(
        _close(getattr(was, name), getattr(message, name))
        if name in ROUNDED_FIELDS
        else getattr(was, name) == getattr(message, name)
        for name in message.__struct_fields__
    )


def _close(was: bytes, now: bytes) -> bool:
    return len(was) == len(now) and np.allclose(f32(was), f32(now), atol=TOLERANCE)


def _equal_but_rounded(was: object, now: object) -> bool:
    if isinstance(was, float) and isinstance(now, float):
        return bool(np.isclose(was, now, atol=TOLERANCE))
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_equal_but_rounded, was, now))
    return was == now
