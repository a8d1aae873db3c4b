"""`headrace status`: the supervisor tells the group's state on a Unix socket, one JSON a caller."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from stages.errors import HeadraceError
from stages.messages import GroupState
from stages.topology import status_path

TIMEOUT_S = 5.0


class StatusReport(msgspec.Struct, frozen=True):
    """What the socket answers: the group's epoch and one entry a stage."""

    epoch: int
    stages: list[dict[str, str | int | float | bool | dict[str, float]]]


def report(state: GroupState) -> StatusReport:
    """Name the fields of a positional message."""
    return StatusReport(state.epoch, [msgspec.structs.asdict(stage) for stage in state.stages])


async def serve_status(run_dir: str, state: Callable[[], GroupState]) -> asyncio.Server:
    """Answer every caller with the state at that moment."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(msgspec.json.encode(report(state())))
        writer.close()
        with suppress(ConnectionError):  # a caller that has left already
            await writer.wait_closed()

    return await asyncio.start_unix_server(answer, status_path(run_dir))


def ask_status(run_dir: Path) -> StatusReport:
    """Ask a running group; raises `HeadraceError` where none answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(TIMEOUT_S)
        try:
            caller.connect(str(status_path(str(run_dir))))
            data = b"".join(iter(lambda: caller.recv(65536), b""))
        except OSError as error:
            raise HeadraceError(f"no group answers in {run_dir} ({error})") from None
    return msgspec.json.decode(data, type=StatusReport)


def format_status(status: StatusReport, now_ns: int | None = None) -> str:
    """Render a table: one line a stage."""
    now_ns = time.time_ns() if now_ns is None else now_ns
    lines = [f"epoch {status.epoch}", _LINE.format(*_HEADINGS)]
    for stage in status.stages:
        age_s = (now_ns - int(str(stage["heartbeat_ns"]))) / 1e9
        state = "ready" if stage["is_ready"] else "starting"
        restarts = int(str(stage["incarnation"])) - 1
        lines.append(
            _LINE.format(
                stage["stage"],
                stage["pid"],
                state,
                restarts,
                stage["queue_len"],
                stage["progress"],
                f"{age_s:.1f} s",
            )
        )
    return "\n".join(lines)


_HEADINGS = ("stage", "pid", "state", "restarts", "queue", "progress", "last heard of")
_LINE = "{:<10} {:>8} {:<9} {:>8} {:>6} {:>10} {:>14}"
