"""The whole pipeline in one process: real cores, channels replaced by queues.

Messages are encoded and decoded as on the wire. Stages run in an order that a seed decides, so that
every interleaving that processes can have is tried; a stage can be killed at any point.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from select import select
from typing import Any

import msgspec
import torch

from executor_svc.emulated import EmulatedExecutorStage, load_choices
from executor_svc.kv_cache import allocate_kv_cache
from executor_svc.main import wiring as executor_wiring
from executor_svc.model_config import load_model_config
from executor_svc.models.cpu import load_cpu_model
from executor_svc.models.model import Model
from executor_svc.stage import ExecutorStage
from gateway_svc.deliveries import DELIVERY_TYPES, Delta
from gateway_svc.main import TO_STAGE as GATEWAY_TO_STAGE
from gateway_svc.sessions import GatewayStage
from sampler_svc.main import WIRING as SAMPLER_WIRING
from sampler_svc.stage import SamplerStage
from scheduler_svc.main import WIRING as SCHEDULER_WIRING
from scheduler_svc.stage import SchedulerStage
from stages.columns import i32, i32_bytes
from stages.config import ServerConfig, encode_config
from stages.messages import (
    BeginEpoch,
    CloseRequest,
    ExecutorFacts,
    FinishReason,
    Flush,
    GatewayInbound,
    Generate,
    Message,
    OpenRequest,
    Prompt,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    Resend,
    SamplingParams,
    SchedulerInbound,
    TokenizerInbound,
    TokenLogprob,
    TokenPrompt,
)
from stages.model_folder import model_path, read_model_facts
from stages.recorder import RecordedStage
from stages.ring_ends import RECORDS
from stages.stage import CompletingStage, Stage, TimedStage
from stages.topology import (
    EPOCH_STAGES,
    EXECUTOR,
    GATEWAY,
    SAMPLER,
    SCHEDULER,
    TOKENIZER,
    rings,
)
from stages.trace import Trace
from tokenizer_svc.main import TO_STAGE as TOKENIZER_TO_STAGE
from tokenizer_svc.stage import TokenizerStage

INBOXES: dict[str, Any] = {
    GATEWAY: GatewayInbound,
    TOKENIZER: TokenizerInbound,
    SCHEDULER: SchedulerInbound,
}
MAX_TURNS = 200_000
DEVICE_TIMEOUT_S = 60


@dataclass
class Outcome:
    """All that a client would have got for one request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.NOT_FINISHED
    stop_reason: str | int | None = None
    rejected: RequestRejected | None = None
    started: RequestStarted | None = None
    num_terminals: int = 0


def make_config(folder: Path, **settings: Any) -> ServerConfig:
    """A configuration for a model folder; small limits unless `settings` says otherwise."""
    facts = read_model_facts(folder)
    defaults: dict[str, Any] = {
        "max_model_len": min(1024, facts.max_position_embeddings),
        "max_num_seqs": 32,
        "num_blocks": 2048,
        "block_size": 16,
        "dtype": "float32",
    }
    names = {"model": str(folder), "served_model_name": "m", "run_dir": "/nowhere"}
    return ServerConfig(facts=facts, **(names | defaults | settings))


