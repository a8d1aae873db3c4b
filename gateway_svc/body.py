"""Reads the body of a request: its size, its encoding and its time to arrive are bounded."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway_svc.limits import BODY_TIMEOUT_S
from stages.errors import RequestError


async def read_body(request: web.Request) -> bytes:
    """Give the bytes of a JSON body; raises RequestError.

    A compressed body is refused, because what it unpacks to cannot be bounded beforehand. Only
    JSON's own content type is taken, because a browser sends others across sites without asking.
    """
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(
            f"Content-Encoding {encoding!r} is not read; send the body as it is",
            param="Content-Encoding",
            code="unsupported_content_encoding",
            status=415,
        )
    if request.content_type != "application/json":
        raise RequestError(
            f"Content-Type is {request.content_type!r}; set it to application/json",
            param="Content-Type",
            code="unsupported_content_type",
            status=415,
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s; send it faster",
            code="body_timeout",
            status=408,
        ) from None
