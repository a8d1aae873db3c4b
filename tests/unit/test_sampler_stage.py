"""The sampler stage: order of two rings, text, ends, recovery, both placements."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler_svc.detokenizer import Detokenizer
from sampler_svc.stage import SamplerStage
from stages.columns import f32_bytes, i8, i8_bytes, i32, i32_bytes, u64, u64_bytes
from stages.config import ModelFacts, ServerConfig
from stages.messages import (
    BeginEpoch,
    EndRequests,
    ExecuteStep,
    ExecutorFacts,
    FinishReason,
    FinishRequest,
    GroupState,
    Message,
    NewRow,
    OutputLogprobs,
    PromptLogprobs,
    RejectRequest,
    RequestRejected,
    RequestStarted,
    SamplingParams,
    StepLogits,
    StepLogprobs,
    StepPromptLogprobs,
    StepTokens,
    TextOutputs,
)
from tests.sampler_tokenizers import END, byte_level_tokenizer, id_of

TOKENIZER = byte_level_tokenizer()
DETOKENIZER = Detokenizer(TOKENIZER)
EOS = id_of(TOKENIZER, END)
EPOCH = 7


def make_stage(placement: str = "device", epoch: int = EPOCH) -> SamplerStage:
    config = ServerConfig(
        model="none",
        served_model_name="none",
        facts=ModelFacts("none", TOKENIZER.get_vocab_size(), 1000, [EOS]),
        run_dir="none",
        max_num_seqs=8,
        sampling_placement=placement,
    )
    stage = SamplerStage(config, DETOKENIZER)
    stage.begin_epoch(BeginEpoch(epoch, ExecutorFacts()))
    return stage


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def params(**changes: Any) -> SamplingParams:
    """Ends at the model's own end token or after 100 tokens."""
    return SamplingParams(**{"max_tokens": 100, "stop_token_ids": i32_bytes([EOS]), **changes})


def new_row(
    row: int,
    request_id: int,
    prompt: str = "Hi",
    outputs: Sequence[int] = (),
    num_cached_tokens: int = 0,
    **changes: Any,
) -> NewRow:
    prompt_ids = ids_of(prompt)
    return NewRow(
        row=row,
        request_id=request_id,
        token_ids=i32_bytes([*prompt_ids, *outputs]),
        num_prompt_tokens=len(prompt_ids),
        num_computed_tokens=0,
        num_cached_tokens=num_cached_tokens,
        block_ids=b"",
        params=params(**changes),
    )


def plan(step_id: int, *new_rows: NewRow, released: Sequence[int] = ()) -> ExecuteStep:
    return ExecuteStep(step_id, released_rows=i32_bytes(released), new_rows=list(new_rows))


def tokens(step_id: int, **of_row: int) -> StepTokens:
    """`r3=17`: row 3 gets token 17."""
    rows = [int(name[1:]) for name in of_row]
    return StepTokens(step_id, i32_bytes(rows), i32_bytes(of_row.values()))


def end_requests(*ends: tuple[int, FinishReason]) -> EndRequests:
    return EndRequests(u64_bytes(i for i, _ in ends), i8_bytes(reason for _, reason in ends))


def abort(request_id: int) -> EndRequests:
    return end_requests((request_id, FinishReason.ABORT))


