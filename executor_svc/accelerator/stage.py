"""The executor of an accelerator: launches steps as they come and never waits for one.

The tokens of a step stay on the device as the inputs of the next; their copies go out as messages
when they have come down.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from executor_svc.accelerator.completion import Completions
from executor_svc.accelerator.device import Device
from executor_svc.accelerator.results import LaunchedStep
from executor_svc.accelerator.step_clock import StepClock
from executor_svc.accelerator.steps import StepLauncher
from stages.messages import BeginEpoch, ExecuteStep, Message, StepTokens
from stages.trace import Trace, What


class AcceleratorStage:
    """Implements `stages.stage.CompletingStage`; placements as in `ExecutorStage`."""

    def __init__(self, device: Device, launcher: StepLauncher, trace: Trace) -> None:
        """`trace` takes two intervals of each step: the host's launch, and the device's work."""
        self._device = device
        self._launcher = launcher
        self._trace = trace
        self._completions = Completions(device.enter_thread)
        self._waiting: deque[ExecuteStep] = deque()
        # Oldest first.
        self._launched: deque[LaunchedStep] = deque()
        self._clock = StepClock()
        self._num_steps = 0
        self._num_tokens = 0

    def begin_epoch(self, message: BeginEpoch) -> None:
        """Free every row, behind all that the device still computes for the old epoch.

        Its writes would else land in blocks that the new one has given to others.
        """
        self._waiting.clear()
        self._device.module.synchronize()
        self._completions.drain()
        self._launched.clear()
        self._launcher.forget()

    def handle(self, messages: Sequence[Message], now_ns: int) -> list[Message]:
        """Launch the steps that can run, and say the results that have come; see `Stage`."""
        for message in messages:
            if isinstance(message, ExecuteStep):
                self._waiting.append(message)
            elif isinstance(message, StepTokens):
                self._launcher.receive_tokens(message)
            while self._waiting and self._launcher.has_inputs(self._waiting[0]):
                self._launch(self._waiting.popleft())
        said: list[Message] = []
        for seen_ns in self._completions.take():
            said += self._complete(seen_ns)
        return said

    def completion_fd(self) -> int:
        """See `CompletingStage`."""
        return self._completions.fileno()

    def progress(self) -> int:
        """Steps done."""
        return self._num_steps

    def queue_len(self) -> int:
        """Steps that wait for tokens or run."""
        return len(self._waiting) + len(self._launched)

    def stats(self) -> dict[str, float]:
        """See `Stage.stats`."""
        return {
            "executor_steps_total": self._num_steps,
            "executor_tokens_total": self._num_tokens,
            **self._launcher.counts.stats(),
            **self._device.fallbacks.stats(),
        }

    def close(self) -> None:
        """Let the waiting thread end."""
        self._completions.close()

    def _launch(self, step: ExecuteStep) -> None:
        start_ns = time.time_ns()
        launched = self._launcher.launch(step)
        self._launched.append(launched)
        self._completions.watch(launched.arrived)
        end_ns = time.time_ns()
        self._trace.record(What.LAUNCH, step.step_id, launched.num_tokens, start_ns, end_ns)

    def _complete(self, seen_ns: int) -> list[Message]:
        launched = self._launched.popleft()
        start_ns, end_ns = self._clock.interval(launched.started, launched.ended, seen_ns)
        result = launched.result
        self._launcher.note_tokens(result)
        self._trace.record(What.DEVICE, result.step_id, launched.num_tokens, start_ns, end_ns)
        self._num_steps += 1
        self._num_tokens += launched.num_tokens
        return result.to_messages()
