"""What the pool and a worker say to each other: length-prefixed msgpack frames, no pickle.

Down: `Configure`, then one inbound message a frame. Up: `StageReady` or `StageFailed`, then one
frame with the answers to each inbound message, in order.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import msgspec

from stages.messages import (
    AbortRequest,
    Detokenized,
    Message,
    RequestRejected,
    StageFailed,
    StageReady,
    Tokenized,
    TokenizedRequest,
    TokenizerInbound,
)

LENGTH = struct.Struct("<I")

Answer = TokenizedRequest | AbortRequest | RequestRejected | Tokenized | Detokenized

work_decoder: msgspec.msgpack.Decoder[TokenizerInbound] = msgspec.msgpack.Decoder(TokenizerInbound)
greeting_decoder: msgspec.msgpack.Decoder[StageReady | StageFailed] = msgspec.msgpack.Decoder(
    StageReady | StageFailed
)
answers_decoder: msgspec.msgpack.Decoder[list[Answer]] = msgspec.msgpack.Decoder(list[Answer])


def pack(content: Message | list[Message]) -> bytes:
    """Give the frame of a message, or of the answers to one."""
    body = msgspec.msgpack.encode(content)
    return LENGTH.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> bytes | None:
    """Wait for the body of the next frame; None when the other side has closed or died."""
    prefix = stream.read(LENGTH.size)
    if len(prefix) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(prefix)
    body = stream.read(length)
    return body if len(body) == length else None
