"""What the scheduler has counted since its process started; epochs do not reset it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Counters only grow. The two of the prefix cache count tokens, at first admissions."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    dropped_messages: int = 0
