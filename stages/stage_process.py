"""One child of the supervisor: its process, its control socket, its log lines."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from shm.errors import PeerClosed
from shm.handover import create_socket_pair
from stages.control import ControlSocket
from stages.messages import ExecutorFacts, FromStage, Message

NUM_LOG_LINES = 50
MAX_LINE_BYTES = 64 * 1024


class StageProcess:
    """A running stage. Callbacks fire in the supervisor's loop, `on_exit` exactly once."""

    def __init__(
        self,
        stage: str,
        incarnation: int,
        on_message: Callable[[StageProcess, Message], None],
        on_exit: Callable[[StageProcess], None],
    ) -> None:
        self.stage = stage
        self.incarnation = incarnation
        self.is_ready = False
        self.facts = ExecutorFacts()
        self.last_words = ""
        self.exit_code: int | None = None
        self.log_lines: deque[str] = deque(maxlen=NUM_LOG_LINES)
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._spawn()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a control message; a child that has just died is noticed by its exit instead."""
        if self.exit_code is None:
            with suppress(PeerClosed):
                self._control.send(message, fds)

    def kill(self, signal_number: signal.Signals) -> None:
        """Signal the child if it still runs."""
        if self.exit_code is None:
            os.kill(self.pid, signal_number)

    def exit_text(self) -> str:
        """Say how the child ended."""
        assert self.exit_code is not None
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"exit code {self.exit_code}"

    def _spawn(self) -> None:
        ours, theirs = create_socket_pair()
        command = [sys.executable, "-m", "stages.launch", self.stage, str(theirs.fileno())]
        # A session of its own: ctrl-C reaches the supervisor only, which then drains.
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=stage_environment(),
        )
        theirs.close()
        self._control: ControlSocket[FromStage] = ControlSocket(ours, FromStage)
        self._pidfd = os.pidfd_open(self._process.pid)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._partial_line = b""
        self._loop.add_reader(self._control.fileno(), self._read_control)
        self._loop.add_reader(self._pidfd, self._reap)
        self._loop.add_reader(self._output, self._read_output)

    def _read_control(self) -> None:
        try:
            message, fds = self._control.receive()
        except PeerClosed:
            self._loop.remove_reader(self._control.fileno())
            return
        for fd in fds:
            os.close(fd)
        self._on_message(self, message)

    def _read_output(self) -> None:
        try:
            data = os.read(self._output, MAX_LINE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._output)
            return
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if len(self._partial_line) > MAX_LINE_BYTES:
            lines, self._partial_line = [*lines, self._partial_line], b""
        for line in lines:
            self._print(line)

    def _print(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self.log_lines.append(text)
        print(f"({self.stage} pid={self.pid}) {text}", file=sys.stderr, flush=True)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.exit_code = self._process.wait()
        os.close(self._pidfd)
        self._read_rest()
        self._control.close()
        self._on_exit(self)

    def _read_rest(self) -> None:
        """Take the last words and log lines that were still on their way."""
        self._loop.remove_reader(self._control.fileno())
        self._control.set_blocking(False)
        with suppress(PeerClosed, BlockingIOError):
            while True:
                message, _ = self._control.receive()
                self._on_message(self, message)
        self._loop.remove_reader(self._output)
        assert self._process.stdout is not None
        # A grandchild may hold the pipe open: take what is there, do not wait for its end.
        rest = self._partial_line + (self._process.stdout.read() or b"")
        for line in filter(None, rest.split(b"\n")):
            self._print(line)
        self._process.stdout.close()


def stage_environment() -> dict[str, str]:
    """The environment of a stage process.

    A machine with the torch_npu wheel and no driver must still serve: torch may load no backend
    by itself. Nothing is ever fetched from a hub.
    """
    return os.environ | {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
