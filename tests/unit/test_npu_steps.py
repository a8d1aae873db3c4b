"""The table of recorded and eager steps, on made-up figures."""

from __future__ import annotations

import pytest

from benchmarks.npu_steps import bars, table
from stages.bench.figures import ModeFigures
from stages.bench.report import Row


def figures(step_ms: float, busy: float, launch_us: float) -> ModeFigures:
    return ModeFigures(step_ms, busy, 0, 0, 1, {}, 1000, 100, launch_us_p50=launch_us)


def row(step_ms: float, busy: float, launch_us: float) -> Row:
    other = figures(99, 0.5, 9999)
    return Row(32, 1.0, sequential=other, overlapped=figures(step_ms, busy, launch_us))


def test_an_eager_step_is_busy_as_long_as_its_work_takes() -> None:
    text = table([row(2.0, 0.9, 500)], [row(10.0, 0.99, 6000)])
    _, captured, eager = (line.split() for line in text.splitlines())
    assert captured == ["32", "captured", "500", "1800", "2000", "90.0%", "12.0x"]
    assert eager == ["32", "eager", "6000", "9900", "10000", "18.0%"]


@pytest.mark.parametrize(
    ("launch_us", "busy", "verdicts"),
    [(500, 0.96, ["met", "met"]), (700, 0.94, ["missed", "missed"])],
)
def test_figures_stand_beside_their_bars(
    launch_us: float, busy: float, verdicts: list[str]
) -> None:
    text = bars(row(2.0, busy, launch_us), row(10.0, 0.99, 6000))
    launch, device = text.splitlines()
    assert f"{6000 / launch_us:.1f}, bar 10" in launch
    assert f"{busy:.1%}, bar 95%" in device
    assert [line.rsplit(": ")[-1] for line in (launch, device)] == verdicts
