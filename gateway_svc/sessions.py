"""The gateway's core: every open request and all that came of it, so that none is ever lost.

Pure: no sockets, no clock. It must not know HTTP; it hands `Delivery` messages to whoever does.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gateway_svc.session import Session
from stages.columns import i8, i32, u64
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    CloseRequest,
    Detokenize,
    Detokenized,
    Drain,
    Drained,
    Flush,
    Generate,
    Message,
    OpenRequest,
    OutputLogprobs,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    Resend,
    TextOutputs,
    Tokenize,
    Tokenized,
)
from stages.request_ids import first_request_id


class GatewayStage:
    """A `Stage` that owns the open requests.

    Invariant: a request leaves `_sessions` with exactly one terminal delivery, or with none if its
    client left first. At most `capacity`, this gateway's share of the group's, are open.

    Plain text is held until `Flush`, so that whoever runs the core decides how often it is written;
    a request's first token, its end and log-probabilities are delivered at once.
    """

    def __init__(self, config: ServerConfig, incarnation: int, index: int = 0) -> None:
        """`index`: which of the group's gateways this is."""
        self.capacity = -(-(config.max_num_seqs + config.max_queued_requests) // config.gateways)
        self.epoch = 0
        self.is_draining = False
        self._max_recoveries = config.max_recoveries
        self._next_id = first_request_id(index, incarnation)
        self._sessions: dict[int, Session] = {}
        self._queries: dict[int, Tokenize | Detokenize] = {}
        self._holding: list[Session] = []
        self._is_drained = False
        self._num_ended = 0
        self._num_tokens = 0
        self._num_refused = 0
        self._num_dropped = 0
        self._num_recoveries = 0

    # ── what the shell and the handlers ask ──────────────────────────────────────────────────

    @property
    def num_open(self) -> int:
        """Requests and queries that have not ended."""
        return len(self._sessions) + len(self._queries)

    @property
    def holds_text(self) -> bool:
        """Something has come that `Flush` would deliver."""
        return bool(self._holding)

    def next_request_ids(self, count: int) -> range:
        """Mint `count` consecutive request ids that nobody else can mint."""
        first = self._next_id
        self._next_id += count
        return range(first, self._next_id)

    def refusal(self, count: int) -> RequestError | None:
        """Say why `count` new requests cannot be taken now, or None if they can."""
        if self.is_draining:
            return _unavailable("draining", "the server is shutting down; try another one")
        if self.epoch == 0:
            return _unavailable("starting", "the server is still starting; try again soon")
        if self.num_open + count > self.capacity:
            return _unavailable(
                "queue_full", f"{self.num_open} requests are open; try again when some have ended"
            )
        return None

    # ── Stage ────────────────────────────────────────────────────────────────────────────────

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Enter a new epoch. Unlike other stages this one forgets nothing: it is the memory."""
        self.epoch = message.epoch

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Take messages of handlers, tokenizer and sampler; say what to send and to deliver."""
        out: list[Message] = []
        for message in messages:
            self._handle_one(message, out)
        if self.is_draining and not self._is_drained and self.num_open == 0:
            self._is_drained = True
            out.append(Drained())
        return out

    def progress(self) -> int:
        """Requests ended and tokens delivered since the start."""
        return self._num_ended + self._num_tokens

    def queue_len(self) -> int:
        """Requests of which the pipeline has said nothing yet."""
        return sum(not session.is_answered for session in self._sessions.values())

    def stats(self) -> dict[str, float]:
        """Figures for `/metrics`."""
        return {
            "num_requests_open": len(self._sessions),
            "num_requests_aborting": sum(s.is_aborting for s in self._sessions.values()),
            "requests_ended_total": self._num_ended,
            "requests_refused_total": self._num_refused,
            "recoveries_total": self._num_recoveries,
            "dropped_messages_total": self._num_dropped,
        }

    def _handle_one(self, message: Message, out: list[Message]) -> None:
        match message:
            case TextOutputs():
                self._extend_sessions(message, out)
            case OutputLogprobs():
                if session := self._answered_session(message.request_id, message.epoch):
                    session.logprobs = [*session.logprobs, *message.tokens]
            case RequestStarted():
                self._start(message, out)
            case PromptLogprobs():
                self._deliver_prompt_logprobs(message, out)
            case RequestRejected():
                self._reject(message, out)
            case Tokenized() | Detokenized():
                if self._queries.pop(message.request_id, None) is not None:
                    out.append(message)
            case _:
                self._handle_command(message, out)

    def _handle_command(self, message: Message, out: list[Message]) -> None:
        match message:
            case OpenRequest():
                self._open(message.generate, out)
            case Tokenize() | Detokenize():
                self._ask(message, out)
            case CloseRequest():
                self._close(message.request_id, out)
            case Resend():
                self._resend(message, out)
            case Drain():
                self.is_draining = True
            case Flush():
                self._flush(out)
            case _:
                raise AssertionError(f"the gateway takes no {type(message).__name__}")

    # ── from HTTP handlers ───────────────────────────────────────────────────────────────────

    def _open(self, generate: Generate, out: list[Message]) -> None:
        if refusal := self.refusal(1):
            self._refuse(generate.request_id, refusal, out)
            return
        generate = msgspec.structs.replace(generate, epoch=self.epoch)
        self._sessions[generate.request_id] = Session(generate)
        out.append(generate)

    def _ask(self, query: Tokenize | Detokenize, out: list[Message]) -> None:
        if refusal := self.refusal(1):
            self._refuse(query.request_id, refusal, out)
            return
        self._queries[query.request_id] = query
        out.append(query)

    def _refuse(self, request_id: int, error: RequestError, out: list[Message]) -> None:
        self._num_refused += 1
        out.append(RequestRejected(request_id, self.epoch, error.status, error.code, error.message))

    def _close(self, request_id: int, out: list[Message]) -> None:
        self._queries.pop(request_id, None)
        session = self._sessions.get(request_id)
        if session is None or session.is_aborting:
            return
        session.is_aborting = True
        out.append(AbortRequest(request_id, self.epoch))

    # ── from tokenizer and sampler ───────────────────────────────────────────────────────────

    def _answered_session(self, request_id: int, epoch: int) -> Session | None:
        """Find the session that a message of the pipeline is about; None if it comes too late."""
        session = self._sessions.get(request_id)
        if session is None or epoch != self.epoch:
            self._num_dropped += 1
            return None
        session.is_answered = True
        return session

    def _start(self, message: RequestStarted, out: list[Message]) -> None:
        session = self._answered_session(message.request_id, message.epoch)
        # A recovered request starts again; its client heard of the first start only.
        if session and not session.is_started:
            session.is_started = True
            if not session.is_aborting:
                out.append(message)

    def _deliver_prompt_logprobs(self, message: PromptLogprobs, out: list[Message]) -> None:
        session = self._answered_session(message.request_id, message.epoch)
        if session and not session.has_prompt_logprobs:
            session.has_prompt_logprobs = True
            if not session.is_aborting:
                out.append(message)

    def _reject(self, message: RequestRejected, out: list[Message]) -> None:
        if self._queries.pop(message.request_id, None) is not None:
            out.append(message)  # a query belongs to no epoch
            return
        session = self._answered_session(message.request_id, message.epoch)
        if session:
            if session.held:
                self._release(session, out)
            self._end(message.request_id)
            if not session.is_aborting:
                out.append(message)

    def _extend_sessions(self, message: TextOutputs, out: list[Message]) -> None:
        if message.epoch != self.epoch:
            self._num_dropped += 1
            return
        stop_reasons = iter(message.stop_reasons)
        start = 0
        for request_id, count, text, reason in zip(
            u64(message.request_ids).tolist(),
            i32(message.num_tokens).tolist(),
            message.deltas,
            i8(message.finish_reasons).tolist(),
            strict=True,
        ):
            end = start + 4 * count
            stop_reason = next(stop_reasons) if reason else None
            session = self._answered_session(request_id, message.epoch)
            if session is not None:
                self._hold(session, message.token_ids[start:end], text)
                if reason or session.logprobs or not session.is_told:
                    self._release(session, out, reason, stop_reason)
            start = end

    def _hold(self, session: Session, token_ids: bytes, text: str) -> None:
        num_tokens = len(token_ids) // 4
        if not session.held:
            self._holding.append(session)
        session.output_token_ids += token_ids
        session.num_held += num_tokens
        session.held.append(text)
        self._num_tokens += num_tokens

    def _release(
        self,
        session: Session,
        out: list[Message],
        finish_reason: int = 0,
        stop_reason: str | int | None = None,
    ) -> None:
        """Deliver what is held, and the end if this is it."""
        if finish_reason:
            self._end(session.generate.request_id)
        delta = session.release(finish_reason, stop_reason)
        if not session.is_aborting:
            out.append(delta)

    def _flush(self, out: list[Message]) -> None:
        holding, self._holding = self._holding, []
        for session in holding:
            if session.held:  # what was held may have gone with an end
                self._release(session, out)

    def _end(self, request_id: int) -> None:
        del self._sessions[request_id]
        self._num_ended += 1

    # ── recovery ─────────────────────────────────────────────────────────────────────────────

    def _resend(self, message: Resend, out: list[Message]) -> None:
        self.epoch = message.epoch
        if message.unanswered_only:
            self._resend_unanswered(out)
            return
        for request_id, session in list(self._sessions.items()):
            if session.generate.epoch == self.epoch:
                continue  # opened after the epoch began: the pipeline knows it
            if session.is_aborting:
                self._end(request_id)  # the pipeline has forgotten it, as its client has
            else:
                self._send_again(session, out)

    def _resend_unanswered(self, out: list[Message]) -> None:
        """A new tokenizer knows no query and no request; the old one may have passed some on."""
        out.extend(self._queries.values())
        for request_id, session in list(self._sessions.items()):
            if session.is_aborting:
                # The abort may have died with the tokenizer; if the request did, nobody answers.
                out.append(AbortRequest(request_id, self.epoch))
                if not session.is_answered:
                    self._end(request_id)
            elif not session.is_answered:
                self._send_again(session, out)

    def _send_again(self, session: Session, out: list[Message]) -> None:
        session.num_recoveries += 1
        self._num_recoveries += 1
        if session.num_recoveries > self._max_recoveries:
            self._give_up(session, out)
            return
        session.is_answered = False
        session.logprobs = []
        session.generate = msgspec.structs.replace(
            session.generate, epoch=self.epoch, output_token_ids=bytes(session.output_token_ids)
        )
        out.append(session.generate)

    def _give_up(self, session: Session, out: list[Message]) -> None:
        """End a request that may be what kills the pipeline."""
        request_id = session.generate.request_id
        if session.held:
            self._release(session, out)
        self._end(request_id)
        out.append(AbortRequest(request_id, self.epoch))
        text = f"the server failed more than {self._max_recoveries} times while it ran this request"
        out.append(RequestRejected(request_id, self.epoch, 500, "recovery_limit", text))


def _unavailable(code: str, message: str) -> RequestError:
    return RequestError(message, code=code, status=503)
