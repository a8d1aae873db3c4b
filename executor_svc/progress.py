"""Tells how far a load is: a bar on a terminal, a log line every tenth elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

BAR_WIDTH = 30
# A load that is over sooner needs no progress.
QUIET_S = 1.0

logger = logging.getLogger(__name__)


class Progress:
    """Counts `total` equal parts of one piece of work."""

    def __init__(self, what: str, total: int, terminal: TextIO | None = None) -> None:
        stream = sys.stderr if terminal is None else terminal
        self._what = what
        self._total = total
        self._done = 0
        self._said_tenths = 0
        self._terminal = stream if stream.isatty() else None
        self._begin = time.monotonic()

    def advance(self) -> None:
        """One more part is done."""
        self._done += 1
        is_quiet = time.monotonic() - self._begin < QUIET_S
        tenths = 10 * self._done // self._total
        if is_quiet or tenths == self._said_tenths:
            return
        self._said_tenths = tenths
        if self._terminal is None:
            logger.info("%s: %d %%", self._what, 10 * tenths)
            return
        bar = "#" * (BAR_WIDTH * self._done // self._total)
        end = "\n" if self._done == self._total else ""
        self._terminal.write(f"\r{self._what} [{bar:<{BAR_WIDTH}}] {10 * tenths:3} %{end}")
        self._terminal.flush()
