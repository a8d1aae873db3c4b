"""The core of the gateway: open requests, recovery, bounds. No sockets, no clock."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.deliveries import Delta
from gateway_svc.sessions import GatewayStage
from stages.columns import i32, i32_bytes
from stages.messages import (
    AbortRequest,
    BeginEpoch,
    CloseRequest,
    Detokenize,
    Detokenized,
    Drain,
    Drained,
    ExecutorFacts,
    FinishReason,
    Flush,
    Generate,
    Message,
    OpenRequest,
    OutputLogprobs,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    Resend,
    SamplingParams,
    TextOutputs,
    TextPrompt,
    Tokenize,
    Tokenized,
)
from stages.request_ids import gateway_of
from tests.unit.gateway_fakes import make_config, text_outputs, token_logprob


class Driver:
    """A core in epoch 1 and shorthands to talk to it."""

    def __init__(self, **config: Any) -> None:
        self.core = GatewayStage(make_config(**config), incarnation=3)
        self.core.begin_epoch(BeginEpoch(1, ExecutorFacts()))

    def tell(self, *messages: Message) -> list[Message]:
        return self.core.handle(messages, now_ns=0)

    def open(self) -> tuple[int, list[Message]]:
        (request_id,) = self.core.next_request_ids(1)
        draft = Generate(request_id, 0, TextPrompt("hi"), SamplingParams(max_tokens=9))
        return request_id, self.tell(OpenRequest(draft))

    def step(self, request_id: int, *token_ids: int, reason: int = 0, epoch: int = 1) -> Any:
        """A step of one request, written at once."""
        return self.tell(self.outputs(request_id, *token_ids, reason=reason, epoch=epoch), Flush())

    @staticmethod
    def outputs(request_id: int, *token_ids: int, reason: int = 0, epoch: int = 1) -> TextOutputs:
        text = "".join(f"{token_id} " for token_id in token_ids)
        return text_outputs(epoch, (request_id, list(token_ids), text, reason))


def test_no_two_gateways_and_no_two_lives_mint_the_same_ids() -> None:
    cores = [
        GatewayStage(make_config(gateways=2), incarnation, index)
        for incarnation in (1, 3)
        for index in (0, 1)
    ]
    ids = [
        [*core.next_request_ids(2), *core.next_request_ids(3)] for core in cores for _ in range(2)
    ]
    assert len({request_id for own in ids for request_id in own}) == 2 * 4 * 5
    assert [{*map(gateway_of, own)} for own in ids] == [{0}, {0}, {1}, {1}] * 2


def test_gateways_share_the_capacity() -> None:
    config = {"max_num_seqs": 4, "max_queued_requests": 3}
    assert GatewayStage(make_config(**config), 1).capacity == 7
    assert GatewayStage(make_config(**config, gateways=2), 1, 1).capacity == 4


def test_an_opened_request_goes_to_the_tokenizer_with_the_epoch() -> None:
    driver = Driver()
    request_id, (generate,) = driver.open()
    assert isinstance(generate, Generate)
    assert (generate.request_id, generate.epoch, generate.output_token_ids) == (request_id, 1, b"")


def test_one_step_is_split_into_deltas_of_its_requests() -> None:
    driver = Driver()
    first, _ = driver.open()
    second, _ = driver.open()
    out = driver.tell(
        text_outputs(
            1, (second, [7], "b", FinishReason.STOP), (first, [5, 6], "aa", 0), stop=["end"]
        )
    )
    assert out == [
        Delta(second, i32_bytes([7]), "b", FinishReason.STOP, "end"),
        Delta(first, i32_bytes([5, 6]), "aa"),
    ]
    assert driver.core.num_open == 1


def test_text_is_held_until_it_is_time_but_never_a_first_token_nor_an_end() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    other, _ = driver.open()
    assert driver.tell(driver.outputs(request_id, 5)) == [Delta(request_id, i32_bytes([5]), "5 ")]
    assert driver.tell(driver.outputs(request_id, 6), driver.outputs(request_id, 7)) == []
    assert driver.core.holds_text
    assert driver.tell(driver.outputs(other, 1)) == [Delta(other, i32_bytes([1]), "1 ")]
    assert driver.tell(Flush()) == [Delta(request_id, i32_bytes([6, 7]), "6 7 ")]
    assert not driver.core.holds_text
    assert driver.tell(driver.outputs(request_id, 8)) == []
    end = driver.tell(driver.outputs(request_id, 9, reason=FinishReason.LENGTH))
    assert end == [Delta(request_id, i32_bytes([8, 9]), "8 9 ", FinishReason.LENGTH)]
    assert driver.tell(Flush()) == []
    assert driver.core.progress() == 6 + 1


def test_log_probabilities_take_along_what_is_held() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    driver.step(request_id, 5)
    driver.tell(driver.outputs(request_id, 6))
    token = token_logprob("7 ", 7, 0)
    out = driver.tell(OutputLogprobs(request_id, 1, [token]), driver.outputs(request_id, 7))
    assert out == [Delta(request_id, i32_bytes([6, 7]), "6 7 ", logprobs=[token])]


def test_what_is_held_comes_before_an_error() -> None:
    driver = Driver(max_recoveries=0)
    refused, _ = driver.open()
    given_up, _ = driver.open()
    for token_id in (5, 6):
        for request_id in (refused, given_up):
            driver.tell(driver.outputs(request_id, token_id))
    held, error = driver.tell(RequestRejected(refused, 1, 500, "broken", "it broke"))
    assert held == Delta(refused, i32_bytes([6]), "6 ")
    assert isinstance(error, RequestRejected)
    held, _, error = driver.tell(Resend(2, unanswered_only=False))
    assert held == Delta(given_up, i32_bytes([6]), "6 ")
    assert isinstance(error, RequestRejected)


def test_a_client_that_has_left_gets_nothing_of_what_is_held() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    driver.step(request_id, 5)
    driver.tell(driver.outputs(request_id, 6), CloseRequest(request_id))
    assert driver.tell(Flush()) == []


def test_logprobs_travel_with_the_delta_of_their_tokens() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    token = token_logprob("5 ", 5, 1)
    assert driver.tell(OutputLogprobs(request_id, 1, [token])) == []
    assert driver.step(request_id, 5) == [Delta(request_id, i32_bytes([5]), "5 ", logprobs=[token])]
    assert driver.step(request_id, 6) == [Delta(request_id, i32_bytes([6]), "6 ")]


def test_logprobs_without_their_tokens_are_forgotten_in_a_recovery() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    driver.tell(OutputLogprobs(request_id, 1, [token_logprob("5 ", 5, 1)]))
    driver.tell(Resend(2, unanswered_only=False))
    again = token_logprob("5 ", 5, 1)
    driver.tell(OutputLogprobs(request_id, 2, [again]))
    (delta,) = driver.step(request_id, 5, epoch=2)
    assert delta.logprobs == [again]


@pytest.mark.parametrize("epoch", [0, 2])
def test_messages_of_another_epoch_are_dropped_and_counted(epoch: int) -> None:
    driver = Driver()
    request_id, _ = driver.open()
    assert driver.step(request_id, 5, epoch=epoch) == []
    assert driver.tell(RequestStarted(request_id, epoch, 3, 0)) == []
    assert driver.tell(RequestRejected(request_id, epoch, 400, "code", "text")) == []
    assert driver.core.num_open == 1
    assert driver.core.stats()["dropped_messages_total"] == 3


def test_unknown_requests_are_ignored() -> None:
    driver = Driver()
    assert driver.step(999, 5, reason=FinishReason.STOP) == []
    assert driver.tell(CloseRequest(999), Tokenized(999, b"", [])) == []


def test_a_rejection_ends_the_request() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    rejected = RequestRejected(request_id, 1, 400, "code", "text", "prompt")
    assert driver.tell(rejected) == [rejected]
    assert driver.core.num_open == 0
    assert driver.tell(rejected) == []


# ── a client that leaves ─────────────────────────────────────────────────────────────────────


def test_closing_aborts_once_and_waits_for_the_terminal_in_silence() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    assert driver.tell(CloseRequest(request_id)) == [AbortRequest(request_id, 1)]
    assert driver.tell(CloseRequest(request_id)) == []
    assert driver.step(request_id, 5) == []
    assert driver.tell(RequestStarted(request_id, 1, 3, 0)) == []
    assert driver.core.num_open == 1
    assert driver.step(request_id, reason=FinishReason.ABORT) == []
    assert driver.core.num_open == 0


def test_a_recovery_drops_what_nobody_waits_for() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    driver.tell(CloseRequest(request_id))
    assert driver.tell(Resend(2, unanswered_only=False)) == []
    assert driver.core.num_open == 0


def test_a_dead_tokenizer_may_have_lost_an_abort() -> None:
    driver = Driver()
    answered, _ = driver.open()
    unanswered, _ = driver.open()
    driver.step(answered, 5)
    driver.tell(CloseRequest(answered), CloseRequest(unanswered))
    out = driver.tell(Resend(1, unanswered_only=True))
    assert out == [AbortRequest(answered, 1), AbortRequest(unanswered, 1)]
    assert driver.core.num_open == 1  # the pipeline owes a terminal for what it has answered
    driver.step(answered, reason=FinishReason.ABORT)
    assert driver.core.num_open == 0


# ── recovery ─────────────────────────────────────────────────────────────────────────────────


def test_resend_tells_each_open_request_with_its_tokens_so_far() -> None:
    driver = Driver()
    first, (opened,) = driver.open()
    _, (other,) = driver.open()
    ended, _ = driver.open()
    driver.step(first, 5, 6)
    driver.step(first, 7)
    driver.step(ended, 1, reason=FinishReason.STOP)
    out = driver.tell(Resend(2, unanswered_only=False))
    token_ids = i32_bytes([5, 6, 7])
    assert out == [
        msgspec.structs.replace(opened, epoch=2, output_token_ids=token_ids),
        msgspec.structs.replace(other, epoch=2),
    ]
    assert driver.step(first, 8, epoch=1) == []
    assert driver.step(first, 8, epoch=2) == [Delta(first, i32_bytes([8]), "8 ")]


def test_a_second_resend_of_the_same_epoch_changes_nothing() -> None:
    driver = Driver()
    driver.open()
    assert len(driver.tell(Resend(2, unanswered_only=False))) == 1
    assert driver.tell(Resend(2, unanswered_only=False)) == []
    assert driver.core.stats()["recoveries_total"] == 1


def test_what_was_opened_in_the_new_epoch_is_not_sent_twice() -> None:
    driver = Driver()
    driver.core.begin_epoch(BeginEpoch(2, ExecutorFacts()))
    driver.open()
    assert driver.tell(Resend(2, unanswered_only=False)) == []


def test_a_new_tokenizer_is_told_only_what_nothing_was_heard_of() -> None:
    driver = Driver()
    heard, _ = driver.open()
    unheard, _ = driver.open()
    driver.tell(RequestStarted(heard, 1, 3, 0))
    out = driver.tell(Resend(1, unanswered_only=True))
    assert [message.request_id for message in out if isinstance(message, Generate)] == [unheard]


def test_after_a_recovery_a_request_is_unanswered_again_and_keeps_its_tokens() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    driver.step(request_id, 5)
    driver.tell(Resend(2, unanswered_only=False))
    (generate,) = driver.tell(Resend(2, unanswered_only=True))
    assert isinstance(generate, Generate)
    assert i32(generate.output_token_ids).tolist() == [5]


def test_a_client_hears_of_one_start_and_one_set_of_prompt_logprobs() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    first = [
        RequestStarted(request_id, 1, 3, 1, "abc"),
        PromptLogprobs(request_id, 1, [token_logprob("a", 1, 0)]),
    ]
    assert driver.tell(*first) == first
    driver.tell(Resend(2, unanswered_only=False))
    assert driver.tell(RequestStarted(request_id, 2, 3, 3), PromptLogprobs(request_id, 2, [])) == []


@pytest.mark.parametrize("unanswered_only", [False, True])
def test_a_request_that_is_recovered_too_often_fails(unanswered_only: bool) -> None:
    driver = Driver(max_recoveries=2)
    request_id, _ = driver.open()
    epochs = [1, 1, 1] if unanswered_only else [2, 3, 4]
    for epoch in epochs[:2]:
        (generate,) = driver.tell(Resend(epoch, unanswered_only))
        assert isinstance(generate, Generate)
    abort, rejected = driver.tell(Resend(epochs[2], unanswered_only))
    assert abort == AbortRequest(request_id, epochs[2])
    assert isinstance(rejected, RequestRejected)
    assert (rejected.status, rejected.code) == (500, "recovery_limit")
    assert driver.core.num_open == 0


@given(
    groups=st.lists(st.integers(0, 3), max_size=12),
    recoveries=st.sets(st.integers(0, 12), max_size=3),
    lost=st.integers(0, 3),
)
def test_no_token_is_lost_or_doubled_wherever_recoveries_fall(
    groups: list[int], recoveries: set[int], lost: int
) -> None:
    """A pipeline that numbers its tokens dies `recoveries` times with `lost` steps unheard of."""
    driver = Driver(max_recoveries=3)
    request_id, _ = driver.open()
    epoch, position, got, texts = 1, 0, [], ""
    for index, count in enumerate([*groups, 1]):
        if index in recoveries:
            late = list(range(position, position + lost))
            epoch += 1
            (generate,) = driver.tell(Resend(epoch, unanswered_only=False))
            assert isinstance(generate, Generate)
            position = len(generate.output_token_ids) // 4
            assert driver.step(request_id, *late, epoch=epoch - 1) == []
        is_last = index == len(groups)
        tokens = range(position, position + count)
        (delta,) = driver.step(
            request_id, *tokens, reason=FinishReason.LENGTH if is_last else 0, epoch=epoch
        )
        got += i32(delta.token_ids).tolist()
        texts += delta.text
        position += count
    assert got == list(range(sum(groups) + 1))
    assert texts == "".join(f"{token} " for token in got)
    assert driver.core.num_open == 0


# ── bounds, queries, drain ───────────────────────────────────────────────────────────────────


def test_open_requests_are_bounded() -> None:
    driver = Driver(max_num_seqs=1, max_queued_requests=1)
    driver.open()
    driver.open()
    request_id, (rejected,) = driver.open()
    assert isinstance(rejected, RequestRejected)
    assert (rejected.request_id, rejected.status, rejected.code) == (request_id, 503, "queue_full")
    assert driver.core.refusal(0) is None
    assert driver.core.num_open == 2


def test_nothing_is_taken_before_the_first_epoch() -> None:
    core = GatewayStage(make_config(), incarnation=1)
    refusal = core.refusal(1)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (503, "starting")


def test_queries_are_answered_and_sent_again_to_a_new_tokenizer_only() -> None:
    driver = Driver()
    first, second = driver.core.next_request_ids(2)
    queries = [Tokenize(first, TextPrompt("hi")), Detokenize(second, i32_bytes([1]))]
    assert driver.tell(*queries) == queries
    assert driver.tell(Resend(2, unanswered_only=False)) == []
    assert driver.tell(Resend(2, unanswered_only=True)) == queries
    answers = [Tokenized(first, i32_bytes([1]), ["hi"]), Detokenized(second, "hi")]
    assert driver.tell(*answers) == answers
    assert driver.tell(*answers) == []
    assert driver.core.num_open == 0


def test_a_query_can_be_rejected_whatever_the_epoch_says() -> None:
    driver = Driver()
    (request_id,) = driver.core.next_request_ids(1)
    driver.tell(Tokenize(request_id, TextPrompt("hi")))
    rejected = RequestRejected(request_id, 0, 400, "code", "text")
    assert driver.tell(rejected) == [rejected]


def test_draining_refuses_new_requests_and_tells_once_when_the_last_has_ended() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    assert driver.tell(Drain(0)) == []
    _, (rejected,) = driver.open()
    assert isinstance(rejected, RequestRejected)
    assert (rejected.status, rejected.code) == (503, "draining")
    assert driver.step(request_id, 5, reason=FinishReason.STOP)[1:] == [Drained()]
    assert driver.tell() == []


def test_an_idle_gateway_is_drained_at_once() -> None:
    assert Driver().tell(Drain(0)) == [Drained()]


def test_vital_signs() -> None:
    driver = Driver()
    request_id, _ = driver.open()
    driver.open()
    assert (driver.core.queue_len(), driver.core.progress()) == (2, 0)
    driver.step(request_id, 5, 6, reason=FinishReason.STOP)
    assert (driver.core.queue_len(), driver.core.progress()) == (1, 3)
    assert driver.core.stats()["num_requests_open"] == 1
