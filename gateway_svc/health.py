"""Health means progress: a stage that is silent, or work that waits while no step ends, is sick."""

from __future__ import annotations

from stages.messages import GroupState, StageState

MAX_SILENCE_NS = 5_000_000_000
SCHEDULER = "scheduler"


class Health:
    """Remembers when the scheduler was last seen to get on with its work."""

    def __init__(self) -> None:
        self._last_mark: tuple[int, int] = (0, 0)
        self._moved_ns = 0

    def observe(self, state: GroupState, now_ns: int) -> None:
        """Take a new state, seen at `now_ns` (wall clock)."""
        for stage in state.stages:
            if stage.stage != SCHEDULER:
                continue
            mark = (stage.incarnation, stage.progress)
            if mark != self._last_mark or not _has_work(stage):
                self._last_mark = mark
                self._moved_ns = now_ns

    def problems(self, state: GroupState, now_ns: int) -> list[str]:
        """Say in words what is wrong at `now_ns`; empty when all is well."""
        if not state.stages:
            return ["no stage has been heard of"]
        problems = []
        for stage in state.stages:
            silent_ns = now_ns - stage.heartbeat_ns
            if silent_ns > MAX_SILENCE_NS:
                problems.append(f"{stage.stage} has been silent for {silent_ns / 1e9:.1f} s")
            elif stage.stage == SCHEDULER and _has_work(stage):
                stuck_ns = now_ns - self._moved_ns
                if stuck_ns > MAX_SILENCE_NS:
                    problems.append(f"work waits, but no step has ended for {stuck_ns / 1e9:.1f} s")
        return problems


def _has_work(stage: StageState) -> bool:
    return stage.queue_len > 0 or stage.stats.get("num_requests_running", 0) > 0
