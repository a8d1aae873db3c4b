"""Gives I/O to a stage that waits for many things at once: asyncio on uvloop.

The blocking counterpart is `runner.py`. ZMQ is read from its raw descriptor and drained in one go:
`zmq.asyncio` costs three to four times as much a message.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import zmq

from shm.errors import PeerClosed
from stages.channel import Inbox
from stages.gateway_outboxes import open_outbox
from stages.launch import StageContext
from stages.messages import ExecutorFacts, Heartbeat, Message, StageReady, Stop, ToStage
from stages.runner import HEARTBEAT_S
from stages.topology import inbox_address
from stages.trace import Trace, What

MESSAGES_PER_TURN = 64


class Vitals(Protocol):
    """What a heartbeat tells; see `stages.stage.Stage`."""

    def progress(self) -> int: ...

    def queue_len(self) -> int: ...

    def stats(self) -> dict[str, float]: ...


class AsyncShell:
    """Inbox, outboxes and control socket of one stage, as callbacks of the running loop.

    `inbox`: the union that arrives. `to_stage`: message type → stage that takes it.
    """

    def __init__(
        self,
        context: StageContext,
        inbox: Any,
        to_stage: Mapping[type[Message], str],
        on_messages: Callable[[list[Message]], None],
        on_control: Callable[[ToStage], None],
    ) -> None:
        self._context = context
        self._to_stage = to_stage
        self._on_messages = on_messages
        self._on_control = on_control
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        run_dir = context.config.run_dir
        self._inbox: Inbox[Message] = Inbox(self._zmq, inbox_address(run_dir, context.stage), inbox)
        self._outboxes = {
            stage: open_outbox(self._zmq, context.config, stage)
            for stage in sorted(set(to_stage.values()))
        }
        self._trace = Trace()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()

    def send(self, message: Message) -> None:
        """Send to the stage that takes such messages."""
        self._outboxes[self._to_stage[type(message)]].send(message)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call back on the loop, 0: in its next turn; an exception ends the stage."""
        self._loop.call_later(delay_s, self._guard, call)

    def forget(self, stage: str) -> None:
        """Drop what `stage` has not taken: it was restarted and will be told everything anew."""
        self._outboxes[stage].forget()

    def tell_supervisor(self, message: Message) -> None:
        """Send down the control socket."""
        self._context.control.send(message)

    async def run(self, vitals: Vitals) -> None:
        """Report ready, then work until `Stop`. Raises `PeerClosed` when the supervisor dies."""
        context = self._context
        self._loop.add_reader(self._inbox.fileno(), self._read_inbox)
        self._loop.add_reader(context.control.fileno(), self._read_control)
        # What is loaded by now stays: no collection has to walk through it while clients wait.
        gc.collect()
        gc.freeze()
        # The descriptor is edge-triggered: what came before it was watched would lie there.
        self._read_inbox()
        context.control.send(StageReady(context.stage, os.getpid(), ExecutorFacts()))
        self._beat(vitals)
        try:
            await self._ended
        finally:
            self._close()

    def fail(self, error: BaseException) -> None:
        """End `run` with `error`."""
        if not self._ended.done():
            self._ended.set_exception(error)

    def _read_inbox(self) -> None:
        start_ns = time.time_ns()
        if self._ended.done():
            return
        messages = self._inbox.drain(MESSAGES_PER_TURN)
        if len(messages) == MESSAGES_PER_TURN:
            # More may wait, and the descriptor will not say so again; others have their turn first.
            self._loop.call_soon(self._read_inbox)
        if messages:
            self._guard(lambda: self._on_messages(messages))
            self._trace.record(What.TURN, 0, len(messages), start_ns, time.time_ns())

    def _read_control(self) -> None:
        self._guard(self._obey)

    def _obey(self) -> None:
        message, _ = self._context.control.receive()
        if not isinstance(message, Stop):
            self._on_control(message)
        elif not self._ended.done():
            self._ended.set_result(None)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            # A callback of the loop has no caller that could hear it: the stage ends with it.
            self.fail(error)

    def _beat(self, vitals: Vitals) -> None:
        if self._ended.done():
            return
        stage = self._context.stage
        beat = Heartbeat(stage, vitals.progress(), vitals.queue_len(), vitals.stats())
        try:
            self._context.control.send(beat)
        except PeerClosed as error:
            self.fail(error)
        self._loop.call_later(HEARTBEAT_S, self._beat, vitals)

    def _close(self) -> None:
        self._loop.remove_reader(self._inbox.fileno())
        self._loop.remove_reader(self._context.control.fileno())
        self._inbox.close()
        for outbox in self._outboxes.values():
            outbox.close()
        self._trace.close()
        self._zmq.term()
