"""The scheduler stage: messages in, plans out. Owns epochs, depth and figures; no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_svc.allocator import KVCache
from scheduler_svc.counters import Counters
from scheduler_svc.request import read_request
from scheduler_svc.scheduler import Scheduler
from stages.columns import i8_bytes, u64_bytes
from stages.config import ServerConfig
from stages.errors import RequestError
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    EndRequests,
    ExecutorFacts,
    FinishReason,
    FinishRequest,
    Message,
    RejectRequest,
    StepTokens,
    TokenizedRequest,
)

_NO_EPOCH = -1


class SchedulerStage:
    """Implements `stages.stage.Stage`.

    Invariant: after `handle` either `depth` steps are in flight or nothing can be computed.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._depth = 2 if config.overlap else 1
        self._epoch = _NO_EPOCH
        self._facts = ExecutorFacts()
        self._counters = Counters()
        self._num_arrivals = 0
        # Until an epoch begins there is only the null block and every message is dropped.
        self._kv_cache = KVCache(num_blocks=1, block_size=config.block_size)
        self._scheduler = self._new_scheduler(first_step_id=1)

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Forget every request; keep the prefix cache if the executor kept its KV cache."""
        if message.facts == self._facts:
            self._kv_cache.pool.release_all()
        else:
            self._kv_cache = KVCache(message.facts.num_blocks, message.facts.block_size)
        self._epoch = message.epoch
        self._facts = message.facts
        self._scheduler = self._new_scheduler(self._scheduler.next_step_id)

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Take what has arrived, in order; then plan steps up to the depth.

        Returns what goes to the plan ring, in order: refusals, ends, steps.
        """
        refusals: list[Message] = []
        ended: list[tuple[int, FinishReason]] = []
        for message in messages:
            match message:
                case StepTokens():
                    if not self._scheduler.apply(message):
                        self._counters.dropped_messages += 1
                case TokenizedRequest() | AbortRequest() | FinishRequest() if (
                    message.epoch != self._epoch
                ):
                    self._counters.dropped_messages += 1
                case TokenizedRequest():
                    self._open(message, refusals, ended)
                case AbortRequest():
                    if self._scheduler.end(message.request_id):
                        ended.append((message.request_id, FinishReason.ABORT))
                case FinishRequest():
                    self._scheduler.end(message.request_id)
        return [*refusals, *_end_requests(ended), *self._plan_steps()]

    def progress(self) -> int:
        """Steps that have come back."""
        return self._counters.steps

    def queue_len(self) -> int:
        """Requests that wait or run."""
        return self._scheduler.num_waiting + self._scheduler.num_running

    def stats(self) -> dict[str, float]:
        """Figures for `/metrics`."""
        pool, counters = self._kv_cache.pool, self._counters
        return {
            "num_requests_running": self._scheduler.num_running,
            "num_requests_waiting": self._scheduler.num_waiting,
            "kv_cache_usage_perc": pool.num_used / max(1, pool.num_blocks - 1),
            "num_preemptions_total": counters.preemptions,
            "prefix_cache_queries_total": counters.prefix_cache_queries,
            "prefix_cache_hits_total": counters.prefix_cache_hits,
            "prompt_tokens_total": counters.prompt_tokens,
            "generation_tokens_total": counters.generation_tokens,
            "steps_total": counters.steps,
            "dropped_messages_total": counters.dropped_messages,
            **counters.lagging_stats(),
        }

    def _open(
        self,
        message: TokenizedRequest,
        refusals: list[Message],
        ended: list[tuple[int, FinishReason]],
    ) -> None:
        """Queue a request, unless it is held already, can never run, or has ended before."""
        if message.request_id in self._scheduler:
            return
        num_slots = (self._kv_cache.pool.num_blocks - 1) * self._kv_cache.block_size
        try:
            request = read_request(
                message, self._num_arrivals, self._config.max_model_len, num_slots
            )
        except RequestError as error:
            refusals.append(_reject(message.request_id, error))
            return
        self._num_arrivals += 1
        # Recovered with all its tokens: a stage died between its last token and its end.
        if reason := request.finish_reason():
            ended.append((message.request_id, reason))
            return
        self._scheduler.add(request)

    def _plan_steps(self) -> list[Message]:
        steps: list[Message] = []
        while self._scheduler.num_in_flight < self._depth:
            step = self._scheduler.plan()
            if step is None:
                break
            steps.append(step)
        return steps

    def _new_scheduler(self, first_step_id: int) -> Scheduler:
        return Scheduler(self._config, self._kv_cache, self._counters, first_step_id)


def _reject(request_id: int, error: RequestError) -> RejectRequest:
    return RejectRequest(request_id, error.status, error.code, error.message, error.param)


def _end_requests(ended: Sequence[tuple[int, FinishReason]]) -> list[Message]:
    if not ended:
        return []
    return [
        EndRequests(
            request_ids=u64_bytes(request_id for request_id, _ in ended),
            reasons=i8_bytes(reason for _, reason in ended),
        )
    ]
