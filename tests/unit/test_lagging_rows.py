"""Rows that lag: planned when their token is back and not before, while all others run ahead."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scheduler_svc.stage import SchedulerStage
from stages.columns import i32_bytes
from stages.messages import AbortRequest, ExecuteStep, FinishRequest, TokenizedRequest
from stages.persistent_batch import PersistentBatch
from tests.unit.test_scheduler import EPOCH, STOP, Server, tokenized

LAGGING, OTHER = 1, 2
COUNTER = "lagging_row_steps_bad_words_total"


def with_bad_words(request: TokenizedRequest, *words: list[int]) -> TokenizedRequest:
    params = msgspec.structs.replace(
        request.params,
        bad_word_ids=i32_bytes([token_id for word in words for token_id in word]),
        bad_word_lens=i32_bytes([len(word) for word in words]),
    )
    return msgspec.structs.replace(request, params=params)


def lagging(request_id: int = LAGGING, **fields: Any) -> TokenizedRequest:
    return with_bad_words(tokenized(request_id, **fields), [7], [8, 9])


class LaggingServer(Server):
    """A device that is told steps ahead; `planned`: the requests of each step, in order."""

    def __init__(self, **changes: object) -> None:
        self.planned: list[set[int]] = []
        super().__init__(**{"overlap": True, "device": "emulated", **changes})  # type: ignore[arg-type]

    def begin_epoch(self, epoch: int, incarnation: int = 1) -> None:
        super().begin_epoch(epoch, incarnation)
        self.planned_batch = PersistentBatch(self.config.max_num_seqs)

    def tell(self, *messages: Any) -> list[Any]:
        said = super().tell(*messages)
        for step in said:
            if isinstance(step, ExecuteStep):
                rows = self.planned_batch.apply(step).rows
                self.planned.append(set(self.planned_batch.request_ids[rows].tolist()))
        return said


def num_lagging(stage: SchedulerStage) -> float:
    return stage.stats()[COUNTER]


def test_a_lagging_row_is_in_every_second_step_and_the_others_in_each() -> None:
    server = LaggingServer()
    server.tell(lagging(prompt=3), tokenized(OTHER, prompt=3, max_tokens=15))
    server.drain()
    assert server.planned[:15] == [{LAGGING, OTHER}, {OTHER}] * 7 + [{LAGGING, OTHER}]
    assert server.planned[15:] == []
    assert server.stage.stats()["generation_tokens_total"] == 8 + 15


def test_each_waits_for_its_own_token_only() -> None:
    server = LaggingServer()
    server.tell(lagging(1, prompt=2), tokenized(OTHER, prompt=2, max_tokens=30))
    server.tell(server.tokens(), lagging(3, prompt=2))
    for _ in range(6):
        server.back()
    assert server.planned[2:8] == [{1, 2, 3}, {2}] * 3
    server.tell(lagging(4, prompt=2))
    server.back()
    for _ in range(5):
        server.back()
    assert all({2} < step for step in server.planned[-4:])
    assert {frozenset(step) for step in server.planned[-4:]} == {
        frozenset({1, 2, 3}),
        frozenset({2, 4}),
    }


def test_a_lagging_row_alone_has_one_step_in_flight() -> None:
    server = LaggingServer()
    assert len(server.tell(lagging())) == 1
    for _ in range(7):
        assert len(server.back()) == 1
    assert server.back() == []


def test_chunks_of_a_prompt_do_not_lag() -> None:
    server = LaggingServer(max_num_batched_tokens=4)
    assert len(server.tell(lagging(prompt=12))) == 2
    assert len(server.back()) == 1  # the last chunk
    assert server.back() == []  # its token is awaited
    assert len(server.back()) == 1


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"sampling_placement": "process"}, {"overlap": False}]
)
def test_nobody_lags_where_the_host_knows_the_tokens(changes: dict[str, Any]) -> None:
    server = LaggingServer(**changes)
    server.tell(lagging(), tokenized(OTHER, max_tokens=15))
    plain = LaggingServer(**changes)
    plain.tell(tokenized(LAGGING), tokenized(OTHER, max_tokens=15))
    for each in (server, plain):
        each.drain()
    assert server.planned == plain.planned
    assert num_lagging(server.stage) == 0


def test_words_of_one_token_do_not_lag() -> None:
    server = LaggingServer()
    server.tell(with_bad_words(tokenized(LAGGING), [7], [8]), tokenized(OTHER))
    server.drain()
    assert all(step == {LAGGING, OTHER} for step in server.planned)
    assert num_lagging(server.stage) == 0


def test_steps_of_lagging_rows_are_counted_by_reason() -> None:
    server = LaggingServer()
    assert num_lagging(server.stage) == 0
    server.tell(lagging(), lagging(3, max_tokens=3), tokenized(OTHER))
    server.drain()
    assert num_lagging(server.stage) == 7 + 2  # the first token of each is its prefill's
    server.begin_epoch(EPOCH + 1, incarnation=2)
    assert num_lagging(server.stage) == 9


def test_the_end_of_a_lagging_row_costs_no_discarded_result() -> None:
    server = LaggingServer()
    server.tell(lagging(), tokenized(OTHER, max_tokens=20))
    server.back({LAGGING: STOP})
    assert [LAGGING in step for step in server.planned] == [True, False, False]


@pytest.mark.parametrize("ending", [AbortRequest, FinishRequest])
@pytest.mark.parametrize("num_back", [0, 1, 2, 3])
def test_an_end_from_outside_at_any_time_frees_the_row(ending: Any, num_back: int) -> None:
    server = LaggingServer(max_num_seqs=2)
    server.tell(lagging(), tokenized(OTHER, max_tokens=20))
    for _ in range(num_back):
        server.back()
    server.tell(ending(LAGGING, EPOCH))
    num_planned = len(server.planned)
    server.tell(tokenized(3))
    for _ in range(4):
        server.back()
    assert not any(LAGGING in step for step in server.planned[num_planned:])
    # The next owner of the row does not lag.
    assert server.planned[-3:] == [{OTHER, 3}] * 3


def test_a_recovered_request_lags_again() -> None:
    server = LaggingServer()
    server.begin_epoch(EPOCH + 1)
    request = lagging(outputs=(4, 5), epoch=EPOCH + 1)
    server.tell(request, tokenized(OTHER, prompt=4, max_tokens=11, epoch=EPOCH + 1))
    server.drain()
    assert server.planned == [{LAGGING, OTHER}, {OTHER}] * 5 + [{LAGGING, OTHER}]


def test_a_preempted_request_lags_again() -> None:
    server = LaggingServer(num_blocks=7, max_num_batched_tokens=32)
    server.tell(tokenized(OTHER, prompt=3, max_tokens=16), lagging(3, prompt=8, max_tokens=8))
    server.drain()
    stats = server.stage.stats()
    assert stats["num_preemptions_total"] > 0
    assert stats["generation_tokens_total"] == 16 + 8
    assert num_lagging(server.stage) == 8 - 2  # two of its tokens come from prefills
    assert stats["kv_cache_usage_perc"] == 0
