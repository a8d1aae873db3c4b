"""Outputs of a step find the gateways of their requests."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from stages.columns import i8, i32, u64
from stages.gateway_outboxes import split_outputs
from stages.messages import FinishReason, TextOutputs
from stages.request_ids import first_request_id, gateway_of
from tests.unit.gateway_fakes import text_outputs

Output = tuple[int, list[int], str, int]


@st.composite
def outputs(draw: st.DrawFn) -> list[Output]:
    owners = draw(st.lists(st.integers(0, 3), max_size=12))
    return [
        (
            first_request_id(owner, incarnation=2) + number,
            draw(st.lists(st.integers(0, 999), max_size=3)),
            draw(st.text(max_size=3)),
            draw(st.sampled_from([FinishReason.NOT_FINISHED, FinishReason.STOP])),
        )
        for number, owner in enumerate(owners)
    ]


def read(message: TextOutputs) -> list[tuple[int, list[int], str, int, str | int | None]]:
    """One entry a request: id, tokens, text, finish reason, stop reason."""
    entries = []
    stop_reasons = iter(message.stop_reasons)
    token_ids = iter(i32(message.token_ids).tolist())
    for request_id, count, text, reason in zip(
        u64(message.request_ids).tolist(),
        i32(message.num_tokens).tolist(),
        message.deltas,
        i8(message.finish_reasons).tolist(),
        strict=True,
    ):
        own = [next(token_ids) for _ in range(count)]
        entries.append((request_id, own, text, reason, next(stop_reasons) if reason else None))
    return entries


@given(outputs())
def test_each_gateway_gets_its_own_in_order_and_nothing_else(step: Sequence[Output]) -> None:
    message = text_outputs(1, *step)
    parts = dict(split_outputs(message))
    told = {index: read(part) for index, part in parts.items()}
    assert {gateway_of(entry[0]) for own in told.values() for entry in own} == set(told)
    for index, own in told.items():
        assert own == [entry for entry in read(message) if gateway_of(entry[0]) == index]
    assert sum(map(len, told.values())) == len(step)
