"""The pool's end of one worker process: spawn, hand over work, receive answers, kill.

Knows order and deadlines of the work it handed over; must not decide what becomes of it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from stages.config import ServerConfig, encode_config
from stages.errors import ConfigError, StageStartError
from stages.messages import (
    AbortRequest,
    Configure,
    Detokenize,
    Generate,
    Message,
    StageFailed,
    Tokenize,
)
from tokenizer_svc.frames import LENGTH, answers_decoder, greeting_decoder, pack

# A worker is one of several processes of one thread each, and has no business with a network.
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

# A time limit is waited for in as many parts. When this process itself was stopped (a debugger, a
# suspended machine), only one of them has passed meanwhile, and no answer that waits is overlooked.
TIMER_PARTS = 4


@dataclass(slots=True, eq=False)
class Job:
    """One message on its way through a worker.

    `time_limit`: seconds from when a worker begins with it. `num_crashes`: workers that died while
    they had it. `abort`: follows the answer out.
    """

    message: Generate | Tokenize | Detokenize
    frame: bytes
    time_limit: float
    num_crashes: int = 0
    abort: AbortRequest | None = None


class WorkerProcess:
    """One worker, from spawn to end.

    `jobs` are those handed over and not answered, oldest first; the worker answers in order, so the
    first of them is the one it works on, and the only one whose time runs.
    """

    def __init__(self, on_late: Callable[[WorkerProcess], None]) -> None:
        """Start the process; `on_late` is called when the first of `jobs` exceeds its time."""
        self.jobs: deque[Job] = deque()
        self.is_open = False
        self._on_late = on_late
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tokenizer_svc.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | WORKER_ENVIRONMENT,
            )

    async def greet(self, config: ServerConfig, incarnation: int) -> None:
        """Configure the worker and wait until it has loaded its tokenizer.

        Raises ConfigError for a model folder that cannot work, StageStartError for any other end.
        """
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._sock)
        self._writer.write(pack(Configure(encode_config(config), incarnation)))
        try:
            async with asyncio.timeout(config.start_timeout):
                body = await self._read_frame()
        except TimeoutError as error:
            text = f"a tokenizer worker was not ready within {config.start_timeout:.0f} s"
            raise StageStartError(text) from error
        if body is None:
            raise StageStartError("a tokenizer worker died while it was starting")
        greeting = greeting_decoder.decode(body)
        if isinstance(greeting, StageFailed):
            raise ConfigError(greeting.text)
        self.is_open = True

    def give(self, job: Job) -> None:
        """Hand over a job; it runs after those handed over before."""
        assert self._writer is not None
        self.jobs.append(job)
        self._writer.write(job.frame)
        if len(self.jobs) == 1:
            self._restart_timer()

    async def read_answers(self, on_answers: Callable[[Job, list[Message]], None]) -> None:
        """Pass on each job with its answers until the worker ends, by itself or by `kill`."""
        while (body := await self._read_frame()) is not None and self.is_open:
            job = self.jobs.popleft()
            self._restart_timer()
            on_answers(job, list(answers_decoder.decode(body)))

    def kill(self) -> None:
        """End the process now; what it still says is not heard. `jobs` stay for the caller."""
        self.is_open = False
        self._stop_timer()
        self._process.kill()

    def reap(self) -> int:
        """Release what the killed process held; returns its exit code."""
        if self._writer is None:
            self._sock.close()
        else:
            self._writer.close()
        return self._process.wait()

    def _restart_timer(self) -> None:
        """Let the time of the job that the worker now begins with run."""
        self._stop_timer()
        if self.jobs:
            self._await_timer(TIMER_PARTS)

    def _await_timer(self, num_parts: int) -> None:
        if num_parts == 0:
            self._on_late(self)
            return
        delay = self.jobs[0].time_limit / TIMER_PARTS
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay, self._await_timer, num_parts - 1)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _read_frame(self) -> bytes | None:
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
