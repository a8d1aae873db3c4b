"""A simulated executor, sampler and gateway around a `SchedulerStage`, to find its mistakes.

The KV cache is simulated per slot: a slot holds a digest of the whole prefix up to its token, and
a token is a function of the digest that is *read back through the block table*. So a wrong prefix
hit, a block freed too early or a token computed twice changes what a request says.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from scheduler_svc.lag import lag_reason, samples_ahead
from scheduler_svc.rows import FREE
from scheduler_svc.stage import SchedulerStage
from stages.columns import i8, i32, i32_bytes, u64
from stages.config import ModelFacts, ServerConfig
from stages.finish import NO_TOKEN, finish_reasons
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    EndRequests,
    ExecuteStep,
    ExecutorFacts,
    FinishReason,
    FinishRequest,
    Message,
    RejectRequest,
    SamplingParams,
    StepTokens,
    TokenizedRequest,
)
from stages.persistent_batch import PersistentBatch

VOCAB_SIZE = 7
UNKNOWN = -1
REJECTED = -1


def make_config(**changes: object) -> ServerConfig:
    """A small server; `changes` are fields of `ServerConfig`."""
    fields: dict[str, object] = {
        "model": "m",
        "served_model_name": "m",
        "facts": ModelFacts("A", VOCAB_SIZE, 64, [0]),
        "run_dir": "r",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
    }
    return ServerConfig(**{**fields, **changes})  # type: ignore[arg-type]


def extend_digest(digest: int, token_id: int) -> int:
    """The digest of a prefix, one token longer."""
    return (digest * 6364136223846793005 + (token_id + 1) * 1442695040888963407 + 1) % 2**61


def first_digest(cache_salt: str) -> int:
    """The digest of the empty prefix: users with another salt have another KV."""
    return crc32(cache_salt.encode()) + 1


def next_token(digest: int) -> int:
    """The model."""
    return (digest >> 20) % VOCAB_SIZE


@dataclass
class Submitted:
    """What a client asked for; `text_stop`: outputs after which a stop string ends it (0: none)."""

    message: TokenizedRequest
    text_stop: int = 0

    def end_of(self, outputs: list[int]) -> FinishReason:
        """The sampler's rule: stop token, length, then stop string."""
        reason = finish_reasons(
            np.array(outputs[-1:], dtype=np.int32),
            np.array([len(outputs)], dtype=np.int32),
            np.array([self.message.params.max_tokens], dtype=np.int32),
            i32(self.message.params.stop_token_ids)[None, :],
        )[0]
        if not reason and len(outputs) == self.text_stop:
            return FinishReason.STOP
        return FinishReason(int(reason))

    def reference_outputs(self) -> list[int]:
        """What the request must say, computed alone and at once."""
        digest = first_digest(self.message.cache_salt)
        for token_id in i32(self.message.prompt_token_ids).tolist():
            digest = extend_digest(digest, token_id)
        outputs: list[int] = []
        while not outputs or not self.end_of(outputs):
            outputs.append(next_token(digest))
            digest = extend_digest(digest, outputs[-1])
        return outputs


