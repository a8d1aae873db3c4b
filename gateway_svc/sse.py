"""Server-sent events: one JSON document an event, a deadline for every write."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from gateway_svc.limits import WRITE_TIMEOUT_S

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
STREAM_STARTED: web.RequestKey[bool] = web.RequestKey("stream_started", bool)
_encoder = msgspec.json.Encoder()


def event(document: msgspec.Struct) -> bytes:
    """Give one event."""
    return b"data: " + _encoder.encode(document) + b"\n\n"


class EventStream:
    """A streamed response whose headers go out with its first bytes.

    Until then an error can still be an HTTP status; `is_started` tells.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=HEADERS)

    @property
    def is_started(self) -> bool:
        """The status and headers have been sent."""
        return self.response.prepared

    async def write(self, data: bytes) -> None:
        """Write events; ConnectionResetError or TimeoutError when the client has left."""
        if not self.response.prepared:
            self._request[STREAM_STARTED] = True
            await self.response.prepare(self._request)
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await self.response.write(data)

    async def end(self) -> None:
        """Finish the response."""
        await self.response.write_eof()

    def hang_up(self) -> None:
        """Break the connection: what was sent is not a whole answer."""
        if self._request.transport is not None:
            self._request.transport.abort()
