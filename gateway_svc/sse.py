"""Server-sent events: one JSON document an event, a deadline for every write."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import HttpVersion11, web

from gateway_svc.limits import WRITE_TIMEOUT_S

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
STREAM_STARTED: web.RequestKey[bool] = web.RequestKey("stream_started", bool)
HOLE = "\0"
"""Stands for the text that varies in the document of an `EventTemplate`."""
_encoder = msgspec.json.Encoder()
_HOLE_JSON = _encoder.encode(HOLE)


def event(document: msgspec.Struct) -> bytes:
    """Give one event."""
    return b"data: " + _encoder.encode(document) + b"\n\n"


class EventTemplate:
    """An event in which one text varies: what stands around it is encoded once."""

    def __init__(self, document: msgspec.Struct) -> None:
        self._before, self._behind = event(document).split(_HOLE_JSON)

    def fill(self, text: str) -> bytes:
        """Give the event with this text."""
        return self._before + _encoder.encode(text) + self._behind


class EventStream:
    """A streamed response whose headers go out with its first bytes.

    Until then an error can still be an HTTP status; `is_started` tells. `_held`: what `write_soon`
    took in this turn of the loop.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=HEADERS)
        if request.version >= HttpVersion11:
            self.response.enable_chunked_encoding()
        self._transport = request.transport
        self._protocol = request.protocol
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._is_chunked = False

    @property
    def is_started(self) -> bool:
        """The status and headers have been sent."""
        return self.response.prepared

    async def write(self, data: bytes) -> None:
        """Write events; ConnectionResetError or TimeoutError when the client has left."""
        if not self.response.prepared:
            self._request[STREAM_STARTED] = True
            await self.response.prepare(self._request)
            self._is_chunked = bool(self.response.chunked)
        self._flush()
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await self.response.write(data)

    def write_soon(self, data: bytes) -> bool:
        """Write events without waiting; False if that cannot be: then use `write`.

        Only while no `write` is going on. Several steps that arrive at once make one write: a
        gateway that lags behind its pipeline catches up, for writing is most of a token's cost.
        """
        if self._held:
            self._held.append(data)
            return True
        transport = self._transport
        if (
            transport is None
            or not self._is_chunked
            or self._protocol.writing_paused
            or transport.is_closing()
        ):
            return False
        self._held.append(data)
        self._loop.call_soon(self._flush)
        return True

    def _flush(self) -> None:
        """Write what is held, in the body's chunked encoding.

        Not through aiohttp's `write`: it is a coroutine and would cost more than the rest of a
        token's way.
        """
        data = b"".join(self._held)
        self._held.clear()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """Finish the response."""
        self._flush()
        await self.response.write_eof()

    def hang_up(self) -> None:
        """Break the connection: what was sent is not a whole answer."""
        if self._request.transport is not None:
            self._request.transport.abort()
