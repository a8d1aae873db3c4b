"""Notes when a device computes whose steps run inside `Stage.handle`, as those of a CPU do."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stages.messages import BeginEpoch, Message, StepLogits, StepTokens
from stages.stage import Stage
from stages.trace import Trace, What


class TracedDevice:
    """A stage that behaves as `core` and traces the calls that gave a step's result."""

    def __init__(self, core: Stage, trace: Trace) -> None:
        self._core = core
        self._trace = trace

    def begin_epoch(self, message: BeginEpoch) -> None:
        """As `Stage.begin_epoch`."""
        self._core.begin_epoch(message)

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """As `Stage.handle`."""
        start_ns = time.time_ns()
        said = self._core.handle(messages, now_ns)
        end_ns = time.time_ns()
        for message in said:
            if isinstance(message, StepTokens | StepLogits):
                size = len(message.rows) // 4
                self._trace.record(What.DEVICE, message.step_id, size, start_ns, end_ns)
                start_ns = end_ns  # a call that gave several results counts once
        return said

    def progress(self) -> int:
        """As `Stage.progress`."""
        return self._core.progress()

    def queue_len(self) -> int:
        """As `Stage.queue_len`."""
        return self._core.queue_len()

    def stats(self) -> dict[str, float]:
        """As `Stage.stats`."""
        return self._core.stats()
