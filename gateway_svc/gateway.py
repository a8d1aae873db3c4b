"""Between HTTP handlers and the core: gives each handler an inbox, routes deliveries to it.

The shell plugs in here: it sets `send` and calls `on_messages`, `begin_epoch`, `resend_unanswered`,
`on_group_state` and `drain`. All on the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from gateway_svc.deliveries import DELIVERY_TYPES, Delivery, is_terminal
from gateway_svc.health import Health
from gateway_svc.inbox import Inbox
from gateway_svc.latency import Latencies, RequestTimes
from gateway_svc.limits import MAX_BACKLOG_PER_REQUEST
from gateway_svc.pacing import WritePacer
from gateway_svc.sessions import GatewayStage
from stages.config import ServerConfig
from stages.messages import (
    BeginEpoch,
    CloseRequest,
    Detokenize,
    Drain,
    FinishReason,
    Flush,
    Generate,
    GroupState,
    Message,
    OpenRequest,
    Resend,
    Tokenize,
)
from stages.stage import Stage
from stages.topology import is_gateway


@dataclass(slots=True)
class Route:
    """Where the deliveries of one request go, and its times for the metrics."""

    inbox: Inbox
    times: RequestTimes


class Gateway:
    """The one way from HTTP to the pipeline.

    `send` takes what the core says to the tokenizer (`TokenizerInbound`) and to the supervisor
    (`Drained`). `call_later` calls back after some seconds, on the event loop. `recorded` is `core`
    in its recorder, if it has one.
    """

    def __init__(
        self,
        config: ServerConfig,
        core: GatewayStage,
        send: Callable[[Message], None],
        call_later: Callable[[float, Callable[[], None]], None],
        *,
        recorded: Stage | None = None,
        pacer: WritePacer | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.config = config
        self.core = core
        self.send = send
        self.state = GroupState(0, [])
        self.health = Health()
        self.latencies = Latencies()
        self.now_ns = now_ns
        self._call_later = call_later
        self._stage: Stage = recorded or core
        self._pacer = pacer or WritePacer()
        self._is_flush_due = False
        self._routes: dict[int, Route] = {}

    # ── for the shell ────────────────────────────────────────────────────────────────────────

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Take what has arrived from tokenizer and sampler, in order."""
        self._handle(messages)
        if not self.core.holds_text or self._is_flush_due:
            return
        if delay := self._pacer.delay(time.perf_counter()):
            self._is_flush_due = True
            self._call_later(delay, self._flush)
        else:
            self._flush()

    def begin_epoch(self, message: BeginEpoch) -> None:
        """The pipeline works in a new epoch: tell it every open request again."""
        self._stage.begin_epoch(message)
        self.on_messages([Resend(message.epoch, unanswered_only=False)])

    def resend_unanswered(self) -> None:
        """The tokenizer was restarted: tell it again what it may have lost."""
        self.on_messages([Resend(self.core.epoch, unanswered_only=True)])

    def on_group_state(self, state: GroupState) -> None:
        """Keep the newest state for health and metrics."""
        self.state = state
        self.health.observe(state, self.now_ns())

    def drain(self, message: Drain) -> None:
        """Take no new requests; `Drained` is sent once none is open."""
        self.on_messages([message])

    # ── the heartbeat's figures ──────────────────────────────────────────────────────────────

    def progress(self) -> int:
        """See `Stage.progress`."""
        return self.core.progress()

    def queue_len(self) -> int:
        """See `Stage.queue_len`."""
        return self.core.queue_len()

    def stats(self) -> dict[str, float]:
        """The core's, and with several gateways the latencies, for the others to add up."""
        is_alone = self.config.gateways == 1
        return self.core.stats() | ({} if is_alone else self.latencies.figures())

    # ── for handlers ─────────────────────────────────────────────────────────────────────────

    @contextmanager
    def generate(self, drafts: Sequence[Generate]) -> Iterator[Inbox]:
        """Open all of `drafts` (ids not yet set) or raise the `RequestError` that refuses them.

        Leaving the context, for whatever reason, aborts those that have not ended.
        """
        inbox = self._open_inbox(len(drafts))
        try:
            self.on_messages(
                [
                    OpenRequest(msgspec.structs.replace(draft, request_id=request_id))
                    for request_id, draft in zip(inbox.request_ids, drafts, strict=True)
                ]
            )
            yield inbox
        finally:
            self._close(inbox)

    @contextmanager
    def ask(self, query: Tokenize | Detokenize) -> Iterator[Inbox]:
        """Send one query (id not yet set) under the rules of `generate`."""
        inbox = self._open_inbox(1)
        try:
            self.on_messages([msgspec.structs.replace(query, request_id=inbox.request_ids.start)])
            yield inbox
        finally:
            self._close(inbox)

    def group_latencies(self) -> Latencies:
        """The latencies over all gateways.

        Of several, all are taken as their last heartbeats told them, this one's too: two gateways
        that are asked one after the other must not seem to go backwards.
        """
        if self.config.gateways == 1:
            return self.latencies
        stages = self.state.stages
        return Latencies.merged(stage.stats for stage in stages if is_gateway(stage.stage))

    @property
    def is_ready(self) -> bool:
        """All stages are up, an epoch has begun, and new requests are welcome."""
        stages = self.state.stages
        return (
            self.core.epoch > 0
            and not self.core.is_draining
            and bool(stages)
            and all(stage.is_ready for stage in stages)
        )

    # ── what is held ─────────────────────────────────────────────────────────────────────────

    def _flush(self) -> None:
        self._is_flush_due = False
        began = time.perf_counter()
        self._handle([Flush()])
        # Streams put their writes off to the end of this turn of the loop; these are most of it.
        self._call_later(0, lambda: self._pacer.observe(began, time.perf_counter()))

    # ── routing ──────────────────────────────────────────────────────────────────────────────

    def _handle(self, messages: Sequence[Message]) -> None:
        now = time.perf_counter()
        for message in self._stage.handle(messages, self.now_ns()):
            if isinstance(message, DELIVERY_TYPES):
                self._deliver(message, now)
            else:
                self.send(message)

    def _open_inbox(self, count: int) -> Inbox:
        if refusal := self.core.refusal(count):
            raise refusal
        inbox = Inbox(self.core.next_request_ids(count), count * MAX_BACKLOG_PER_REQUEST)
        now = time.perf_counter()
        for request_id in inbox.request_ids:
            self._routes[request_id] = Route(inbox, RequestTimes(opened=now, started=now))
        return inbox

    def _deliver(self, delivery: Delivery, now: float) -> None:
        route = self._routes.get(delivery.request_id)
        if route is None:
            return
        if is_terminal(delivery):
            del self._routes[delivery.request_id]
        self.latencies.observe(route.times, delivery, now)
        if not route.inbox.put(delivery):
            self._close(route.inbox)
            route.inbox.overflow()

    def _close(self, inbox: Inbox) -> None:
        now = time.perf_counter()
        closed: list[Message] = []
        for request_id in inbox.request_ids:
            if route := self._routes.pop(request_id, None):
                self.latencies.end(route.times, FinishReason.ABORT, now)
                closed.append(CloseRequest(request_id))
        if closed:
            self.on_messages(closed)
