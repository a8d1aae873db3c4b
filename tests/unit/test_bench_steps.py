"""The step benchmark's arithmetic and drawing, on made-up traces."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.bench.figures import mode_figures, steady_steps
from stages.bench.plot import Lanes, check_plot, make_panels, render_svg, write_plot
from stages.bench.steps import parse_batches
from stages.errors import ConfigError, HeadraceError
from stages.topology import STAGES
from stages.trace import EVENT_DTYPE, Events, What

MS = 1_000_000
ALWAYS = (0, 10**18)
# Step, rows, microseconds: one before the window, one of another batch.
LAUNCHES = [(0, 4, 900), (1, 4, 100), (2, 4, 200), (3, 3, 900), (4, 4, 400)]


def events(*rows: tuple[int, int, int, int, int]) -> Events:
    return np.array(list(rows), dtype=EVENT_DTYPE)


def device(step_id: int, size: int, start_ms: float, end_ms: float) -> tuple[int, ...]:
    return (What.DEVICE, step_id, size, int(start_ms * MS), int(end_ms * MS))


def turn(start_ms: float, end_ms: float) -> tuple[int, ...]:
    return (What.TURN, 0, 1, int(start_ms * MS), int(end_ms * MS))


# ── figures ──────────────────────────────────────────────────────────────────────────────────


def test_figures_of_steps_with_gaps() -> None:
    trace = events(
        turn(0, 1), device(1, 4, 0, 10), device(2, 4, 11, 21), turn(21, 22), device(3, 4, 24, 34)
    )
    steps = steady_steps(trace, 4, *ALWAYS)
    assert (steps.period / MS).tolist() == [11, 13]
    assert (steps.busy / MS).tolist() == [10, 10]
    assert (steps.idle / MS).tolist() == [1, 3]
    figures = mode_figures(4, [steps], {"scheduler": 0.5})
    assert figures.step_ms == pytest.approx(12)
    assert figures.device_busy == pytest.approx(20 / 24)
    assert figures.idle_us_p50 == pytest.approx(2000)
    assert figures.exposed_host_us == pytest.approx(2000)
    assert figures.host_cpu_us == {"scheduler": pytest.approx(6000)}
    assert figures.tokens_per_s == pytest.approx(4 / 0.012)
    assert figures.num_steps == 2


@pytest.mark.parametrize(
    ("trace", "window"),
    [
        (events(device(1, 4, 0, 10), device(2, 3, 10, 20), device(3, 4, 20, 30)), ALWAYS),
        (events(device(1, 4, 0, 10), device(5, 4, 10, 20)), ALWAYS),
        (events(device(1, 4, 0, 10), device(2, 4, 10, 20)), (1, 10**18)),
        (events(device(1, 4, 0, 10), device(2, 4, 10, 20)), (0, 19 * MS)),
        (events(), ALWAYS),
    ],
    ids=["another batch between", "steps missing", "begins before", "ends after", "nothing"],
)
def test_only_steady_steps_count(trace: Events, window: tuple[int, int]) -> None:
    steps = steady_steps(trace, 4, *window)
    assert len(steps.period) == 0
    with pytest.raises(HeadraceError, match="measure for longer"):
        mode_figures(4, [steps], {})


def test_a_device_that_never_waits_exposes_the_resolution() -> None:
    trace = events(device(1, 1, 0, 10), device(2, 1, 10, 20), device(3, 1, 20, 30))
    figures = mode_figures(1, [steady_steps(trace, 1, *ALWAYS)], {})
    assert (figures.device_busy, figures.idle_us_p99, figures.exposed_host_us) == (1, 0, 1)


def test_launches_of_the_batch_inside_the_window_are_told() -> None:
    launched = [(What.LAUNCH, n, size, n * MS, n * MS + us * 1000) for n, size, us in LAUNCHES]
    trace = events(*launched, device(1, 4, 10, 11), device(2, 4, 11, 12))
    figures = mode_figures(4, [steady_steps(trace, 4, MS, 20 * MS)], {})
    assert figures.launch_us_p50 == 200


def test_windows_are_summed_up() -> None:
    one = steady_steps(events(device(1, 1, 0, 10), device(2, 1, 10, 20)), 1, *ALWAYS)
    other = steady_steps(events(device(8, 1, 0, 10), device(9, 1, 14, 24)), 1, *ALWAYS)
    assert mode_figures(1, [one, other], {}).step_ms == pytest.approx(12)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "0", "4,-1"])
def test_bad_batches_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--batch"):
        parse_batches(text)


def test_batches_are_read_in_order() -> None:
    assert parse_batches("64,1") == [64, 1]


# ── drawing ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def modes() -> dict[str, Lanes]:
    lanes = {stage: events(turn(940, 951), turn(995, 1000)) for stage in STAGES}
    lanes["executor"] = events(device(1, 4, 0, 990), turn(990, 991), device(2, 4, 991, 1010))
    return {"sequential": lanes, "overlapped": lanes}


def test_each_span_shows_the_modes_below_each_other(modes: dict[str, Lanes]) -> None:
    panels = list(make_panels(modes))
    titles = [
        "sequential, 1000 ms",
        "overlapped, 1000 ms",
        "sequential, 50 ms",
        "overlapped, 50 ms",
    ]
    assert [panel.title for panel in panels] == titles


def test_lanes_are_cut_to_the_span(modes: dict[str, Lanes]) -> None:
    close = list(make_panels(modes))[2].intervals
    assert close["device"] == [(0.0, 40.0), (41.0, 9.0)]
    assert close["executor"] == [(40.0, 1.0)]
    assert close["gateway"] == [(0.0, 1.0), (45.0, 5.0)]


def test_the_picture_is_well_formed_and_says_what_it_shows(modes: dict[str, Lanes]) -> None:
    svg = render_svg(list(make_panels(modes)), "64 <streams>")
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert "64 <streams>" in texts
    assert texts.count("device") == 4


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_a_page_needs_nothing_else(suffix: str, modes: dict[str, Lanes], tmp_path: Path) -> None:
    path = tmp_path / f"plot{suffix}"
    write_plot(path, modes, "title")
    text = path.read_text()
    assert "<svg" in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_an_unknown_kind_of_plot_is_refused_before_measuring() -> None:
    with pytest.raises(ConfigError, match=r"\.html, \.svg, \.png"):
        check_plot(Path("plot.pdf"))


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(path: str) -> Any:
        raise ModuleNotFoundError(f"No module named {path.partition('.')[0]!r}")

    monkeypatch.setattr("stages.bench.plot.load", load)
    yield


@pytest.mark.usefixtures("without_matplotlib")
def test_a_png_without_matplotlib_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[plot\]'"):
        check_plot(Path("plot.png"))
