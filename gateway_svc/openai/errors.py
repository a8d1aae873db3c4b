"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import msgspec
from aiohttp import web

from gateway_svc.limits import RETRY_AFTER_S
from stages.errors import RequestError


class ErrorDetail(msgspec.Struct, frozen=True):
    """`param` names the offending field; `code` is a short machine-readable word."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The whole body of an error response, or of an error event in a stream."""

    error: ErrorDetail


def error_body(error: RequestError) -> ErrorBody:
    """Word a refused request."""
    detail = ErrorDetail(
        error.message, _type(error.status), error.param or None, error.code or None
    )
    return ErrorBody(detail)


def error_response(error: RequestError) -> web.Response:
    """Answer a refused request; a 503 says when to come back."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}
    return web.Response(
        body=msgspec.json.encode(error_body(error)),
        status=error.status,
        headers=headers,
        content_type="application/json",
    )


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 503:
        return "service_unavailable_error"
    return "invalid_request_error" if status < 500 else "server_error"
