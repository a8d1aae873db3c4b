"""What a backend does not fuse, told aloud: counted by operator and reason, logged once each."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Fallback(NamedTuple):
    """An operator that runs as plain torch, and why."""

    operator: str
    reason: str


class Fallbacks:
    """Counts the calls that `reference.py` took over."""

    def __init__(self) -> None:
        self._counts: Counter[Fallback] = Counter()

    def note(self, operator: str, reason: str) -> None:
        """Count one call; the first of its kind is logged."""
        fallback = Fallback(operator, reason)
        if fallback not in self._counts:
            logger.warning("%s is not fused, and so slow: %s", operator, reason)
        self._counts[fallback] += 1

    def stats(self) -> dict[str, float]:
        """As `Stage.stats`: one counter a pair."""
        return {
            f"executor_fallback_{operator}_{_slug(reason)}_total": count
            for (operator, reason), count in self._counts.items()
        }

    def counts(self) -> dict[Fallback, int]:
        """Calls so far."""
        return dict(self._counts)


def _slug(text: str) -> str:
    """As a part of a metric's name."""
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")
