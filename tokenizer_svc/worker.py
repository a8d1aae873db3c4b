"""A tokenizer worker process: `python -m tokenizer_svc.worker SOCKET_FD`.

Runs one `TokenizerStage` over a socket of frames until the socket ends. Holds nothing that a kill
could lose: the pool answers for it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from typing import BinaryIO

import msgspec

from stages.config import decode_config
from stages.errors import HeadraceError
from stages.lifeline import die_with_parent
from stages.messages import (
    ChatMessage,
    ChatPrompt,
    Configure,
    Message,
    StageFailed,
    StageReady,
    Tokenize,
)
from stages.recorder import maybe_recorded
from stages.stage import Stage
from stages.topology import TOKENIZER
from tokenizer_svc.frames import pack, read_frame, work_decoder


def main(socket_fd: int) -> int:
    """Serve the socket; returns the exit code."""
    die_with_parent()
    # Ctrl-C reaches the whole process group, but only the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=socket_fd) as sock, sock.makefile("rb") as stream:
        first = read_frame(stream)
        if first is None:
            return 1
        configure = msgspec.msgpack.decode(first, type=Configure)
        try:
            stage = _make_stage(configure)
        except HeadraceError as error:
            _send(sock, StageFailed(TOKENIZER, str(error)))
            return error.exit_code
        _send(sock, StageReady(TOKENIZER, os.getpid()))
        _serve(sock, stream, stage)
    return 0


def _make_stage(configure: Configure) -> Stage:
    # Imported here, after the process is tied to its parent: transformers takes most of a second.
    from tokenizer_svc.stage import TokenizerStage

    config = decode_config(configure.config)
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(message)s")
    stage = TokenizerStage(config)
    # The first rendering compiles the template; do it now and not in the first request's time.
    stage.handle([Tokenize(0, ChatPrompt([ChatMessage("user", "hello")]))], 0)
    return maybe_recorded(stage, config.record, TOKENIZER, configure.incarnation, configure.config)


def _serve(sock: socket.socket, stream: BinaryIO, stage: Stage) -> None:
    while (body := read_frame(stream)) is not None:
        answers = stage.handle([work_decoder.decode(body)], time.time_ns())
        _send(sock, answers)


def _send(sock: socket.socket, content: Message | list[Message]) -> None:
    sock.sendall(pack(content))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