@dataclass
class SimulatedExecutor:
    """Executes steps one by one and distrusts each of them."""

    config: ServerConfig
    kv: list[list[int]]
    submitted: dict[int, Submitted]
    batch: PersistentBatch = field(init=False)
    token_ids: dict[int, list[int]] = field(init=False)
    block_ids: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.forget_rows()

    def forget_rows(self) -> None:
        """A new epoch has begun; the KV stays."""
        self.batch = PersistentBatch(self.config.max_num_seqs)
        self.token_ids = {}
        self.block_ids = {}

    def execute(self, step: ExecuteStep) -> StepTokens:
        """Run one step; the tokens in the plan's order."""
        self._take_and_free_rows(step)
        rows = self.batch.apply(step)
        assert 0 < rows.num_scheduled.sum() <= self.config.max_num_batched_tokens
        assert len(set(rows.rows.tolist())) == len(rows.rows), "a row twice in a step"
        assert (rows.num_scheduled > 0).all()
        token_ids = []
        for row, start, count, is_sampled in zip(
            rows.rows.tolist(),
            rows.num_computed.tolist(),
            rows.num_scheduled.tolist(),
            rows.sampled.tolist(),
            strict=True,
        ):
            digest = self._compute(row, start, start + count)
            if is_sampled:
                self.token_ids[row].append(next_token(digest))
                token_ids.append(next_token(digest))
        assert (rows.sampled[: rows.num_decoding]).all(), "a decoding row must catch up"
        return StepTokens(step.step_id, i32_bytes(rows.sampled_rows), i32_bytes(token_ids))

    def _take_and_free_rows(self, step: ExecuteStep) -> None:
        for row in i32(step.released_rows).tolist():
            del self.token_ids[row], self.block_ids[row]
        for new in step.new_rows:
            assert new.row not in self.token_ids, "the row is another's"
            self.token_ids[new.row] = i32(new.token_ids).tolist()
            self.block_ids[new.row] = i32(new.block_ids).tolist()
            assert new.num_computed_tokens < len(self.token_ids[new.row])
            assert new.num_computed_tokens == 0 or new.params.prompt_logprobs < 0
        for row, block_id in zip(
            i32(step.block_rows).tolist(), i32(step.block_ids).tolist(), strict=True
        ):
            self.block_ids[row].append(block_id)
        for block_ids in self.block_ids.values():
            assert len(set(block_ids)) == len(block_ids) and 0 not in block_ids
        for row in i32(step.started_rows).tolist():
            assert row in self.token_ids and not self.batch.is_decoding[row]
        for row in i32(step.stopped_rows).tolist():
            assert row in self.token_ids and self.batch.is_decoding[row]

    def _compute(self, row: int, start: int, end: int) -> int:
        """Write the KV of positions start..end-1, check that of all before, return the digest."""
        block_size = self.config.block_size
        table = self.block_ids[row]
        others = {b for other, ids in self.block_ids.items() if other != row for b in ids}
        salt = self.submitted[int(self.batch.request_ids[row])].message.cache_salt
        expected = digest = first_digest(salt)
        for position, token_id in enumerate(self.token_ids[row][:end]):
            expected = extend_digest(expected, token_id)
            block_id, slot = table[position // block_size], position % block_size
            if position >= start:
                assert block_id not in others, "two live requests share a block that is written"
                self.kv[block_id][slot] = extend_digest(digest, token_id)
            digest = self.kv[block_id][slot]
            assert digest == expected, f"wrong KV at position {position} of row {row}"
        assert end <= len(self.token_ids[row]), "a token that nobody knows was scheduled"
        return digest


class SimulatedGroup:
    """A scheduler stage among simulated neighbours that are as slow as the test wants.

    plans: sent, not executed. tokens: executed, not delivered to the scheduler. in_flight: the
    requests that get a token of each step of both. finishes: what the sampler wants to tell the
    scheduler. outputs, ends: what the clients have received.
    """

    def __init__(self, config: ServerConfig, num_blocks: int) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.stage = SchedulerStage(config)
        self.submitted: dict[int, Submitted] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, int] = {}
        self.epoch = 0
        self.incarnation = 0
        self.begin_epoch(new_incarnation=True)

    # ── what may happen ──────────────────────────────────────────────────────────────────────

    def begin_epoch(self, new_incarnation: bool) -> None:
        """A stage died: forget everything but the clients; tell the open requests again."""
        self.epoch += 1
        self.incarnation += new_incarnation
        block_size = self.config.block_size
        if new_incarnation:
            kv = [[0] * block_size for _ in range(self.num_blocks)]
            self.executor = SimulatedExecutor(self.config, kv, self.submitted)
        self.executor.forget_rows()
        self.sampler_batch = PersistentBatch(self.config.max_num_seqs)
        self.plans: deque[ExecuteStep] = deque()
        self.tokens: deque[StepTokens] = deque()
        self.planned_batch = PersistentBatch(self.config.max_num_seqs)
        self.in_flight: deque[set[int]] = deque()
        self.finishes: deque[FinishRequest] = deque()
        self.ended_by_scheduler: set[int] = set()
        self.num_admissions: dict[int, int] = {}
        self.num_cached: dict[int, int] = {}
        facts = ExecutorFacts(self.num_blocks, block_size, VOCAB_SIZE, self.incarnation)
        self.stage.begin_epoch(BeginEpoch(self.epoch, facts))
        for request_id in self.open_requests():
            self._send_request(request_id)

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        text_stop: int = 0,
    ) -> int:
        """A client arrives; returns its request id."""
        request_id = len(self.submitted) + 100
        message = TokenizedRequest(
            request_id, 0, i32_bytes(prompt), params, priority=priority, cache_salt=cache_salt
        )
        self.submitted[request_id] = Submitted(message, text_stop)
        self.outputs[request_id] = []
        self._send_request(request_id)
        return request_id

    def abort(self, request_id: int) -> None:
        """A client leaves."""
        self.tell(AbortRequest(request_id, self.epoch))

    def execute(self) -> None:
        """The device finishes its oldest step; the sampler sees the tokens at once."""
        if self.plans:
            step = self.plans.popleft()
            message = self.executor.execute(step)
            self.tokens.append(message)
            self._sample(step, message)

    def deliver(self) -> None:
        """The oldest tokens reach the scheduler."""
        if self.tokens:
            self.in_flight.popleft()
            self.tell(self.tokens.popleft())

    def deliver_finish(self) -> None:
        """The oldest word of the sampler reaches the scheduler."""
        if self.finishes:
            self.tell(self.finishes.popleft())

    def drain(self) -> None:
        """Let everything end, within the number of steps that the work can need."""
        work = sum(len(i32(s.message.prompt_token_ids)) + 64 for s in self.submitted.values())
        for _ in range((self.config.max_preemptions + 2) * work + 10):
            self.execute()
            self.deliver()
            self.deliver_finish()
            self.check()
            if not (self.plans or self.tokens or self.finishes):
                break
        assert not self.open_requests(), "a request never ended"
        assert self.stage.queue_len() == 0
        assert self.stage.stats()["kv_cache_usage_perc"] == 0

    def tell(self, *messages: Message) -> None:
        """Hand messages to the stage and take what it says."""
        for message in self.stage.handle(messages, now_ns=0):
            match message:
                case ExecuteStep():
                    self.plans.append(message)
                    self._check_lagging(message)
                    depth = 2 if self.config.overlap else 1
                    assert len(self.plans) + len(self.tokens) <= depth
                case EndRequests():
                    self._end_requests(message)
                case RejectRequest():
                    self._end(message.request_id, REJECTED)
                case _:
                    raise AssertionError(f"the scheduler said {message}")

    # ── what must be true ────────────────────────────────────────────────────────────────────

    def open_requests(self) -> list[int]:
        """Requests whose clients still wait."""
        return [request_id for request_id in self.submitted if request_id not in self.ends]

    def conversation(self, request_id: int) -> list[int]:
        """Prompt and outputs so far."""
        prompt = i32(self.submitted[request_id].message.prompt_token_ids).tolist()
        return prompt + self.outputs[request_id]

    def check(self) -> None:
        """Blocks and rows of the stage are consistent."""
        rows, pool = self.stage._scheduler._rows, self.stage._kv_cache.pool
        assert pool.num_free + pool.num_used == self.num_blocks - 1
        num_refs = np.zeros(self.num_blocks, dtype=np.int32)
        for row in np.flatnonzero(rows.status != FREE):
            np.add.at(num_refs, rows.block_table[row, : rows.num_blocks[row]], 1)
            assert rows.num_computed[row] <= rows.num_blocks[row] * self.config.block_size
            assert rows.num_computed[row] <= rows.num_known[row]
            assert rows.num_blocks[row] <= rows.max_blocks[row]
        assert (num_refs == pool.num_refs).all()
        assert num_refs[0] == 0 and pool.num_used == np.count_nonzero(num_refs)

    def check_outputs(self) -> None:
        """Each client got what it would have got alone."""
        for request_id, reason in self.ends.items():
            reference = self.submitted[request_id].reference_outputs()
            outputs = self.outputs[request_id]
            assert outputs == reference[: len(outputs)]
            if reason not in (FinishReason.ABORT, REJECTED):
                assert outputs == reference

    def _check_lagging(self, step: ExecuteStep) -> None:
        """Who lags is in no step as long as one of its tokens is in flight; all others may be."""
        rows = self.planned_batch.apply(step)
        request_ids = self.planned_batch.request_ids
        for request_id in request_ids[rows.rows].tolist():
            params = self.submitted[request_id].message.params
            if samples_ahead(self.config) and lag_reason(params):
                assert not any(request_id in sampled for sampled in self.in_flight)
        self.in_flight.append(set(request_ids[rows.sampled_rows].tolist()))

    # ── gateway and sampler ──────────────────────────────────────────────────────────────────

    def _send_request(self, request_id: int) -> None:
        old = self.submitted[request_id].message
        self.tell(
            TokenizedRequest(
                request_id,
                self.epoch,
                old.prompt_token_ids,
                old.params,
                old.priority,
                old.cache_salt,
                output_token_ids=i32_bytes(self.outputs[request_id]),
            )
        )

    def _sample(self, step: ExecuteStep, message: StepTokens) -> None:
        for new in step.new_rows:
            self._check_new_row_counts(
                new.request_id, new.num_computed_tokens, new.num_cached_tokens
            )
            outputs = i32(new.token_ids).tolist()[new.num_prompt_tokens :]
            assert new.request_id in self.ends or outputs == self.outputs[new.request_id]
        rows = self.sampler_batch.apply(step).sampled_rows
        assert rows.tolist() == i32(message.rows).tolist()
        for request_id, token_id in zip(
            self.sampler_batch.request_ids[rows].tolist(),
            i32(message.token_ids).tolist(),
            strict=True,
        ):
            if request_id not in self.ends:
                self._take_token(request_id, token_id)

    def _check_new_row_counts(self, request_id: int, num_computed: int, num_cached: int) -> None:
        self.num_admissions[request_id] = self.num_admissions.get(request_id, 0) + 1
        assert self.num_admissions[request_id] <= 1 + self.config.max_preemptions
        num_prompt = len(self.submitted[request_id].message.prompt_token_ids) // 4
        first = self.num_cached.setdefault(request_id, min(num_computed, num_prompt))
        assert num_cached == first

    def _take_token(self, request_id: int, token_id: int) -> None:
        assert token_id != NO_TOKEN
        outputs = self.outputs[request_id]
        outputs.append(token_id)
        if reason := self.submitted[request_id].end_of(outputs):
            self._end(request_id, reason)
            if len(outputs) == self.submitted[request_id].text_stop:
                self.finishes.append(FinishRequest(request_id, self.epoch))

    def _end_requests(self, message: EndRequests) -> None:
        for request_id, reason in zip(
            u64(message.request_ids).tolist(), i8(message.reasons).tolist(), strict=True
        ):
            assert request_id not in self.ended_by_scheduler, "ended twice by the scheduler"
            self.ended_by_scheduler.add(request_id)
            if request_id not in self.ends:  # else it ended by itself while the abort travelled
                self._end(request_id, reason)

    def _end(self, request_id: int, reason: int) -> None:
        assert request_id not in self.ends, "ended twice"
        self.ends[request_id] = int(reason)
