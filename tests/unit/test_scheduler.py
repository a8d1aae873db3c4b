"""The scheduler stage, message by message."""

from __future__ import annotations

import msgspec
import pytest

from scheduler_svc.policy import WaitingQueue
from scheduler_svc.request import read_request
from scheduler_svc.stage import SchedulerStage
from stages.columns import i8, i32, i32_bytes, u64
from stages.config import ModelFacts, ServerConfig
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    EndRequests,
    ExecuteStep,
    ExecutorFacts,
    FinishReason,
    FinishRequest,
    Message,
    NewRow,
    RejectRequest,
    SamplingParams,
    StepLogprobs,
    StepTokens,
    TokenizedRequest,
)
from stages.persistent_batch import PersistentBatch

EPOCH = 5
TOKEN = 1
STOP = 2


def tokenized(
    request_id: int,
    prompt: int | list[int] = 4,
    max_tokens: int = 8,
    *,
    priority: int = 0,
    cache_salt: str = "",
    outputs: tuple[int, ...] = (),
    epoch: int = EPOCH,
    prompt_logprobs: int = -1,
    stop: tuple[int, ...] = (STOP,),
) -> TokenizedRequest:
    # A prompt given by its length is unlike that of any other request.
    ids = [request_id * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return TokenizedRequest(
        request_id,
        epoch,
        i32_bytes(ids),
        SamplingParams(
            max_tokens=max_tokens, prompt_logprobs=prompt_logprobs, stop_token_ids=i32_bytes(stop)
        ),
        priority=priority,
        cache_salt=cache_salt,
        output_token_ids=i32_bytes(outputs),
    )


class Server:
    """A stage and a device that gives every row `TOKEN`, or what `say` tells it."""

    def __init__(self, num_blocks: int = 33, **changes: object) -> None:
        fields: dict[str, object] = {
            "model": "m",
            "served_model_name": "m",
            "facts": ModelFacts("A", 10, 64, [0]),
            "run_dir": "r",
            "max_model_len": 64,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "block_size": 4,
            "overlap": False,
        }
        self.config = ServerConfig(**{**fields, **changes})  # type: ignore[arg-type]
        self.facts = ExecutorFacts(num_blocks, self.config.block_size, 10, 1)
        self.stage = SchedulerStage(self.config)
        self.begin_epoch(EPOCH)

    def begin_epoch(self, epoch: int, incarnation: int = 1) -> None:
        facts = msgspec.structs.replace(self.facts, incarnation=incarnation)
        self.stage.begin_epoch(BeginEpoch(epoch, facts))
        self.batch = PersistentBatch(self.config.max_num_seqs)
        self.in_flight: list[ExecuteStep] = []

    def tell(self, *messages: Message) -> list[Message]:
        """What the stage says; steps among it are in flight from now on."""
        out = self.stage.handle(messages, now_ns=0)
        self.in_flight += [message for message in out if isinstance(message, ExecuteStep)]
        return out

    def tell_step(self, *messages: Message) -> ExecuteStep:
        """The one step that the stage answers with."""
        (step,) = self.tell(*messages)
        assert isinstance(step, ExecuteStep)
        return step

    def tokens(self, say: dict[int, int] | None = None) -> StepTokens:
        """Execute the oldest step in flight; `say`: request id to token."""
        step = self.in_flight.pop(0)
        rows = self.batch.apply(step).sampled_rows
        ids = self.batch.request_ids[rows].tolist()
        token_ids = [(say or {}).get(request_id, TOKEN) for request_id in ids]
        return StepTokens(step.step_id, i32_bytes(rows), i32_bytes(token_ids))

    def back(self, say: dict[int, int] | None = None) -> list[Message]:
        """Let the oldest step come back."""
        return self.tell(self.tokens(say))

    def back_step(self, say: dict[int, int] | None = None) -> ExecuteStep:
        """Let the oldest step come back; the one step that the stage answers with."""
        (step,) = self.back(say)
        assert isinstance(step, ExecuteStep)
        return step

    def drain(self, max_steps: int = 200) -> list[NewRow]:
        """Run until nothing is in flight; all rows that were taken meanwhile."""
        new_rows = []
        for _ in range(max_steps):
            if not self.in_flight:
                return new_rows
            new_rows += [row for step in self.back() for row in step.new_rows]  # type: ignore[attr-defined]
        raise AssertionError("the stage does not come to rest")


def ends(message: Message) -> list[tuple[int, int]]:
    assert isinstance(message, EndRequests)
    return list(zip(u64(message.request_ids).tolist(), i8(message.reasons).tolist(), strict=True))


# ── prefill, decode, budget ──────────────────────────────────────────────────────────────────


def test_prefills_in_chunks_and_then_decodes() -> None:
    server = Server(max_num_batched_tokens=3)
    steps = [server.tell_step(tokenized(1, prompt=5))]
    steps += [server.back_step() for _ in range(3)]
    assert [i32(step.prefill_lens).tolist() for step in steps] == [[3], [2], [], []]
    assert [i32(step.started_rows).tolist() for step in steps] == [[], [], [0], []]


def test_a_new_row_brings_the_whole_prompt_and_its_blocks() -> None:
    server = Server()
    request = tokenized(7, prompt=6)
    (new_row,) = server.tell_step(request).new_rows
    assert new_row.token_ids == request.prompt_token_ids
    assert (new_row.request_id, new_row.num_prompt_tokens) == (7, 6)
    assert (new_row.num_computed_tokens, new_row.num_cached_tokens) == (0, 0)
    assert i32(new_row.block_ids).tolist() == [1, 2]
    assert new_row.params == request.params


def test_steady_decode_says_nearly_nothing() -> None:
    server = Server(num_blocks=200, max_num_seqs=32, max_num_batched_tokens=256)
    server.tell(*(tokenized(i, prompt=3, max_tokens=60) for i in range(1, 33)))
    for _ in range(3):
        server.back()
    assert server.in_flight[0] == ExecuteStep(step_id=4)


def test_a_row_gets_a_block_when_its_last_is_full() -> None:
    server = Server()
    server.tell(tokenized(1, prompt=4))
    step = server.back_step()
    assert (i32(step.block_rows).tolist(), i32(step.block_ids).tolist()) == ([0], [2])
    assert [i32(server.back_step().block_rows).tolist() for _ in range(4)] == [[], [], [], [0]]


def test_decoding_rows_take_the_budget_first() -> None:
    server = Server(max_num_batched_tokens=4)
    server.tell(tokenized(1, prompt=2))
    step = server.tell_step(server.tokens(), tokenized(2, prompt=9, priority=-1))
    assert i32(step.started_rows).tolist() == [0]
    assert i32(step.prefill_lens).tolist() == [3]


def test_prefill_goes_by_priority_and_then_arrival() -> None:
    server = Server(max_num_batched_tokens=10)
    step = server.tell_step(
        tokenized(1, prompt=4), tokenized(2, prompt=4), tokenized(3, prompt=4, priority=-1)
    )
    assert [new_row.request_id for new_row in step.new_rows] == [3, 1, 2]
    assert i32(step.prefill_lens).tolist() == [4, 4, 2]


def test_a_better_newcomer_waits_for_budget_behind_rows_in_prefill() -> None:
    server = Server(max_num_batched_tokens=4)
    server.tell(tokenized(1, prompt=10))
    step = server.tell_step(server.tokens(), tokenized(2, priority=-1))
    assert (i32(step.prefill_rows).tolist(), step.new_rows) == ([0], [])


def test_rows_beyond_the_budget_pause_and_go_on_later() -> None:
    server = Server(max_num_batched_tokens=2)
    server.tell(*(tokenized(i, prompt=1, max_tokens=4, priority=-i) for i in (1, 2, 3)))
    assert len(server.drain()) == 1  # the other two came with the first step
    assert server.stage.stats()["generation_tokens_total"] == 12


def test_at_most_max_num_seqs_rows() -> None:
    server = Server(max_num_seqs=2)
    step = server.tell_step(*(tokenized(i) for i in (1, 2, 3)))
    assert [new_row.request_id for new_row in step.new_rows] == [1, 2]
    assert server.stage.queue_len() == 3


# ── one step ahead ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("overlap", "depth"), [(False, 1), (True, 2)])
def test_keeps_depth_steps_in_flight(overlap: bool, depth: int) -> None:
    server = Server(overlap=overlap)
    assert len(server.tell(tokenized(1))) == depth
    assert len(server.back()) == 1
    assert server.tell() == []


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_an_exact_max_tokens_never_plans_a_useless_step(overlap: bool, max_tokens: int) -> None:
    server = Server(overlap=overlap)
    server.tell(tokenized(1, max_tokens=max_tokens))
    server.drain()
    assert server.stage.progress() == max_tokens
    assert server.stage.stats()["generation_tokens_total"] == max_tokens


def test_a_stop_token_costs_one_discarded_result() -> None:
    server = Server(overlap=True)
    server.tell(tokenized(1))
    assert server.back({1: STOP}) == []
    assert server.stage.stats()["kv_cache_usage_perc"] > 0  # the second step still writes there
    assert server.back() == []
    assert server.stage.stats()["kv_cache_usage_perc"] == 0
    assert server.stage.stats()["generation_tokens_total"] == 1


def test_a_row_that_ended_stops_and_is_released_when_its_last_step_is_back() -> None:
    server = Server(overlap=True)
    server.tell(tokenized(1, prompt=3), tokenized(2, prompt=3))
    step = server.back_step({1: STOP})
    assert (i32(step.stopped_rows).tolist(), i32(step.released_rows).tolist()) == ([0], [])
    step = server.tell_step(server.tokens(), tokenized(3))
    assert i32(step.released_rows).tolist() == [0]
    assert [(new_row.row, new_row.request_id) for new_row in step.new_rows] == [(0, 3)]


def test_a_release_with_no_work_left_goes_with_the_next_step() -> None:
    server = Server()
    server.tell(tokenized(1, max_tokens=1))
    assert server.back() == []
    assert i32(server.tell_step(tokenized(2)).released_rows).tolist() == [0]


def test_a_longer_list_of_stop_ids_widens_the_table() -> None:
    server = Server()
    server.tell(tokenized(1, stop=()), tokenized(2, stop=(7, 8, 9)))
    server.back({1: 9, 2: 9})
    assert server.stage.stats()["num_requests_running"] == 1


# ── ends from outside ────────────────────────────────────────────────────────────────────────


def test_an_abort_of_a_waiting_request_ends_it_at_once() -> None:
    server = Server(max_num_seqs=1)
    server.tell(tokenized(1), tokenized(2))
    (message,) = server.tell(AbortRequest(2, EPOCH))
    assert ends(message) == [(2, FinishReason.ABORT)]
    assert server.stage.queue_len() == 1


def test_an_abort_of_a_running_request_frees_when_its_step_is_back() -> None:
    server = Server()
    server.tell(tokenized(1))
    (message,) = server.tell(AbortRequest(1, EPOCH))
    assert ends(message) == [(1, FinishReason.ABORT)]
    assert server.stage.stats()["kv_cache_usage_perc"] > 0
    assert server.tell(AbortRequest(1, EPOCH)) == []
    assert server.back() == []
    assert server.stage.stats()["kv_cache_usage_perc"] == 0
    assert server.stage.stats()["generation_tokens_total"] == 0


def test_aborts_of_one_batch_go_in_one_message() -> None:
    server = Server()
    server.tell(tokenized(1), tokenized(2))
    (message,) = server.tell(AbortRequest(2, EPOCH), AbortRequest(1, EPOCH))
    assert ends(message) == [(2, FinishReason.ABORT), (1, FinishReason.ABORT)]


def test_a_stop_string_frees_without_a_word() -> None:
    server = Server()
    server.tell(tokenized(1))
    assert server.tell(FinishRequest(1, EPOCH)) == []
    assert server.back() == []
    assert server.stage.stats()["kv_cache_usage_perc"] == 0


def test_ends_of_unknown_requests_are_ignored() -> None:
    server = Server()
    assert server.tell(AbortRequest(9, EPOCH), FinishRequest(9, EPOCH)) == []


# ── requests that do not run ─────────────────────────────────────────────────────────────────


def test_refuses_what_can_never_fit_and_says_the_remedy() -> None:
    server = Server(num_blocks=4)  # 12 tokens
    (message,) = server.tell(tokenized(1, prompt=7, max_tokens=7))
    assert isinstance(message, RejectRequest)
    assert (message.request_id, message.status) == (1, 400)
    assert message.code == "context_length_exceeded"
    assert "7 tokens" in message.message and "--kv-cache-memory" in message.message
    assert server.stage.queue_len() == 0


def test_takes_what_fits_exactly() -> None:
    server = Server(num_blocks=4)
    server.tell(tokenized(1, prompt=7, max_tokens=6))  # the last token needs no KV
    server.drain()
    assert server.stage.stats()["generation_tokens_total"] == 6


@pytest.mark.parametrize(("prompt", "code"), [(0, "empty_prompt"), (64, "context_length_exceeded")])
def test_refuses_prompts_without_room(prompt: int, code: str) -> None:
    (message,) = Server().tell(tokenized(1, prompt=prompt))
    assert isinstance(message, RejectRequest)
    assert message.code == code


@pytest.mark.parametrize("max_tokens", [0, 1000])
def test_cuts_max_tokens_to_the_context_and_tells_the_executor(max_tokens: int) -> None:
    (new_row,) = Server().tell_step(tokenized(1, prompt=60, max_tokens=max_tokens)).new_rows
    assert new_row.params.max_tokens == 4


@pytest.mark.parametrize("priority", [-(2**63), 2**63 - 1])
def test_no_priority_is_too_large_for_a_column(priority: int) -> None:
    server = Server()
    server.tell(tokenized(1, priority=priority))
    server.drain()
    assert server.stage.stats()["generation_tokens_total"] == 8


def test_a_request_told_again_is_ignored() -> None:
    server = Server()
    server.tell(tokenized(1), tokenized(1))
    assert server.stage.queue_len() == 1
    server.tell(tokenized(1))
    assert server.stage.queue_len() == 1


def test_messages_of_other_epochs_and_steps_are_dropped_and_counted() -> None:
    server = Server()
    server.tell(tokenized(1))
    server.tell(tokenized(2, epoch=EPOCH - 1), AbortRequest(1, EPOCH - 1))
    server.tell(FinishRequest(1, EPOCH + 1), StepTokens(99, b"", b""))
    assert server.stage.queue_len() == 1
    assert server.stage.stats()["dropped_messages_total"] == 4


def test_logprobs_on_the_token_ring_are_not_the_schedulers() -> None:
    server = Server()
    assert server.tell(StepLogprobs(1, b"", b"", b"", b"", b"", b"")) == []
    assert server.stage.stats()["dropped_messages_total"] == 0


def test_before_the_first_epoch_everything_is_dropped() -> None:
    stage = SchedulerStage(Server().config)
    assert stage.handle([tokenized(1), StepTokens(1, b"", b"")], now_ns=0) == []
    assert stage.stats()["dropped_messages_total"] == 2


# ── recovery ─────────────────────────────────────────────────────────────────────────────────


def test_a_recovered_request_goes_on_behind_its_outputs() -> None:
    server = Server()
    request = tokenized(1, prompt=4, max_tokens=5, outputs=(6, 7, 8))
    (new_row,) = server.tell_step(request).new_rows
    assert new_row.token_ids == request.prompt_token_ids + request.output_token_ids
    assert new_row.num_prompt_tokens == 4
    server.drain()
    assert server.stage.stats()["generation_tokens_total"] == 2


@pytest.mark.parametrize(
    ("outputs", "reason"), [((6, STOP), FinishReason.STOP), ((6, 7, 8), FinishReason.LENGTH)]
)
def test_a_recovered_request_that_had_ended_is_ended(
    outputs: tuple[int, ...], reason: FinishReason
) -> None:
    server = Server()
    (message,) = server.tell(tokenized(1, max_tokens=3, outputs=outputs))
    assert ends(message) == [(1, reason)]
    assert server.stage.queue_len() == 0


def test_a_new_epoch_forgets_every_request() -> None:
    server = Server(max_num_seqs=1)
    server.tell(tokenized(1), tokenized(2))
    late = server.tokens()
    server.begin_epoch(EPOCH + 1)
    assert server.tell(late) == []
    assert server.stage.queue_len() == 0
    assert server.stage.stats()["kv_cache_usage_perc"] == 0


@pytest.mark.parametrize(("incarnation", "num_cached"), [(1, 8), (2, 0)])
def test_the_prefix_cache_lives_as_long_as_the_executor(incarnation: int, num_cached: int) -> None:
    server = Server()
    server.tell(tokenized(1, prompt=[3] * 9))
    server.back()  # the request itself still runs
    server.begin_epoch(EPOCH + 1, incarnation)
    (new_row,) = server.tell_step(tokenized(1, prompt=[3] * 9, epoch=EPOCH + 1)).new_rows
    assert new_row.num_computed_tokens == num_cached


# ── prefix cache ─────────────────────────────────────────────────────────────────────────────


def test_an_equal_prefix_is_computed_once() -> None:
    server = Server()
    server.tell(tokenized(1, prompt=[3] * 10))
    step = server.tell_step(server.tokens(), tokenized(2, prompt=[3] * 10))
    (new_row,) = step.new_rows
    assert (new_row.num_computed_tokens, new_row.num_cached_tokens) == (8, 8)
    assert i32(new_row.block_ids).tolist()[:2] == [1, 2]
    assert i32(step.prefill_lens).tolist() == [2]
    stats = server.stage.stats()
    assert stats["prefix_cache_queries_total"] == 20
    assert stats["prefix_cache_hits_total"] == 8


def test_at_least_one_token_is_computed() -> None:
    server = Server()
    server.tell(tokenized(1, prompt=[3] * 8))
    (new_row,) = server.tell_step(server.tokens(), tokenized(2, prompt=[3] * 8)).new_rows
    assert new_row.num_computed_tokens == 4


def test_a_block_is_not_found_before_its_step_is_back() -> None:
    server = Server(overlap=True)
    server.tell(tokenized(1, prompt=[3] * 9), tokenized(2, prompt=[3] * 9))
    server.tell(tokenized(3, prompt=[3] * 9))
    assert server.stage.stats()["prefix_cache_hits_total"] == 0
    server.back()
    assert server.stage.stats()["prefix_cache_hits_total"] == 8


def test_generated_blocks_are_found_after_the_release() -> None:
    server = Server()
    server.tell(tokenized(1, prompt=[3] * 3, max_tokens=6))
    server.drain()  # KV of 8 tokens: 3 of the prompt, 5 outputs
    turn = [3] * 3 + [TOKEN] * 6
    (new_row,) = server.tell_step(tokenized(2, prompt=turn)).new_rows
    assert new_row.num_computed_tokens == 8


def test_a_token_that_nobody_learnt_is_not_found() -> None:
    server = Server(overlap=True)
    server.tell(tokenized(1, prompt=[3] * 3))
    server.tell(AbortRequest(1, EPOCH))  # the second step computes the first output
    server.drain()
    (new_row,) = server.tell(tokenized(2, prompt=[3, 3, 3, 0, 3]))[0].new_rows  # type: ignore[attr-defined]
    assert new_row.num_computed_tokens == 0


@pytest.mark.parametrize(
    ("changes", "request_fields"),
    [
        ({}, {"cache_salt": "b"}),
        ({}, {"prompt_logprobs": 0}),
        ({"enable_prefix_caching": False}, {}),
    ],
)
def test_no_hit_across_salts_or_with_prompt_logprobs_or_when_off(
    changes: dict[str, object], request_fields: dict[str, str]
) -> None:
    server = Server(**changes)  # type: ignore[arg-type]
    server.tell(tokenized(1, prompt=[3] * 9))
    request = tokenized(2, prompt=[3] * 9, **request_fields)  # type: ignore[arg-type]
    (new_row,) = server.tell_step(server.tokens(), request).new_rows
    assert new_row.num_computed_tokens == 0


# ── preemption ───────────────────────────────────────────────────────────────────────────────


def preempting_server(**changes: object) -> Server:
    """Four blocks, two rows of one block each that will want two more."""
    return Server(num_blocks=5, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first_priority", "victim"), [(0, 2), (1, 1)])
def test_the_newest_of_the_lowest_priority_is_preempted(first_priority: int, victim: int) -> None:
    server = preempting_server()
    server.tell(
        tokenized(1, prompt=3, max_tokens=10, priority=first_priority),
        tokenized(2, prompt=3, max_tokens=10),
    )
    (again,) = server.drain()
    assert again.request_id == victim
    assert server.stage.stats()["num_preemptions_total"] == 1
    assert server.stage.stats()["generation_tokens_total"] == 20


def test_a_preempted_request_comes_back_with_all_its_tokens() -> None:
    server = preempting_server(enable_prefix_caching=False)
    request = tokenized(2, prompt=3, max_tokens=10)
    server.tell(tokenized(1, prompt=3, max_tokens=10), request)
    (again,) = server.drain()
    assert again.num_prompt_tokens == 3
    assert again.token_ids == request.prompt_token_ids + i32_bytes([TOKEN] * 6)
    assert (again.num_computed_tokens, again.num_cached_tokens) == (0, 0)


def test_a_preempted_request_may_find_its_own_blocks() -> None:
    server = preempting_server()
    server.tell(tokenized(1, prompt=3, max_tokens=10), tokenized(2, prompt=3, max_tokens=10))
    (again,) = server.drain()
    assert again.num_cached_tokens == 0  # as at its first admission
    assert again.num_computed_tokens == 4  # the first block; the other one was taken


def test_while_the_victims_steps_are_in_flight_the_best_row_pauses() -> None:
    server = Server(num_blocks=7, overlap=True)
    server.tell(
        tokenized(1, prompt=3, max_tokens=12),
        tokenized(2, prompt=3, max_tokens=12, priority=1),
        tokenized(3, prompt=1, max_tokens=12),
    )
    while not (step := server.back_step()).stopped_rows:
        pass
    assert server.batch.request_ids.tolist() == [1, 3, 2, 0]
    assert i32(step.stopped_rows).tolist() == [0, 2]
    step = server.back_step()
    assert (i32(step.released_rows).tolist(), i32(step.started_rows).tolist()) == ([2], [0])
    assert i32(step.block_rows).tolist() == [0]


def test_as_many_are_preempted_as_the_others_need() -> None:
    server = Server(num_blocks=16, max_num_seqs=8, max_num_batched_tokens=64)
    server.tell(*(tokenized(i, prompt=3, max_tokens=10) for i in range(1, 9)))
    assert len(server.back_step().released_rows) == 0
    grown = [step for step in (server.back_step() for _ in range(6)) if step.block_rows]
    assert [i32(step.released_rows).tolist() for step in grown] == [[7], [6, 5]]
    assert [i32(step.block_rows).tolist() for step in grown] == [list(range(7)), list(range(5))]


def test_a_row_about_to_end_saves_the_others_from_preemption() -> None:
    server = Server(num_blocks=7, overlap=True)
    server.tell(
        tokenized(1, prompt=3, max_tokens=12),
        tokenized(2, prompt=3, max_tokens=6),
        tokenized(3, prompt=1, max_tokens=8),
    )
    while not (step := server.back_step()).stopped_rows:
        pass
    assert i32(step.stopped_rows).tolist() == [0, 1]  # one waits for a block, one has ended
    assert i32(server.back_step().started_rows).tolist() == [0]
    server.drain()
    assert server.stage.stats()["num_preemptions_total"] == 0


def test_the_best_row_waits_for_protected_ones_instead_of_being_preempted() -> None:
    server = Server(num_blocks=12, max_num_batched_tokens=64, max_preemptions=1)
    server.tell(
        tokenized(1, prompt=3, max_tokens=30),
        tokenized(2, prompt=3, max_tokens=26, priority=1),
        tokenized(3, prompt=27, max_tokens=6),
    )
    (again,) = server.drain()
    assert (again.request_id, len(i32(again.block_ids))) == (2, 7)
    assert server.stage.stats()["num_preemptions_total"] == 1
    assert server.stage.stats()["generation_tokens_total"] == 62


def test_a_preempted_request_can_be_aborted() -> None:
    server = preempting_server()
    server.tell(tokenized(1, prompt=3, max_tokens=10), tokenized(2, prompt=3, max_tokens=10))
    while not server.stage.stats()["num_requests_waiting"]:
        server.back()
    (message,) = server.tell(AbortRequest(2, EPOCH))
    assert ends(message) == [(2, FinishReason.ABORT)]
    assert server.drain() == []
    assert server.stage.stats()["kv_cache_usage_perc"] == 0


def test_without_preemptions_left_the_whole_length_is_reserved() -> None:
    server = preempting_server(max_preemptions=0)
    step = server.tell_step(
        tokenized(1, prompt=3, max_tokens=10), tokenized(2, prompt=3, max_tokens=10)
    )
    assert [len(i32(new_row.block_ids)) for new_row in step.new_rows] == [3]
    server.drain()
    assert server.stage.stats()["num_preemptions_total"] == 0
    assert server.stage.stats()["generation_tokens_total"] == 20


def test_a_newcomer_leaves_a_growing_row_its_next_block() -> None:
    server = Server(num_blocks=4)
    server.tell(tokenized(1, prompt=3, max_tokens=9))
    assert server.tell_step(server.tokens(), tokenized(2, prompt=8, max_tokens=1)).new_rows == []


# ── the waiting queue ────────────────────────────────────────────────────────────────────────


def test_a_protected_request_at_the_head_is_not_overtaken() -> None:
    queue = WaitingQueue()
    first, better = (
        read_request(tokenized(i, priority=priority), i, 64, 64)
        for i, priority in ((1, 0), (2, -1))
    )
    first.is_protected = True
    queue.push(first)
    assert queue.head() is first
    queue.push(better)
    assert queue.head() is first
    queue.remove(first)
    assert queue.head() is better


def test_a_protected_request_behind_the_head_waits_for_its_turn() -> None:
    queue = WaitingQueue()
    protected, better = (
        read_request(tokenized(i, priority=priority), i, 64, 64)
        for i, priority in ((1, 0), (2, -1))
    )
    protected.is_protected = True
    queue.push(protected)
    queue.push(better)
    assert queue.head() is better


# ── figures ──────────────────────────────────────────────────────────────────────────────────


def test_figures() -> None:
    server = Server(num_blocks=11, max_num_seqs=1)
    server.tell(tokenized(1, prompt=8), tokenized(2))
    server.back()
    stats = server.stage.stats()
    assert (stats["num_requests_running"], stats["num_requests_waiting"]) == (1, 1)
    assert stats["kv_cache_usage_perc"] == pytest.approx(0.3)
    assert (stats["prompt_tokens_total"], stats["generation_tokens_total"]) == (8, 1)
    assert stats["steps_total"] == server.stage.progress() == 1
    assert server.stage.queue_len() == 2


def test_the_same_messages_give_the_same_bytes() -> None:
    def run() -> bytes:
        server = preempting_server(overlap=True)
        said = server.tell(*(tokenized(i, prompt=3, max_tokens=10) for i in (3, 1, 2)))
        while server.in_flight:
            said += server.back()
        return msgspec.msgpack.encode(said)

    assert run() == run()
