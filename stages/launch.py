"""The entry of every stage process: `python -m stages.launch STAGE CONTROL_FD`.

Ties the process's life to its parent's, receives the configuration, and runs the stage's `main`.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shm.errors import PeerClosed
from stages.config import ServerConfig, decode_config
from stages.control import ControlSocket
from stages.errors import HeadraceError
from stages.lifeline import die_with_parent
from stages.messages import Configure, StageFailed, ToStage
from stages.topology import EXECUTOR, spec_of
from stages.torch_backends import forbid_autoload, hide_torch_npu

MAX_FAILURE_TEXT = 4000


@dataclass(frozen=True)
class StageContext:
    """What a stage process is given.

    `listener`: the HTTP socket of a gateway. The supervisor holds it too, so that
    clients that connect while a gateway is being restarted wait instead of being refused.
    """

    stage: str
    config: ServerConfig
    config_bytes: bytes
    incarnation: int
    control: ControlSocket[ToStage]
    listener: socket.socket | None


def load(path: str) -> Callable[..., Any]:
    """Import 'module:function'."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def main(stage: str, control_fd: int) -> int:
    """Run one stage; returns the exit code."""
    die_with_parent()
    # Ctrl-C goes to the supervisor, which drains; the stages end when it says so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control: ControlSocket[ToStage] = ControlSocket(socket.socket(fileno=control_fd), ToStage)
    first, fds = control.receive()
    assert isinstance(first, Configure)
    listener = socket.socket(fileno=fds[0]) if fds else None
    config = decode_config(first.config)
    forbid_autoload()
    if config.device != "npu" or stage != EXECUTOR:
        hide_torch_npu()
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(message)s"
    )
    run_on(first.cpus)
    context = StageContext(stage, config, first.config, first.incarnation, control, listener)
    try:
        load(spec_of(stage).main)(context)
    except PeerClosed:
        return 1  # The supervisor has died: nobody is left to tell.
    except HeadraceError as error:
        return _fail(context, str(error), error.exit_code)
    except Exception as error:
        # The one catch of the process: whatever it was, the supervisor hears it and restarts us.
        logging.exception("stage %s failed", stage)
        return _fail(context, f"{type(error).__name__}: {error}", 1)
    return 0


def run_on(cpus: list[int]) -> None:
    """Bind this process, and so every thread and process that it will start."""
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:  # they were taken from the group since it was started
        logging.warning("cannot run on processors %s: %s", cpus, error)


def _fail(context: StageContext, text: str, code: int) -> int:
    try:
        context.control.send(StageFailed(context.stage, text[:MAX_FAILURE_TEXT]))
    except PeerClosed:
        logging.error("%s", text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
