"""When text is written to clients: often enough for any reader, and never most of the time.

A write costs the same for one token as for ten. A fast model on a machine with few cores would
spend them on writes, which its own kernels need.
"""

from __future__ import annotations

MAX_SHARE = 0.25
"""How much of its time a gateway may spend on writing text."""
MAX_HOLD_S = 0.02
"""No text waits longer, whatever writing costs: a display shows nothing in between."""


class WritePacer:
    """Says when the next round of writes may begin, from what the last one cost.

    A round begins as soon as there is text, unless that made the rounds take more than `MAX_SHARE`
    of the time: one stream is written token by token, hundreds of fast ones several at once. Pure:
    moments are seconds of any one clock.
    """

    def __init__(self) -> None:
        self._earliest = 0.0

    def delay(self, now: float) -> float:
        """Seconds from now until a round may begin; 0: at once."""
        return max(self._earliest - now, 0.0)

    def observe(self, began: float, ended: float) -> None:
        """Take note of a round of writes."""
        self._earliest = began + min((ended - began) / MAX_SHARE, MAX_HOLD_S)
