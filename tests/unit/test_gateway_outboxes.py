"""Outputs of a step find the gateways of their requests."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.deliveries import Delta, split
from stages.gateway_outboxes import split_outputs
from stages.messages import FinishReason
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


@given(outputs())
def test_each_gateway_gets_its_own_in_order_and_nothing_else(step: Sequence[Output]) -> None:
    message = text_outputs(1, *step)
    parts = dict(split_outputs(message))
    told: dict[int, list[Delta]] = {index: list(split(part)) for index, part in parts.items()}
    assert {gateway_of(delta.request_id) for own in told.values() for delta in own} == set(told)
    for index, own in told.items():
        assert own == [d for d in split(message) if gateway_of(d.request_id) == index]
    assert sum(map(len, told.values())) == len(step)
