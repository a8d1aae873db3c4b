"""Draws what device and host did at the same time: one lane each, sequential above overlapped.

SVG is written by hand, so a page needs nothing installed; PNG is drawn by matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import ConfigError
from stages.launch import load
from stages.topology import EXECUTOR, GATEWAY, SAMPLER, SCHEDULER
from stages.trace import Events, What

# Stage → its events.
Lanes = dict[str, Events]

LANES = (
    ("device", EXECUTOR, What.DEVICE),
    ("executor", EXECUTOR, What.TURN),
    ("scheduler", SCHEDULER, What.TURN),
    ("sampler", SAMPLER, What.TURN),
    ("gateway", GATEWAY, What.TURN),
)
# Neighbours in a lane get them in turn: steps that touch can be told apart, and are no gap.
COLORS = {
    "device": ("#1f77b4", "#5a9fd0"),
    "executor": ("#ff7f0e",),
    "scheduler": ("#2ca02c",),
    "sampler": ("#9467bd",),
    "gateway": ("#8c564b",),
}
# What is drawn of each mode, in ms: all of it, and a part in which single turns can be seen.
SPANS_MS = (1000.0, 50.0)
SUFFIXES = (".html", ".svg", ".png")

WIDTH, MARGIN_LEFT, MARGIN_TOP = 1080, 90, 40
LANE_HEIGHT, LANE_GAP, PANEL_GAP = 16, 5, 44
PANEL_HEIGHT = len(LANES) * (LANE_HEIGHT + LANE_GAP)
# Of a panel's width: what is narrower would not be seen.
MIN_SHARE = 0.0005


@dataclass(frozen=True)
class Panel:
    """One mode over one span. `intervals`: lane → (start, length) pairs in ms of the span."""

    title: str
    span_ms: float
    intervals: dict[str, list[tuple[float, float]]]


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before anything is measured."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot writes {', '.join(SUFFIXES)}, not {path.suffix or 'no suffix'}")
    if path.suffix == ".png":
        _load_matplotlib()


def write_plot(path: Path, modes: Mapping[str, Lanes], title: str) -> None:
    """Draw the lanes of each mode, in order, into a file of the kind that its name says."""
    panels = list(make_panels(modes))
    if path.suffix == ".png":
        _write_png(path, panels, title)
        return
    svg = render_svg(panels, title)
    if path.suffix == ".html":
        svg = f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n{svg}'
    path.write_text(svg)


def make_panels(modes: Mapping[str, Lanes]) -> Iterator[Panel]:
    """For each span, one panel a mode, so that equal spans stand below each other."""
    for span_ms in SPANS_MS:
        for mode, lanes in modes.items():
            yield Panel(f"{mode}, {span_ms:g} ms", span_ms, _intervals(lanes, span_ms))


def render_svg(panels: list[Panel], title: str) -> str:
    """One picture of all panels, below each other."""
    height = MARGIN_TOP + len(panels) * (PANEL_HEIGHT + PANEL_GAP)
    total = WIDTH + MARGIN_LEFT + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" '
        f'viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN_LEFT}" y="20" font-size="15">{escape(title)}</text>',
    ]
    for index, panel in enumerate(panels):
        parts += _render_panel(panel, MARGIN_TOP + 16 + index * (PANEL_HEIGHT + PANEL_GAP))
    return "\n".join([*parts, "</svg>\n"])


def _intervals(lanes: Lanes, span_ms: float) -> dict[str, list[tuple[float, float]]]:
    """Cut the last `span_ms` out of every lane.

    They end with the last turn of any stage: the device's steps are known ahead of their ends.
    """
    turns = [_lane(lanes, stage, What.TURN)["end_ns"] for stage in lanes]
    end_ns = int(np.concatenate(turns).max(initial=0))
    span_ns = int(span_ms * 1e6)
    start_ns = end_ns - span_ns
    cut: dict[str, list[tuple[float, float]]] = {}
    for name, stage, what in LANES:
        events = _lane(lanes, stage, what)
        starts = np.clip(events["start_ns"], start_ns, end_ns)
        ends = np.clip(events["end_ns"], start_ns, end_ns)
        seen = ends > starts
        begin_ms = (starts[seen] - start_ns) / 1e6
        length_ms = np.maximum(ends[seen] - starts[seen], span_ns * MIN_SHARE) / 1e6
        cut[name] = list(zip(begin_ms.tolist(), length_ms.tolist(), strict=True))
    return cut


def _lane(lanes: Lanes, stage: str, what: What) -> Events:
    events = lanes[stage]
    lane: Events = events[events["what"] == what]
    return lane


def _render_panel(panel: Panel, top: int) -> Iterator[str]:
    scale = WIDTH / panel.span_ms
    yield f'<text x="{MARGIN_LEFT}" y="{top - 6}">{escape(panel.title)}</text>'
    for index, (name, intervals) in enumerate(panel.intervals.items()):
        y = top + index * (LANE_HEIGHT + LANE_GAP)
        yield (
            f'<text x="{MARGIN_LEFT - 8}" y="{y + 12}" text-anchor="end">{name}</text>'
            f'<rect x="{MARGIN_LEFT}" y="{y}" width="{WIDTH}" height="{LANE_HEIGHT}" '
            'fill="#f2f2f2"/>'
        )
        for turn, color in enumerate(COLORS[name]):
            bars = "".join(
                f"M{MARGIN_LEFT + start * scale:.2f} {y}h{length * scale:.2f}"
                f"v{LANE_HEIGHT}h-{length * scale:.2f}z"
                for start, length in intervals[turn :: len(COLORS[name])]
            )
            yield f'<path fill="{color}" d="{bars}"/>'


def _write_png(path: Path, panels: list[Panel], title: str) -> None:
    figure = _load_matplotlib()(figsize=(12, 2 * len(panels)), layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(len(panels), 1), panels, strict=True):
        names = list(panel.intervals)
        for index, name in enumerate(names):
            axes.broken_barh(panel.intervals[name], (index - 0.4, 0.8), facecolors=COLORS[name])
        axes.set_title(panel.title, loc="left", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, panel.span_ms)
        axes.set_xlabel("ms")
        axes.invert_yaxis()
    figure.savefig(path, dpi=100)


def _load_matplotlib() -> Any:
    try:
        return load("matplotlib.figure:Figure")
    except ModuleNotFoundError:
        raise ConfigError(
            "a PNG needs matplotlib: pip install 'headrace[plot]', or name an .html or .svg file"
        ) from None