class Client:
    """What the gateway makes of the stage's messages."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.ends: dict[int, tuple[FinishReason, str | int | None]] = {}

    def take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, TextOutputs):
                self._take_outputs(message)

    def _take_outputs(self, message: TextOutputs) -> None:
        assert message.epoch == EPOCH
        start = 0
        stop_reasons = iter(message.stop_reasons)
        columns = zip(
            u64(message.request_ids).tolist(),
            i32(message.num_tokens).tolist(),
            message.deltas,
            i8(message.finish_reasons).tolist(),
            strict=True,
        )
        for request_id, num_tokens, delta, reason in columns:
            assert request_id not in self.ends, "an output behind the end"
            ids = i32(message.token_ids)[start : start + num_tokens].tolist()
            start += num_tokens
            self.text[request_id] = self.text.get(request_id, "") + delta
            self.token_ids.setdefault(request_id, []).extend(ids)
            if reason:
                self.ends[request_id] = (FinishReason(reason), next(stop_reasons))
        assert start == len(i32(message.token_ids))
        assert next(stop_reasons, "none left") == "none left"


def generate(
    stage: SamplerStage, output: Sequence[int], row: int = 0, request_id: int = 1, **changes: Any
) -> tuple[Client, list[Message]]:
    """Run one request over these output tokens, one step each."""
    said = stage.handle([plan(1, new_row(row, request_id, **changes))], 0)
    for step_id, token_id in enumerate(output, start=1):
        said += stage.handle([tokens(step_id, **{f"r{row}": token_id})], 0)
        said += stage.handle([plan(step_id + 1)], 0)
    client = Client()
    client.take(said)
    return client, said


def of_kind(messages: Sequence[Message], kind: type[Message]) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


# ── text and ends ────────────────────────────────────────────────────────────────────────────


def test_a_request_starts_gives_text_and_ends_at_the_models_end_token() -> None:
    stage = make_stage()
    client, said = generate(stage, [*ids_of(" water 水"), EOS], prompt="mill", num_cached_tokens=1)
    assert said[0] == RequestStarted(1, EPOCH, len(ids_of("mill")), 1)
    assert client.text == {1: " water 水"}
    assert client.token_ids == {1: [*ids_of(" water 水"), EOS]}
    assert client.ends == {1: (FinishReason.STOP, None)}
    assert of_kind(said, FinishRequest) == []
    assert stage.queue_len() == 0
    assert stage.progress() == len(client.token_ids[1])


def test_the_length_ends_a_request() -> None:
    client, _ = generate(make_stage(), ids_of("abcdefgh")[:3], max_tokens=3)
    assert client.ends == {1: (FinishReason.LENGTH, None)}
    assert client.text == {1: "abc"}


def test_a_users_stop_token_is_named_and_not_shown() -> None:
    (stop,) = ids_of("q")
    output = [*ids_of("xy"), stop, *ids_of("z")]
    changes: dict[str, Any] = {"stop_token_ids": i32_bytes([EOS, stop])}
    client, _ = generate(make_stage(), output, **changes)
    assert client.text == {1: "xy"}
    assert client.ends == {1: (FinishReason.STOP, stop)}
    assert client.token_ids[1][-1] == stop
    shown, _ = generate(make_stage(), output, include_stop_str_in_output=True, **changes)
    assert shown.text == {1: "xyq"}


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abqx!")])
def test_a_stop_string_over_several_tokens_ends_a_request(include: bool, text: str) -> None:
    output = ids_of("a") + ids_of("b") + ids_of("q") + ids_of("x") + ids_of("!") + ids_of("z")
    client, said = generate(make_stage(), output, stop=["qx!"], include_stop_str_in_output=include)
    assert client.text == {1: text}
    assert client.ends == {1: (FinishReason.STOP, "qx!")}
    assert of_kind(said, FinishRequest) == [FinishRequest(1, EPOCH)]
    assert client.token_ids == {1: output[:5]}


def test_text_held_for_a_stop_string_comes_with_the_end() -> None:
    output = ids_of("a") + ids_of("q") + ids_of("x")
    client, _ = generate(make_stage(), output, stop=["qx!"], max_tokens=3)
    assert client.text == {1: "aqx"} and client.ends[1][0] == FinishReason.LENGTH
    client, _ = generate(make_stage(), [*output, EOS], stop=["qx!"])
    assert client.text == {1: "aqx"} and client.ends[1] == (FinishReason.STOP, None)


def test_a_stop_string_wins_over_the_length_and_needs_no_word_to_the_scheduler() -> None:
    client, said = generate(make_stage(), ids_of("q") + ids_of("x"), stop=["x"], max_tokens=2)
    assert client.ends == {1: (FinishReason.STOP, "x")}
    assert of_kind(said, FinishRequest) == []


def test_stop_strings_wait_for_min_tokens() -> None:
    output = ids_of("x") + ids_of("a") + ids_of("x") + ids_of("b") + ids_of("x")
    client, _ = generate(make_stage(), output, stop=["x"], min_tokens=3)
    assert client.text == {1: "xaxb"}  # as in vLLM: looked for behind the third token
    assert client.ends == {1: (FinishReason.STOP, "x")}


def test_echo_gives_the_prompt_back() -> None:
    _, said = generate(make_stage(), [], prompt="Räder 水", echo=True)
    assert said == [RequestStarted(1, EPOCH, len(ids_of("Räder 水")), 0, "Räder 水")]


def test_one_message_a_step_for_all_requests() -> None:
    stage = make_stage()
    (a,) = ids_of("a")
    said = stage.handle([plan(1, *(new_row(row, 10 + row) for row in range(8)))], 0)
    assert [message.request_id for message in of_kind(said, RequestStarted)] == list(range(10, 18))
    said = stage.handle([tokens(1, r5=a, r0=EOS, r2=a)], 0)
    assert len(said) == 1
    (outputs,) = of_kind(said, TextOutputs)
    assert u64(outputs.request_ids).tolist() == [15, 10, 12]
    assert outputs.deltas == ["a", "", "a"]
    assert i8(outputs.finish_reasons).tolist() == [0, FinishReason.STOP, 0]
    assert outputs.stop_reasons == [None]
    assert stage.queue_len() == 7


def test_figures_count_tokens_and_ends() -> None:
    stage = make_stage()
    said = stage.handle(
        [
            plan(1, new_row(0, 1), new_row(1, 2, max_tokens=1), new_row(2, 3)),
            tokens(1, r0=EOS, r1=5, r2=5),
            end_requests((3, FinishReason.ABORT), (4, FinishReason.ERROR)),
            RejectRequest(5, 400, "code", "text", "param"),
            GroupState(1, []),
        ],
        0,
    )
    assert of_kind(said, RequestRejected) == [
        RequestRejected(5, EPOCH, 400, "code", "text", "param")
    ]
    assert stage.stats() == {
        "generation_tokens_total": 3,
        "request_success_stop_total": 1,
        "request_success_length_total": 1,
        "request_success_abort_total": 1,
        "request_success_error_total": 2,
        "dropped_messages_total": 1,
    }


# ── the order of two rings ───────────────────────────────────────────────────────────────────


def test_tokens_wait_for_their_plan() -> None:
    stage = make_stage()
    (a,) = ids_of("a")
    assert stage.handle([tokens(1, r0=a), tokens(2, r0=EOS)], 0) == []
    said = stage.handle([plan(1, new_row(0, 1))], 0)
    assert [type(message) for message in said] == [RequestStarted, TextOutputs]
    client = Client()
    client.take(said + stage.handle([plan(2)], 0))
    assert client.ends == {1: (FinishReason.STOP, None)}


def test_a_row_given_on_does_not_take_the_tokens_of_an_earlier_step() -> None:
    stage = make_stage()
    a, b = ids_of("ab")
    client = Client()
    # Row 0 passes from request 1 to request 2 before the tokens of step 2 have been read.
    plans = [plan(1, new_row(0, 1)), plan(2), plan(3, new_row(0, 2), released=[0])]
    client.take(stage.handle([*plans, tokens(1, r0=a), tokens(2, r0=a)], 0))
    client.take(stage.handle([tokens(3, r0=b)], 0))
    assert client.text == {1: "aa", 2: "b"}


def test_an_ended_row_gives_nothing_more() -> None:
    stage = make_stage()
    client = Client()
    client.take(stage.handle([plan(1, new_row(0, 1)), tokens(1, r0=EOS)], 0))
    assert stage.handle([plan(2), tokens(2, r0=5)], 0) == []
    assert client.token_ids == {1: [EOS]}


def test_an_abort_comes_behind_the_steps_planned_before_it() -> None:
    stage = make_stage()
    (a,) = ids_of("a")
    client = Client()
    client.take(stage.handle([plan(1, new_row(0, 1, stop=["ab"])), abort(1), plan(2)], 0))
    assert client.ends == {}
    client.take(stage.handle([tokens(1, r0=a), tokens(2, r0=a)], 0))
    assert client.token_ids == {1: [a]}
    assert client.text == {1: "a"}  # what was held back comes with the end
    assert client.ends == {1: (FinishReason.ABORT, None)}


def test_a_natural_end_wins_over_a_later_abort() -> None:
    stage = make_stage()
    client = Client()
    client.take(stage.handle([plan(1, new_row(0, 1)), abort(1), tokens(1, r0=EOS)], 0))
    client.take(stage.handle([plan(2), abort(1), tokens(2, r0=EOS), abort(1)], 0))
    assert client.ends == {1: (FinishReason.STOP, None)}


def test_requests_without_a_row_are_ended_too() -> None:
    stage = make_stage()
    client = Client()
    client.take(stage.handle([abort(2**63 + 5)], 0))
    client.take(stage.handle([plan(1, new_row(0, 1)), tokens(1, r0=5)], 0))
    client.take(stage.handle([plan(2, new_row(0, 2), released=[0]), tokens(2, r0=5)], 0))
    client.take(stage.handle([end_requests((1, FinishReason.ERROR))], 0))
    client.take(stage.handle([plan(3), tokens(3, r0=EOS)], 0))
    assert client.ends == {
        2**63 + 5: (FinishReason.ABORT, None),
        1: (FinishReason.ERROR, None),
        2: (FinishReason.STOP, None),
    }
    assert stage.queue_len() == 0


def test_a_request_id_may_come_back_after_its_end() -> None:
    stage = make_stage()
    stage.handle([plan(1, new_row(0, 1)), tokens(1, r0=EOS), plan(2, released=[0])], 0)
    client = Client()
    client.take(stage.handle([tokens(2), plan(3, new_row(0, 1)), tokens(3, r0=EOS)], 0))
    assert client.ends == {1: (FinishReason.STOP, None)}
    again = Client()
    again.take(stage.handle([plan(4, released=[0]), tokens(4), plan(5, new_row(0, 1))], 0))
    again.take(stage.handle([tokens(5, r0=A), abort(1)], 0))
    assert again.ends == {1: (FinishReason.ABORT, None)}


def test_a_row_keeps_no_stop_tokens_of_an_earlier_request() -> None:
    stage = make_stage()
    stage.handle([plan(1, new_row(0, 1)), tokens(1, r0=EOS)], 0)
    client = Client()
    client.take(stage.handle([plan(2, new_row(0, 2, stop_token_ids=b""), released=[0])], 0))
    client.take(stage.handle([tokens(2, r0=EOS), plan(3), tokens(3, r0=A)], 0))
    assert client.text == {2: "a"} and client.ends == {}


def test_results_of_steps_that_nobody_planned_are_dropped() -> None:
    stage = make_stage()
    stage.handle([tokens(3, r0=5), plan(4, new_row(0, 1)), tokens(4, r0=5)], 0)
    assert stage.stats()["dropped_messages_total"] == 1
    assert stage.stats()["generation_tokens_total"] == 1


SCRIPT_PLANS: list[Message] = [
    plan(1, new_row(0, 1, stop=["ab"]), new_row(1, 2)),
    plan(2, new_row(2, 3)),
    abort(2),
    plan(3, new_row(1, 4, max_tokens=2), released=[1]),
    plan(4, released=[0]),
    end_requests((3, FinishReason.ERROR), (9, FinishReason.ABORT)),
    plan(5, new_row(0, 5), released=[2]),
]
A, B = ids_of("ab")
SCRIPT_TOKENS: list[Message] = [
    tokens(1, r0=A, r1=A),
    tokens(2, r0=B, r1=B, r2=A),
    tokens(3, r0=A, r1=A, r2=B),
    tokens(4, r1=B, r2=B),
    tokens(5, r0=EOS, r1=A),
]


@settings(max_examples=100, deadline=None)
@given(
    from_plans=st.permutations([True] * len(SCRIPT_PLANS) + [False] * len(SCRIPT_TOKENS)),
    is_cut=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_how_the_rings_race_changes_nothing(from_plans: list[bool], is_cut: list[bool]) -> None:
    plans, results = iter(SCRIPT_PLANS), iter(SCRIPT_TOKENS)
    stage = make_stage()
    said: list[Message] = []
    batch: list[Message] = []
    for is_plan, cut in zip(from_plans, is_cut, strict=True):
        batch.append(next(plans if is_plan else results))
        if cut:
            said += stage.handle(batch, 0)
            batch = []
    said += stage.handle(batch, 0)
    expected = make_stage().handle([*SCRIPT_PLANS, *SCRIPT_TOKENS], 0)
    assert said == expected
    client = Client()
    client.take(said)
    assert client.ends == {
        1: (FinishReason.STOP, "ab"),
        2: (FinishReason.ABORT, None),
        4: (FinishReason.LENGTH, None),
        3: (FinishReason.ERROR, None),
        9: (FinishReason.ABORT, None),
        5: (FinishReason.STOP, None),
    }


# ── recovery and preemption ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_told", range(12))
def test_a_restarted_sampler_goes_on_where_the_old_one_was(num_told: int) -> None:
    output = ids_of(" wässer 😀 qx qx!")
    straight, _ = generate(make_stage(), output, stop=["qx!"], min_tokens=2)
    before, _ = generate(make_stage(), output[:num_told], stop=["qx!"], min_tokens=2)
    stage = make_stage()
    said = stage.handle(
        [plan(20, new_row(4, 1, outputs=output[:num_told], stop=["qx!"], min_tokens=2))], 0
    )
    assert [type(message) for message in said] == [RequestStarted]
    for step_id, token_id in enumerate(output[num_told:], start=20):
        said += stage.handle([tokens(step_id, r4=token_id), plan(step_id + 1)], 0)
    before.take(said)
    assert (before.text, before.token_ids, before.ends) == (
        straight.text,
        straight.token_ids,
        straight.ends,
    )


def test_a_preempted_request_goes_on_without_starting_again() -> None:
    stage = make_stage()
    output = ids_of("😀") + ids_of("z")
    client = Client()
    client.take(stage.handle([plan(1, new_row(0, 1)), tokens(1, r0=output[0])], 0))
    client.take(stage.handle([plan(2, new_row(0, 2), released=[0]), tokens(2, r0=A)], 0))
    said = stage.handle([plan(3, new_row(5, 1, outputs=output[:1]))], 0)
    assert said == []
    for step_id, token_id in enumerate(output[1:], start=3):
        client.take(stage.handle([tokens(step_id, r5=token_id, r0=A), plan(step_id + 1)], 0))
    assert client.text[1] == "😀z"
    assert set(client.text[2]) == {"a"}


def test_a_request_taken_up_after_its_stop_string_is_ended_again() -> None:
    """Preempted at the step of its stop string, it came back before the scheduler knew."""
    stage = make_stage()
    stage.handle([plan(1, new_row(0, 1, stop=["a"])), tokens(1, r0=A), plan(2, released=[0])], 0)
    said = stage.handle([tokens(2), plan(3, new_row(0, 1, outputs=[A], stop=["a"]))], 0)
    client = Client()
    client.take(said)
    assert of_kind(said, FinishRequest) == [FinishRequest(1, EPOCH)]
    assert client.ends == {1: (FinishReason.STOP, "a")}
    assert client.token_ids == {1: []}
    assert stage.handle([tokens(3, r0=B)], 0) == []


def test_a_new_epoch_forgets_everything() -> None:
    stage = make_stage()
    stage.handle([plan(1, new_row(0, 1)), plan(2), tokens(4)], 0)
    stage.begin_epoch(BeginEpoch(EPOCH + 1, ExecutorFacts()))
    assert stage.queue_len() == 0
    said = stage.handle([plan(2, new_row(0, 1)), tokens(2, r0=EOS)], 0)
    (started,), (outputs,) = of_kind(said, RequestStarted), of_kind(said, TextOutputs)
    assert started.epoch == outputs.epoch == EPOCH + 1
    assert stage.progress() == 1


# ── log-probabilities ────────────────────────────────────────────────────────────────────────


def step_logprobs(step_id: int, row: int, top_ids: Sequence[int]) -> StepLogprobs:
    return StepLogprobs(
        step_id=step_id,
        rows=i32_bytes([row]),
        logprobs=f32_bytes([-0.5]),
        ranks=i32_bytes([2]),
        num_top=i32_bytes([len(top_ids)]),
        top_ids=i32_bytes(top_ids),
        top_logprobs=f32_bytes([-0.25 * (i + 1) for i in range(len(top_ids))]),
    )


def test_output_logprobs_come_before_their_text() -> None:
    stage = make_stage()
    part = ids_of("😀")[0]
    said = stage.handle(
        [
            plan(1, new_row(3, 1, logprobs=2), new_row(4, 2)),
            step_logprobs(1, 3, [B, part]),
            tokens(1, r3=A, r4=A),
        ],
        0,
    )
    assert [type(message) for message in said[2:]] == [OutputLogprobs, TextOutputs]
    logprobs = said[2]
    assert isinstance(logprobs, OutputLogprobs) and logprobs.request_id == 1
    (token,) = logprobs.tokens
    assert (token.token, token.token_bytes, token.token_id) == ("a", b"a", A)
    assert (token.logprob, token.rank) == (-0.5, 2)
    assert [(top.token, top.token_id, top.logprob) for top in token.top] == [
        ("b", B, -0.25),
        ("\ufffd", part, -0.5),
    ]
    assert token.top[1].token_bytes == DETOKENIZER.token_text_and_bytes(part)[1]


def test_no_logprobs_of_rows_that_have_ended() -> None:
    stage = make_stage()
    stage.handle([plan(1, new_row(3, 1, logprobs=0)), tokens(1, r3=EOS)], 0)
    assert stage.handle([plan(2), step_logprobs(2, 3, []), tokens(2, r3=A)], 0) == []


def prompt_record(step_id: int, row: int, start: int, n: int) -> StepPromptLogprobs:
    positions = range(start, start + n)
    return StepPromptLogprobs(
        step_id=step_id,
        row=row,
        start=start,
        logprobs=f32_bytes([-float(position) for position in positions]),
        ranks=i32_bytes(positions),
        num_top=1,
        top_ids=i32_bytes([A] * n),
        top_logprobs=f32_bytes([-0.125] * n),
    )


def test_prompt_logprobs_are_told_whole_before_the_first_text() -> None:
    stage = make_stage()
    ids = ids_of("wheel turns")
    assert len(ids) > 4
    new = new_row(0, 1, prompt="wheel turns", prompt_logprobs=1)
    said = stage.handle([plan(1, new), prompt_record(1, 0, 1, 2), tokens(1)], 0)
    assert [type(message) for message in said] == [RequestStarted]
    rest = prompt_record(2, 0, 3, len(ids) - 3)
    said = stage.handle([plan(2), rest, tokens(2, r0=A)], 0)
    assert [type(message) for message in said] == [PromptLogprobs, TextOutputs]
    told = said[0]
    assert isinstance(told, PromptLogprobs)
    assert [token.token_id for token in told.tokens] == ids
    assert [token.rank for token in told.tokens] == list(range(len(ids)))
    others = told.tokens[1:]
    assert [token.logprob for token in others] == [-float(i) for i in range(1, len(ids))]
    assert [token.top[0].token_id for token in others] == [A] * (len(ids) - 1)


def test_prompt_logprobs_survive_a_preemption() -> None:
    stage = make_stage()
    ids = ids_of("wheel turns")
    new = new_row(0, 1, prompt="wheel turns", prompt_logprobs=1)
    stage.handle([plan(1, new), prompt_record(1, 0, 1, 3), tokens(1)], 0)
    again = msgspec.structs.replace(new, row=2)
    said = stage.handle(
        [plan(2, again, released=[0]), prompt_record(2, 2, 1, len(ids) - 1), tokens(2, r2=A)], 0
    )
    assert [type(message) for message in said] == [PromptLogprobs, TextOutputs]
    told = said[0]
    assert isinstance(told, PromptLogprobs)
    assert [token.rank for token in told.tokens] == list(range(len(ids)))
    once_more = prompt_record(3, 2, 1, len(ids) - 1)
    assert of_kind(stage.handle([plan(3), once_more, tokens(3, r2=A)], 0), PromptLogprobs) == []


def test_a_prompt_of_one_token_has_no_logprobs() -> None:
    said = make_stage().handle([plan(1, new_row(0, 1, prompt="a", prompt_logprobs=0))], 0)
    told = said[1]
    assert isinstance(told, PromptLogprobs)
    assert [(token.token, token.rank, token.top) for token in told.tokens] == [("a", 0, [])]


# ── placement `process` ──────────────────────────────────────────────────────────────────────


def test_in_placement_process_the_stage_samples_and_says_so_first() -> None:
    stage = make_stage("process")
    vocab = TOKENIZER.get_vocab_size()
    logits = np.zeros((2, vocab), dtype=np.float32)
    logits[0, A], logits[1, EOS] = 5.0, 5.0
    record = StepLogits(1, i32_bytes([0, 3]), vocab, logits.tobytes())
    rows = [new_row(0, 1, temperature=0.0, logprobs=1), new_row(3, 2, temperature=0.0)]
    said = stage.handle([plan(1, *rows), record], 0)
    assert [type(message) for message in said[2:]] == [
        StepLogprobs,
        StepTokens,
        OutputLogprobs,
        TextOutputs,
    ]
    assert said[3] == tokens(1, r0=A, r3=EOS)
    client = Client()
    client.take(said)
    assert client.text == {1: "a", 2: ""}
    assert client.ends == {2: (FinishReason.STOP, None)}


def test_in_placement_process_rows_are_released_and_empty_steps_answered() -> None:
    stage = make_stage("process")
    vocab = TOKENIZER.get_vocab_size()
    logits = np.zeros((1, vocab), dtype=np.float32)
    logits[0, A], logits[0, B] = 5.0, 4.0
    penalized: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 2.0}
    said: list[Message] = []
    for step_id in range(1, 5):
        new = new_row(0, step_id, max_tokens=1, **penalized)
        said += stage.handle([plan(step_id, new, released=[0] if step_id > 1 else [])], 0)
        said += stage.handle([StepLogits(step_id, i32_bytes([0]), vocab, logits.tobytes())], 0)
    said += stage.handle([plan(5, released=[0]), StepLogits(5, b"", vocab, b"")], 0)
    assert of_kind(said, StepTokens) == [*(tokens(i, r0=A) for i in range(1, 5)), tokens(5)]


def test_in_placement_device_the_process_never_loads_torch() -> None:
    code = "import sampler_svc.stage, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
