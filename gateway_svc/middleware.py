"""What holds for every route: a request id, errors in OpenAI's shape, the API key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway_svc.openai.errors import error_response
from gateway_svc.sse import STREAM_STARTED
from stages.errors import RequestError

REQUEST_ID_HEADER = "X-Request-Id"
OPEN_PATHS = frozenset({"/live", "/ready", "/health", "/version"})
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,128}")
_REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
_BEARER = "bearer "

MAX_BODY_BYTES: web.AppKey[int] = web.AppKey("max_body_bytes", int)

logger = logging.getLogger(__name__)


@web.middleware
async def give_request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take the client's id, which is only echoed and never a key, or make one up."""
    given = request.headers.get(REQUEST_ID_HEADER)
    is_bad = given is not None and not _REQUEST_ID_FORM.fullmatch(given)
    request[_REQUEST_ID] = secrets.token_hex(16) if given is None or is_bad else given
    if not is_bad:
        return await handler(request)
    return error_response(
        RequestError(
            f"{REQUEST_ID_HEADER} must be 1 to 128 of the characters A-Z a-z 0-9 . _ -",
            param=REQUEST_ID_HEADER,
        )
    )


async def echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Put the request's id on its response, streamed or not (`on_response_prepare`)."""
    if _REQUEST_ID in request:
        response.headers[REQUEST_ID_HEADER] = request[_REQUEST_ID]


@web.middleware
async def word_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into an OpenAI-shaped body: no page, no traceback, no path."""
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(error)
    except web.HTTPException as error:
        return error_response(_from_http(error, request))
    except Exception:
        # The last boundary: a bug fails this request, not the server, and its trace stays in the
        # log. Within a stream the only honest answer is to break it off.
        if request.get(STREAM_STARTED):
            raise
        logger.exception("%s %s failed", request.method, request.path)
        return error_response(
            RequestError("the server failed on this request", code="internal_error", status=500)
        )


def require_key(keys: Sequence[str]) -> Middleware:
    """Make a middleware that refuses whoever brings none of `keys`; no keys, no check.

    Deny by default: what is open is listed, unknown paths are not.
    """
    digests = [_digest(key) for key in keys]

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if digests and request.path not in OPEN_PATHS and not _has_key(request, digests):
            raise RequestError(
                "no valid API key; send the header Authorization: Bearer <key>",
                code="invalid_api_key",
                status=401,
            )
        return await handler(request)

    return check_key


def _has_key(request: web.Request, digests: Sequence[bytes]) -> bool:
    value = request.headers.get("Authorization", "")
    given = _digest(value[len(_BEARER) :] if value.lower().startswith(_BEARER) else "")
    # Every key is compared, in constant time each: the time tells nothing about any of them.
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _from_http(error: web.HTTPException, request: web.Request) -> RequestError:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.app[MAX_BODY_BYTES]
        text = f"the body has more than {limit} bytes; send less at once"
        return RequestError(text, code="body_too_large", status=413)
    if error.status == 404:
        return RequestError(f"there is no {request.path!r} here", code="not_found", status=404)
    if error.status == 405:
        text = f"{request.path} does not take {request.method}"
        return RequestError(text, code="method_not_allowed", status=405)
    return RequestError(error.reason, code="http_error", status=error.status)
