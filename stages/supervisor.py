"""Starts, watches, restarts and stops the group; knows no request and no model.

One rule brings a group up and brings it back: when every stage is ready and the pipeline's state is
void (at start, or because a stage that held some has died), begin a new epoch with new rings; once
all of them work in it, the gateway tells them the open requests.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from stages.config import ServerConfig, encode_config
from stages.cpu_binding import UNBOUND
from stages.errors import HeadraceError, RestartLimitError, StageStartError
from stages.group_rings import GroupRings
from stages.messages import (
    BeginEpoch,
    Configure,
    Drain,
    Drained,
    EpochBegun,
    GroupState,
    Heartbeat,
    Message,
    ResendUnanswered,
    RingEnd,
    StageFailed,
    StageReady,
    StageState,
    Stop,
)
from stages.stage_process import StageProcess
from stages.throughput_log import ThroughputLog
from stages.topology import (
    EPOCH_STAGES,
    EXECUTOR,
    SCHEDULER,
    TOKENIZER,
    gateway_index,
    gateway_names,
    is_gateway,
    rings,
    stage_names,
)

RESTART_WINDOW_S = 600.0
STOP_GRACE_S = 5.0
STATE_PERIOD_S = 1.0
logger = logging.getLogger(__name__)


class Supervisor:
    """The group's state machine, driven by its children's words and ends and by signals.

    Invariant: `_pending_acks` names the stages that have not yet begun the current epoch; the
    gateways hear of an epoch only when it is empty.
    """

    def __init__(
        self,
        config: ServerConfig,
        listeners: Sequence[socket.socket],
        on_ready: Callable[[float], None],
        cpus: Mapping[str, list[int]] = UNBOUND,
    ) -> None:
        """`listeners`: the HTTP socket of each gateway, handed to all its lives; the caller's.

        `on_ready` hears once how many seconds the start took. `cpus`: what each stage runs on.
        """
        self._config = config
        self._listeners = listeners
        self._on_ready = on_ready
        self._cpus = cpus
        self._gateways = gateway_names(config.gateways)
        self._stages = stage_names(config.gateways)
        self._children: dict[str, StageProcess] = {}
        self._heartbeats: dict[str, Heartbeat] = {}
        self._heartbeat_ns: dict[str, int] = {}
        self._rings: GroupRings | None = None
        self._epoch = 0
        self._needs_epoch = True
        self._needs_announcement = False
        self._needs_unanswered = False
        self._pending_acks: set[str] = set()
        self._deaths: deque[float] = deque()
        self._has_served = False
        self._is_stopping = False
        self._failure: HeadraceError | None = None
        self._changed = asyncio.Event()
        self._signals: list[signal.Signals] = []
        self._undrained = set(self._gateways)

    async def run(self) -> None:
        """Serve until a signal; raises the `HeadraceError` that ended the group otherwise."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            for stage in self._stages:
                self._start(stage, incarnation=1)
            if await self._start_up():
                self._on_ready(time.monotonic() - started)
                await self._serve()
                await self._drain()
        finally:
            await self._stop()
        if self._failure is not None:
            raise self._failure

    @property
    def was_aborted(self) -> bool:
        """A second signal cut the drain short."""
        return len(self._signals) > 1

    def state(self) -> GroupState:
        """The group as `headrace status` and the gateway see it."""
        return GroupState(self._epoch, [self._stage_state(child) for child in self._ordered()])

    # ── life ─────────────────────────────────────────────────────────────────────────────────

    async def _start_up(self) -> bool:
        timeout = self._config.start_timeout
        await self._until(lambda: self._has_served or self._is_ending(), timeout)
        if not self._has_served and not self._is_ending():
            waiting = ", ".join(child.stage for child in self._ordered() if not child.is_ready)
            self._failure = StageStartError(
                f"{waiting} did not become ready within {timeout:.0f} s (--start-timeout)"
            )
        return not self._is_ending()

    async def _serve(self) -> None:
        log = ThroughputLog()
        while not self._is_ending():
            self._tell_state()
            beat = self._heartbeats.get(SCHEDULER)
            if beat is not None and (line := log.line(beat.stats, time.monotonic())):
                logger.info("%s", line)
            await self._wait(STATE_PERIOD_S)

    async def _drain(self) -> None:
        if self._failure is not None:
            return
        timeout = self._config.drain_timeout
        logger.info("draining: open requests have %.0f s to end", timeout)
        self._tell_gateways(Drain(time.time_ns() + int(timeout * 1e9)))
        await self._until(
            lambda: not self._undrained or self.was_aborted or self._failure is not None, timeout
        )

    async def _stop(self) -> None:
        """The ladder: `Stop`, then SIGTERM, then SIGKILL; a second signal goes straight down it."""
        self._is_stopping = True
        for child in self._ordered():
            child.send(Stop())
        for number in (signal.SIGTERM, signal.SIGKILL):
            if await self._until(lambda: not self._running() or self.was_aborted, STOP_GRACE_S):
                number = signal.SIGKILL
            for child in self._running():
                logger.warning("%s did not end: sending %s", child.stage, number.name)
                child.kill(number)
        await self._until(lambda: not self._running(), STOP_GRACE_S)
        if self._rings is not None:
            self._rings.close()

    def _is_ending(self) -> bool:
        return self._failure is not None or bool(self._signals)

    async def _until(self, is_done: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for what a callback will make true; False when it did not come true in time."""
        deadline = time.monotonic() + timeout_s
        while not is_done():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            await self._wait(remaining)
        return True

    async def _wait(self, timeout_s: float) -> None:
        """Wait for the next event of any kind, at most so long."""
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    # ── what children and signals tell ───────────────────────────────────────────────────────

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals.append(number)
        self._changed.set()

    def _on_message(self, child: StageProcess, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self._heartbeats[child.stage] = message
            self._heartbeat_ns[child.stage] = time.time_ns()
            return
        if isinstance(message, StageReady):
            child.is_ready, child.facts = True, message.facts
            self._heartbeat_ns[child.stage] = time.time_ns()
        elif isinstance(message, EpochBegun) and message.epoch == self._epoch:
            self._pending_acks.discard(child.stage)
        elif isinstance(message, StageFailed):
            child.last_words = message.text
        elif isinstance(message, Drained):
            self._undrained.discard(child.stage)
        self._advance()
        self._changed.set()

    def _on_exit(self, child: StageProcess) -> None:
        self._changed.set()
        if self._is_stopping:
            return
        text = f"{child.stage} ended ({child.exit_text()})"
        if child.last_words:
            text += f": {child.last_words}"
        if not self._has_served:
            self._failure = self._failure or StageStartError(_with_log(text, child))
        elif self._too_many_deaths():
            self._failure = RestartLimitError(
                f"{text}; {len(self._deaths)} deaths within {RESTART_WINDOW_S:.0f} s"
            )
        else:
            logger.warning("%s; starting it again", text)
            self._void(child.stage)
            self._start(child.stage, child.incarnation + 1)

    # ── epochs ───────────────────────────────────────────────────────────────────────────────

    def _void(self, stage: str) -> None:
        """Note what the death of `stage` made void."""
        if stage == TOKENIZER:
            self._needs_unanswered = True
            return
        self._needs_epoch = True
        self._pending_acks.clear()

    def _advance(self) -> None:
        """Take the next step towards a group that serves, if it can be taken."""
        if len(self._children) < len(self._stages) or not all(c.is_ready for c in self._ordered()):
            return
        if self._needs_epoch:
            self._begin_epoch()
        if self._needs_announcement and not self._pending_acks:
            self._announce_epoch()
        if self._needs_unanswered and not self._needs_announcement:
            self._needs_unanswered = False
            self._tell_gateways(ResendUnanswered())

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._needs_epoch = False
        self._needs_announcement = True
        self._pending_acks = set(EPOCH_STAGES)
        if self._rings is not None:
            self._rings.close()
        specs = rings(self._config.sampling_placement)
        self._rings = GroupRings(specs, self._config.max_chunk_bytes)
        for stage in EPOCH_STAGES:
            with self._rings.ends_of(stage) as (ends, fds):
                self._children[stage].send(self._epoch_message(ends), fds)

    def _announce_epoch(self) -> None:
        # Everything that was open is sent again, so nothing is left unanswered.
        self._needs_announcement = self._needs_unanswered = False
        self._tell_gateways(self._epoch_message([]))
        self._has_served = True
        self._tell_state()

    def _epoch_message(self, ends: list[RingEnd]) -> BeginEpoch:
        return BeginEpoch(self._epoch, self._children[EXECUTOR].facts, ends)

    # ── children ─────────────────────────────────────────────────────────────────────────────

    def _start(self, stage: str, incarnation: int) -> None:
        child = StageProcess(stage, incarnation, self._on_message, self._on_exit)
        self._children[stage] = child
        fds = [self._listeners[gateway_index(stage)].fileno()] if is_gateway(stage) else []
        cpus = self._cpus.get(stage, [])
        child.send(Configure(encode_config(self._config), incarnation, cpus), fds)

    def _too_many_deaths(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        return len(self._deaths) > self._config.max_restarts

    def _ordered(self) -> list[StageProcess]:
        return [self._children[stage] for stage in self._stages if stage in self._children]

    def _running(self) -> list[StageProcess]:
        return [child for child in self._ordered() if child.exit_code is None]

    def _tell_gateways(self, message: Message) -> None:
        for gateway in self._gateways:
            self._children[gateway].send(message)

    def _tell_state(self) -> None:
        state = self.state()
        for gateway in self._gateways:
            if self._children[gateway].is_ready:
                self._children[gateway].send(state)

    def _stage_state(self, child: StageProcess) -> StageState:
        beat = self._heartbeats.get(child.stage, Heartbeat(child.stage, 0, 0))
        return StageState(
            child.stage,
            child.pid,
            child.incarnation,
            child.is_ready,
            self._heartbeat_ns.get(child.stage, 0),
            beat.progress,
            beat.queue_len,
            beat.stats,
        )


def _with_log(text: str, child: StageProcess) -> str:
    if child.last_words or not child.log_lines:
        return text
    return "\n".join([text, "its last lines were:", *child.log_lines])
