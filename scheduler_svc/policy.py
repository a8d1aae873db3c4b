"""Who goes first: the order of requests, waiting or running. Holds order, never resources."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.request import Request
from stages.columns import Int32Array


def sort_by_rank(
    rows: Int32Array, priority: NDArray[np.int64], arrival: NDArray[np.int64]
) -> Int32Array:
    """Order rows [n], best first: lower priority value, then earlier arrival.

    `priority`, `arrival`: int64, indexed by row.
    """
    return rows[np.lexsort((arrival[rows], priority[rows]))]


def _rank(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


class WaitingQueue:
    """Requests that wait for a row, best first.

    Invariant: sorted by rank. A request that has used up its preemptions and has come to the head
    stays there until it leaves, even if a better one arrives: what it waits for (its whole length
    at once) would else be taken away from it for ever.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._pinned: Request | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        """Let a request wait, at the place of its rank."""
        insort(self._requests, request, key=_rank)

    def head(self) -> Request | None:
        """The request to be admitted next."""
        if self._pinned is None and self._requests:
            first = self._requests[0]
            self._pinned = first if first.is_protected else None
            return first
        return self._pinned

    def remove(self, request: Request) -> None:
        """Let a waiting request leave."""
        if request is self._pinned:
            self._pinned = None
        index = bisect_left(self._requests, _rank(request), key=_rank)
        assert self._requests[index] is request, "the request does not wait"
        del self._requests[index]
