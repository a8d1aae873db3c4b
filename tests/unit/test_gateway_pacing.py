"""Rounds of writes: at once while they are cheap, at most a quarter of the time, never late."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.pacing import MAX_HOLD_S, MAX_SHARE, WritePacer

costs = st.floats(0, 1)


def test_the_first_round_begins_at_once() -> None:
    assert WritePacer().delay(5.0) == 0.0


def test_a_cheap_round_does_not_delay_a_step_that_comes_later() -> None:
    pacer = WritePacer()
    pacer.observe(5.0, 5.001)
    assert 0 < pacer.delay(5.001) < 0.004
    assert pacer.delay(5.005) == 0.0


@given(st.lists(costs, min_size=1))
def test_writes_take_their_share_at_most_and_text_never_waits_longer_than_said(
    costs_s: list[float],
) -> None:
    pacer, now = WritePacer(), 0.0
    for cost in costs_s:
        began = now
        pacer.observe(began, began + cost)
        delay = pacer.delay(began + cost)
        assert delay <= MAX_HOLD_S
        now = began + cost + delay
        if cost / MAX_SHARE < MAX_HOLD_S:
            assert cost <= MAX_SHARE * (now - began) + 1e-9
