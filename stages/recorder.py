"""Records what a stage was told and what it said, so that `replay.py` can do it again.

A recording is a sequence of length-prefixed msgpack records: one `Header`, then `Frame`s.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from shm.closable import Closable
from stages import __version__, messages
from stages.messages import BeginEpoch, Message
from stages.stage import Stage

FORMAT = 1
_LENGTH = struct.Struct("<I")


class Header(msgspec.Struct, frozen=True):
    """What the recording is of, and under which schema and configuration it was made."""

    format: int
    version: str
    schema: dict[str, list[str]]
    stage: str
    incarnation: int
    config: bytes


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One call of the core. `is_epoch`: the single inbound message went to `begin_epoch`."""

    now_ns: int
    is_epoch: bool
    inbound: list[bytes]
    outbound: list[bytes]


def schema() -> dict[str, list[str]]:
    """Name the fields of every message, in order."""
    return {
        name: [field.name for field in msgspec.structs.fields(kind)]
        for name, kind in vars(messages).items()
        if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
    }


class RecordedStage(Closable):
    """A stage that behaves as `core` and writes down every call. Closed by its owner."""

    def __init__(self, core: Stage, path: Path, stage: str, incarnation: int, config: bytes):
        self._core = core
        self._encoder = msgspec.msgpack.Encoder()
        # A restarted stage goes on in the same file; replay starts anew at each header.
        self._file: BinaryIO = path.open("ab")
        self._write(Header(FORMAT, __version__, schema(), stage, incarnation, config))

    def begin_epoch(self, message: BeginEpoch) -> None:
        """As `Stage.begin_epoch`."""
        self._core.begin_epoch(message)
        self._write(Frame(0, True, [self._encoder.encode(message)], []))

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """As `Stage.handle`."""
        inbound = [self._encoder.encode(message) for message in messages]
        outgoing = self._core.handle(messages, now_ns)
        self._write(Frame(now_ns, False, inbound, [self._encoder.encode(m) for m in outgoing]))
        return outgoing

    def progress(self) -> int:
        """As `Stage.progress`."""
        return self._core.progress()

    def queue_len(self) -> int:
        """As `Stage.queue_len`."""
        return self._core.queue_len()

    def stats(self) -> dict[str, float]:
        """As `Stage.stats`."""
        return self._core.stats()

    def close(self) -> None:
        """Close the file; everything written is in it already."""
        self._file.close()

    def _write(self, record: msgspec.Struct) -> None:
        data = self._encoder.encode(record)
        self._file.write(_LENGTH.pack(len(data)) + data)
        self._file.flush()


def maybe_recorded(
    core: Stage, record: dict[str, str], stage: str, incarnation: int, config: bytes
) -> Stage:
    """Wrap `core` if `--record` names its stage."""
    path = record.get(stage)
    return RecordedStage(core, Path(path), stage, incarnation, config) if path else core


def read_recording(path: Path) -> Iterator[Header | Frame]:
    """Read a recording; a last record that was cut off by a kill ends it."""
    header_decoder = msgspec.msgpack.Decoder(Header)
    frame_decoder = msgspec.msgpack.Decoder(Frame)
    with path.open("rb") as file:
        while len(prefix := file.read(_LENGTH.size)) == _LENGTH.size:
            data = file.read(_LENGTH.unpack(prefix)[0])
            if len(data) < _LENGTH.unpack(prefix)[0]:
                return
            # A header is a msgpack map, a frame an array: the first byte tells them apart.
            is_map = data[0] & 0xF0 == 0x80
            yield header_decoder.decode(data) if is_map else frame_decoder.decode(data)
