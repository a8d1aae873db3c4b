"""Runs a stage core in a blocking loop: rings, inbox and control socket in, routed messages out.

For the stages where one thing happens at a time: scheduler, executor, sampler.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import zmq

from shm.errors import Interrupted
from stages.channel import Inbox
from stages.gateway_outboxes import open_outbox
from stages.launch import StageContext
from stages.messages import (
    BeginEpoch,
    EpochBegun,
    ExecutorFacts,
    Heartbeat,
    Message,
    StageReady,
    Stop,
)
from stages.recorder import maybe_recorded
from stages.ring_ends import MessageReader, RingEnds
from stages.stage import CompletingStage, Stage, TimedStage
from stages.timer import Timer
from stages.topology import inbox_address
from stages.trace import Trace, What, step_of

HEARTBEAT_S = 1.0


@dataclass(frozen=True)
class Wiring:
    """Where a stage's messages come from and go to.

    `inbox`: the union of its ZMQ inbox, or None. `to_ring`/`to_stage`: message type → ring name or
    stage name. `records_per_turn`: how many ring records one call of the core takes at most.
    """

    inbox: Any = None
    to_ring: Mapping[type[Message], str] = field(default_factory=dict)
    to_stage: Mapping[type[Message], str] = field(default_factory=dict)
    records_per_turn: int = 1024


class Runner:
    """One thread, woken by descriptors only: no polling interval but the heartbeat's."""

    def __init__(
        self, context: StageContext, core: Stage, wiring: Wiring, trace: Trace | None = None
    ) -> None:
        """`trace`: where the process notes what it does, if something else writes to it too."""
        config = context.config
        self._context = context
        self._core = maybe_recorded(
            core, config.record, context.stage, context.incarnation, context.config_bytes
        )
        self._timed = core if isinstance(core, TimedStage) else None
        self._timer = Timer()
        # Besides messages: when the core has something to say of its own accord.
        self._wakers = [self._timer.fileno()]
        if isinstance(core, CompletingStage):
            self._wakers.append(core.completion_fd())
        self._trace = trace or Trace()
        self._wiring = wiring
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox: Inbox[Message] | None = None
        if wiring.inbox is not None:
            address = inbox_address(config.run_dir, context.stage)
            self._inbox = Inbox(self._zmq, address, wiring.inbox)
        self._outboxes = {
            stage: open_outbox(self._zmq, config, stage)
            for stage in sorted(set(wiring.to_stage.values()))
        }
        self._rings: RingEnds | None = None
        self._poller = zmq.Poller()
        self._is_stopped = False

    def run(self, facts: ExecutorFacts | None = None) -> None:
        """Report ready, then work until `Stop`. Raises `PeerClosed` when the supervisor dies."""
        context = self._context
        ready = StageReady(context.stage, os.getpid(), facts or ExecutorFacts())
        # What is loaded by now stays: no collection has to walk through it in a step's time.
        gc.collect()
        gc.freeze()
        context.control.send(ready)
        self._rebuild_poller()
        next_heartbeat = time.monotonic()
        while not self._is_stopped:
            now = time.monotonic()
            if now >= next_heartbeat:
                self._send_heartbeat()
                next_heartbeat = now + HEARTBEAT_S
            events = dict(self._poller.poll(max(0, int((next_heartbeat - now) * 1000) + 1)))
            if context.control.fileno() in events:
                self._obey()
            elif events:
                self._turn(is_due=any(fd in events for fd in self._wakers))
        self._close()

    def _turn(self, is_due: bool) -> None:
        start_ns = time.time_ns()
        messages = self._receive()
        if not messages and not is_due:
            return
        said = self._core.handle(messages, time.time_ns())
        try:
            for message in said:
                self._send(message)
        except Interrupted:
            # A reader has died while we waited for room. The supervisor's word is on the control
            # socket; the epoch it begins makes what we did not send void.
            self._obey()
        if self._timed is not None:
            self._timer.set(self._timed.wakeup_ns())
        size, step_id = len(messages) + len(said), step_of((*said, *messages))
        self._trace.record(What.TURN, step_id, size, start_ns, time.time_ns())

    def _receive(self) -> list[Message]:
        messages: list[Message] = []
        limit = self._wiring.records_per_turn
        for reader in self._readers():
            while len(messages) < limit and (message := reader.get_nowait()) is not None:
                messages.append(message)
        if self._inbox is not None:
            messages += self._inbox.drain()
        return messages

    def _send(self, message: Message) -> None:
        ring = self._wiring.to_ring.get(type(message))
        if ring is not None:
            assert self._rings is not None
            self._rings.writers[ring].send(message)
        else:
            self._outboxes[self._wiring.to_stage[type(message)]].send(message)

    def _obey(self) -> None:
        message, fds = self._context.control.receive()
        if isinstance(message, Stop):
            self._is_stopped = True
        elif isinstance(message, BeginEpoch):
            self._begin_epoch(message, fds)

    def _begin_epoch(self, message: BeginEpoch, fds: list[int]) -> None:
        self._close_rings()
        for outbox in self._outboxes.values():
            outbox.forget()
        control, run_dir = self._context.control, self._context.config.run_dir
        self._rings = RingEnds(self._zmq, message, fds, run_dir, control.fileno())
        self._rebuild_poller()
        self._core.begin_epoch(message)
        control.send(EpochBegun(self._context.stage, message.epoch))

    def _rebuild_poller(self) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._context.control.fileno(), zmq.POLLIN)
        for fd in self._wakers:
            self._poller.register(fd, zmq.POLLIN)
        if self._inbox is not None:
            self._poller.register(self._inbox.socket, zmq.POLLIN)
        for reader in self._readers():
            self._poller.register(reader.fileno(), zmq.POLLIN)

    def _send_heartbeat(self) -> None:
        core = self._core
        self._context.control.send(
            Heartbeat(self._context.stage, core.progress(), core.queue_len(), core.stats())
        )

    def _readers(self) -> Iterable[MessageReader]:
        return self._rings.readers.values() if self._rings is not None else ()

    def _close_rings(self) -> None:
        if self._rings is not None:
            self._rings.close()
            self._rings = None

    def _close(self) -> None:
        self._close_rings()
        if self._inbox is not None:
            self._inbox.close()
        for outbox in self._outboxes.values():
            outbox.close()
        self._timer.close()
        self._trace.close()
        self._zmq.term()


def run_stage(
    context: StageContext,
    make_core: Callable[[], Stage],
    wiring: Wiring,
    facts: Callable[[], ExecutorFacts] | None = None,
) -> None:
    """Build the core, then run it; `facts` is asked after the core is built."""
    core = make_core()
    Runner(context, core, wiring).run(facts() if facts else None)
