"""From traces to figures: what the device did in the steady steps of a window, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from stages.errors import HeadraceError
from stages.trace import Events, What

# Below this an idle device is not told from a busy one: two reads of the clock lie as far apart.
RESOLUTION_US = 1.0


class ModeFigures(msgspec.Struct, frozen=True):
    """One way of running at one batch size. All of steady steps: every row decodes in them.

    step_ms: mean time from the end of a step to the end of the next. device_busy: share of that
    time in which the device computed. idle_us: device idle before a step. exposed_host_us: its
    mean, at least `RESOLUTION_US`: the host's work that the device had to wait for. host_cpu_us:
    CPU time a step by stage. tokens_per_s: batch over step time. itl_ms: gap between the events
    of a stream, as the client sees it. launch_us_p50: time in which the executor enqueued a step,
    0 where the device is the executor itself.
    """

    step_ms: float
    device_busy: float
    idle_us_p50: float
    idle_us_p99: float
    exposed_host_us: float
    host_cpu_us: dict[str, float]
    tokens_per_s: float
    num_steps: int
    itl_ms_p50: float = 0.0
    itl_ms_p99: float = 0.0
    itl_ms_std: float = 0.0
    launch_us_p50: float = 0.0


@dataclass(frozen=True)
class SteadySteps:
    """Times of steps whose predecessor was steady too, in ns: int64 [n] each.

    period: end to end; busy: the step itself; idle: between the two. launch [m]: how long the host
    took to enqueue a step of that many rows, whatever came before it.
    """

    period: NDArray[np.int64]
    busy: NDArray[np.int64]
    idle: NDArray[np.int64]
    launch: NDArray[np.int64]


def steady_steps(events: Events, batch: int, start_ns: int, end_ns: int) -> SteadySteps:
    """Pick from an executor's trace the steps inside a window that gave `batch` rows a token."""
    is_inside = (events["start_ns"] >= start_ns) & (events["end_ns"] <= end_ns)
    has_size = events["size"] == batch
    launches = events[(events["what"] == What.LAUNCH) & is_inside & has_size]
    is_device = events["what"] == What.DEVICE
    device, is_steady = events[is_device], (is_inside & has_size)[is_device]
    follows = np.diff(device["step_id"]) == 1
    second = np.flatnonzero(is_steady[1:] & is_steady[:-1] & follows) + 1
    ends, starts = device["end_ns"], device["start_ns"]
    return SteadySteps(
        period=ends[second] - ends[second - 1],
        busy=ends[second] - starts[second],
        idle=starts[second] - ends[second - 1],
        launch=launches["end_ns"] - launches["start_ns"],
    )


def mode_figures(
    batch: int, windows: Sequence[SteadySteps], cpu_share: Mapping[str, float]
) -> ModeFigures:
    """Sum up the windows of one mode; `cpu_share`: cores that each stage kept busy.

    Raises `HeadraceError` when no step was steady.
    """
    period, busy, idle, launch = (
        np.concatenate([getattr(window, name) for window in windows])
        for name in ("period", "busy", "idle", "launch")
    )
    if not len(period):
        raise HeadraceError(f"no two steps of {batch} rows followed each other: measure for longer")
    step_us = float(period.mean()) / 1e3
    p50, p99 = (np.percentile(idle, [50, 99]) / 1e3).tolist()
    return ModeFigures(
        step_ms=step_us / 1e3,
        device_busy=float(busy.sum() / period.sum()),
        idle_us_p50=p50,
        idle_us_p99=p99,
        exposed_host_us=max(RESOLUTION_US, float(idle.mean()) / 1e3),
        host_cpu_us={stage: share * step_us for stage, share in cpu_share.items()},
        tokens_per_s=batch / step_us * 1e6,
        num_steps=len(period),
        launch_us_p50=float(np.median(launch)) / 1e3 if len(launch) else 0.0,
    )
