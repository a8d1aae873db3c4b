"""Puts the records of two independent rings into the one order in which they happened.

A step's results belong to the rows as its own plan left them. So the plans set the order: a step's
results come right behind its plan, and later plans wait for them. What follows does not depend on
how the two rings raced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from stages.messages import (
    EndRequests,
    ExecuteStep,
    StepLogits,
    StepLogprobs,
    StepPromptLogprobs,
    StepTokens,
)

Plan = ExecuteStep | EndRequests
Result = StepTokens | StepLogits | StepLogprobs | StepPromptLogprobs


class StepOrder:
    """A merge of two queues.

    Invariant: after `drain` either every plan has been given out, or the newest one given out is
    a step whose `StepTokens` (or `StepLogits`) have not come.
    """

    def __init__(self) -> None:
        self._plans: deque[Plan] = deque()
        self._results: deque[Result] = deque()
        self._open_step: int | None = None
        self.num_dropped = 0

    def add_plan(self, plan: Plan) -> None:
        """Take a record of the plan ring."""
        self._plans.append(plan)

    def add_result(self, result: Result) -> None:
        """Take a record of the token ring or the logits ring."""
        self._results.append(result)

    def drain(self) -> Iterator[Plan | Result]:
        """Yield what can be handled now, in order."""
        while True:
            if self._open_step is not None:
                result = self._next_result(self._open_step)
                if result is None:
                    return
                if isinstance(result, StepTokens | StepLogits):
                    self._open_step = None
                yield result
            elif self._plans:
                plan = self._plans.popleft()
                if isinstance(plan, ExecuteStep):
                    self._open_step = plan.step_id
                yield plan
            else:
                return

    def _next_result(self, step_id: int) -> Result | None:
        """Take the oldest result of this step; results of steps without a plan are dropped."""
        while self._results and self._results[0].step_id < step_id:
            self._results.popleft()
            self.num_dropped += 1
        if self._results and self._results[0].step_id == step_id:
            return self._results.popleft()
        return None