class Pipeline:
    """Five cores and the queues between them."""

    def __init__(
        self,
        config: ServerConfig,
        seed: int = 0,
        model: Model | None = None,
        record_to: Path | None = None,
        make_executor: Callable[[ServerConfig, Trace], Stage] | None = None,
    ) -> None:
        """`record_to`: a folder that takes a recording of every stage. `make_executor`: in the
        place of what the configuration's device has.
        """
        self.config = config
        self._make_own_executor = make_executor
        self._record_to = record_to
        self.outcomes: dict[int, Outcome] = {}
        self._random = Random(seed)
        self._model = model
        self._trace = Trace()
        self._epoch = 0
        self.now_ns = 0
        self._incarnations = dict.fromkeys((*INBOXES, EXECUTOR, SAMPLER), 0)
        self._bare: dict[str, Stage] = {}
        self._cores: dict[str, Stage] = {}
        # (stage, channel) → encoded messages: ring names, and "inbox".
        self._queues: dict[tuple[str, str], deque[bytes]] = {}
        for stage in self._incarnations:
            self._spawn(stage)
        self._begin_epoch()

    # ── a client's view ──────────────────────────────────────────────────────────────────────

    def open(
        self, prompt: Sequence[int] | Prompt, params: SamplingParams, priority: int = 0
    ) -> int:
        """Send a request; returns its id."""
        request_id = self.gateway.next_request_ids(1).start
        self.outcomes[request_id] = Outcome()
        if isinstance(prompt, Sequence):
            prompt = TokenPrompt(i32_bytes(prompt))
        generate = Generate(request_id, 0, prompt, params, priority)
        self._say(GATEWAY, [OpenRequest(generate)])
        return request_id

    def close(self, request_id: int) -> None:
        """The client leaves."""
        self._say(GATEWAY, [CloseRequest(request_id)])

    def run(self, on_turn: Callable[[int], None] = lambda turn: None) -> None:
        """Let stages run in random order until none has anything to do."""
        for turn in range(MAX_TURNS):
            ready = {stage for (stage, _), queue in self._queues.items() if queue}
            if self._wakeup_ns() is not None or self._completes(wait=not ready):
                ready.add(EXECUTOR)
            if not ready:
                return
            self._turn(self._random.choice(sorted(ready)))
            on_turn(turn)
        raise AssertionError(f"the pipeline does not come to rest within {MAX_TURNS} turns")

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Outcome]:
        """Run prompts together to their ends."""
        request_ids = [self.open(prompt, params) for prompt in prompts]
        self.run()
        return [self.outcomes[request_id] for request_id in request_ids]

    # ── trouble ──────────────────────────────────────────────────────────────────────────────

    def kill(self, stage: str) -> None:
        """SIGKILL and restart, with all that the supervisor then does."""
        for (name, _), queue in self._queues.items():
            if name == stage:
                queue.clear()
        self._spawn(stage)
        if stage == TOKENIZER:
            self._say(GATEWAY, [Resend(self._epoch, unanswered_only=True)])
        else:
            self._begin_epoch()

    def close_recordings(self) -> None:
        """Finish the recordings, if any are made."""
        for stage in self._cores:
            self._close_recording(stage)

    @property
    def gateway(self) -> GatewayStage:
        core = self._bare[GATEWAY]
        assert isinstance(core, GatewayStage)
        return core

    @property
    def scheduler(self) -> SchedulerStage:
        core = self._bare[SCHEDULER]
        assert isinstance(core, SchedulerStage)
        return core

    def stats_of(self, stage: str) -> dict[str, float]:
        """What a stage tells of itself."""
        return self._bare[stage].stats()

    # ── machinery ────────────────────────────────────────────────────────────────────────────

    def _spawn(self, stage: str) -> None:
        self._incarnations[stage] += 1
        config = self.config
        makers: dict[str, Callable[[], Stage]] = {
            GATEWAY: lambda: GatewayStage(config, self._incarnations[GATEWAY]),
            TOKENIZER: lambda: TokenizerStage(config),
            SCHEDULER: lambda: SchedulerStage(config),
            EXECUTOR: self._make_executor,
            SAMPLER: lambda: SamplerStage(config),
        }
        core = makers[stage]()
        self._close_recording(stage)
        self._bare[stage] = self._cores[stage] = core
        if self._record_to is not None:
            path, incarnation = self._record_to / stage, self._incarnations[stage]
            self._cores[stage] = RecordedStage(
                core, path, stage, incarnation, encode_config(config)
            )

    def _close_recording(self, stage: str) -> None:
        core = self._cores.get(stage)
        if isinstance(core, RecordedStage):
            core.close()

    def _make_executor(self) -> Stage:
        config = self.config
        if self._make_own_executor is not None:
            return self._make_own_executor(config, self._trace)
        if config.device == "emulated":
            return EmulatedExecutorStage(config, load_choices(config), self._trace)
        self._model = self._model or load_test_model(config)
        kv_cache = allocate_kv_cache(self._model.kv_spec, config.num_blocks, config.block_size)
        for layer in kv_cache.layers:  # whoever reads what was not written gets NaN
            layer.key.fill_(float("nan"))
            layer.value.fill_(float("nan"))
        return ExecutorStage(config, self._model, kv_cache)

    def _begin_epoch(self) -> None:
        self._epoch += 1
        facts = ExecutorFacts(
            self.config.num_blocks,
            self.config.block_size,
            self.config.facts.vocab_size,
            self._incarnations[EXECUTOR],
        )
        message = BeginEpoch(self._epoch, facts)
        for stage in EPOCH_STAGES:
            self._cores[stage].begin_epoch(message)
        for (stage, channel), queue in self._queues.items():
            if stage in EPOCH_STAGES and channel != "inbox":
                queue.clear()  # rings are new; what lies in an inbox stays and is out of date
        self._cores[GATEWAY].begin_epoch(message)
        self._say(GATEWAY, [Resend(self._epoch, unanswered_only=False)])

    def _wakeup_ns(self) -> int | None:
        executor = self._bare[EXECUTOR]
        return executor.wakeup_ns() if isinstance(executor, TimedStage) else None

    def _completes(self, wait: bool) -> bool:
        """Whether the device has finished something; with `wait`: once it has, if it will."""
        executor = self._bare[EXECUTOR]
        if not isinstance(executor, CompletingStage) or not executor.queue_len():
            return False
        timeout_s = DEVICE_TIMEOUT_S if wait else 0
        return bool(select([executor.completion_fd()], [], [], timeout_s)[0])

    def _turn(self, stage: str) -> None:
        wakeup_ns = self._wakeup_ns() if stage == EXECUTOR else None
        if wakeup_ns is not None:  # time goes on by itself, or with what arrives
            self.now_ns = max(self.now_ns, self._random.choice([self.now_ns, wakeup_ns]))
        messages: list[Message] = []
        channels = [key for key, queue in self._queues.items() if key[0] == stage and queue]
        for key in channels:
            queue = self._queues[key]
            count = 1 if stage == EXECUTOR else self._random.randint(1, len(queue))
            union = INBOXES[stage] if key[1] == "inbox" else RECORDS[key[1]]
            messages += [msgspec.msgpack.decode(queue.popleft(), type=union) for _ in range(count)]
        self._say(stage, messages)
        if self.gateway.holds_text and self._random.randrange(2):
            self._say(GATEWAY, [Flush()])

    def _say(self, stage: str, messages: list[Message]) -> None:
        for message in self._cores[stage].handle(messages, self.now_ns):
            if isinstance(message, DELIVERY_TYPES) and stage == GATEWAY:
                self._deliver(message)
            else:
                self._route(stage, message)

    def _route(self, stage: str, message: Message) -> None:
        to_ring, to_stage = self._wirings()[stage]
        data = msgspec.msgpack.encode(message)
        ring = to_ring.get(type(message))
        if ring is None:
            self._queue(to_stage[type(message)], "inbox").append(data)
            return
        spec = next(s for s in rings(self.config.sampling_placement) if s.name == ring)
        assert spec.writer == stage
        for reader in spec.readers:
            self._queue(reader, ring).append(data)

    def _wirings(self) -> dict[str, tuple[Any, Any]]:
        executor = executor_wiring(self.config)
        return {
            GATEWAY: ({}, GATEWAY_TO_STAGE),
            TOKENIZER: ({}, TOKENIZER_TO_STAGE),
            SCHEDULER: (SCHEDULER_WIRING.to_ring, SCHEDULER_WIRING.to_stage),
            EXECUTOR: (executor.to_ring, executor.to_stage),
            SAMPLER: (SAMPLER_WIRING.to_ring, SAMPLER_WIRING.to_stage),
        }

    def _queue(self, stage: str, channel: str) -> deque[bytes]:
        return self._queues.setdefault((stage, channel), deque())

    def _deliver(self, delivery: Message) -> None:
        outcome = self.outcomes[delivery.request_id]  # type: ignore[attr-defined]
        match delivery:
            case Delta():
                outcome.token_ids += i32(delivery.token_ids).tolist()
                outcome.text += delivery.text
                outcome.logprobs += delivery.logprobs
                if delivery.finish_reason:
                    outcome.num_terminals += 1
                    outcome.finish_reason = FinishReason(delivery.finish_reason)
                    outcome.stop_reason = delivery.stop_reason
            case RequestRejected():
                outcome.num_terminals += 1
                outcome.rejected = delivery
            case RequestStarted():
                outcome.started = delivery
            case PromptLogprobs():
                outcome.prompt_logprobs += delivery.tokens


def load_test_model(config: ServerConfig) -> Model:
    """Load the configuration's model as a server would; pipelines may share it."""
    torch.set_num_threads(1)
    folder = model_path(config)
    return load_cpu_model(folder, load_model_config(folder), config.dtype, config.quantization)
