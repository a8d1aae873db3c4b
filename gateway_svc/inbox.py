"""What the pipeline has said to one HTTP request and its handler has not read yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway_svc.deliveries import Delivery, Delta


class SlowClient(Exception):
    """The client reads more slowly than its answer grows; its requests have been aborted."""


class Inbox:
    """The deliveries of consecutive request ids, in order, for one reader.

    `hang_up`, set by a handler that may be stuck in a write, breaks its connection on overflow.
    `shortcut`, set by a handler that streams, is offered what comes while the reader waits and has
    nothing to read; what it takes (it says so) costs no task switch and never reaches the reader.
    """

    def __init__(self, request_ids: range, max_backlog: int) -> None:
        self.request_ids = request_ids
        self.hang_up: Callable[[], None] | None = None
        self.shortcut: Callable[[Delta], bool] | None = None
        self._max_backlog = max_backlog
        self._items: list[Delivery] = []
        self._waiter: asyncio.Future[None] | None = None
        self._has_overflowed = False

    def put(self, delivery: Delivery) -> bool:
        """Add a delivery and wake the reader; False when the backlog is too long."""
        if (
            self.shortcut is not None
            and self._waiter is not None
            and not self._items
            and type(delivery) is Delta
            and self.shortcut(delivery)
        ):
            return True
        self._items.append(delivery)
        self._wake()
        return len(self._items) <= self._max_backlog

    def overflow(self) -> None:
        """Give up on the reader: it gets `SlowClient`, its connection breaks."""
        self._has_overflowed = True
        self._items.clear()
        self._wake()
        if self.hang_up is not None:
            self.hang_up()

    async def take(self) -> list[Delivery]:
        """Wait for something, then take everything that has piled up."""
        while not self._items and not self._has_overflowed:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._has_overflowed:
            raise SlowClient
        items, self._items = self._items, []
        return items

    def index(self, delivery: Delivery) -> int:
        """Say which of the inbox's requests a delivery is about."""
        return delivery.request_id - self.request_ids.start

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
