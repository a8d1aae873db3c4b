"""What the scheduler has counted since its process started; epochs do not reset it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.lag import LagReason


@dataclass(slots=True)
class Counters:
    """Counters only grow. The two of the prefix cache count tokens, at first admissions.

    lagging_row_steps: decode steps of rows that lag, int64 by `LagReason`.
    """

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    dropped_messages: int = 0
    lagging_row_steps: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(LagReason), dtype=np.int64)
    )

    def lagging_stats(self) -> dict[str, float]:
        """One figure a reason, as `Stage.stats`."""
        return {
            f"lagging_row_steps_{reason.name.lower()}_total": int(self.lagging_row_steps[reason])
            for reason in LagReason
            if reason
        }
