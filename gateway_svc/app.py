"""The aiohttp application: routes, middlewares, limits. Starting it is the shell's affair."""

from __future__ import annotations

import logging

from aiohttp import http_parser, web

from gateway_svc.gateway import Gateway
from gateway_svc.middleware import (
    MAX_BODY_BYTES,
    echo_request_id,
    give_request_id,
    require_key,
    word_errors,
)
from gateway_svc.openai.chat import ChatEndpoint
from gateway_svc.openai.completions import CompletionEndpoint
from gateway_svc.openai.models import ModelsEndpoint
from gateway_svc.openai.tokenize import TokenizeEndpoint
from gateway_svc.probes import Probes
from stages.config import ServerConfig

logger = logging.getLogger(__name__)


def make_app(config: ServerConfig, gateway: Gateway) -> web.Application:
    """Make the application.

    Its runner must have `handler_cancellation` on, else a client that has left is noticed only at
    the next write.
    """
    if not has_c_parser():
        logger.warning("aiohttp runs without its C parser: slower, and laxer with bad HTTP")
    app = web.Application(
        client_max_size=config.max_body_bytes,
        middlewares=[give_request_id, word_errors, require_key(config.api_key)],
    )
    app[MAX_BODY_BYTES] = config.max_body_bytes
    app.on_response_prepare.append(echo_request_id)
    _add_routes(app, gateway)
    return app


def has_c_parser() -> bool:
    """Say whether aiohttp was built with its C parser."""
    return http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy


def _add_routes(app: web.Application, gateway: Gateway) -> None:
    models, tokenize, probes = ModelsEndpoint(gateway), TokenizeEndpoint(gateway), Probes(gateway)
    app.add_routes(
        [
            web.post("/v1/chat/completions", ChatEndpoint(gateway).post),
            web.post("/v1/completions", CompletionEndpoint(gateway).post),
            web.get("/v1/models", models.list),
            web.get("/v1/models/{model:.+}", models.show),
            web.post("/tokenize", tokenize.tokenize),
            web.post("/detokenize", tokenize.detokenize),
            web.get("/live", probes.live),
            web.get("/ready", probes.ready),
            web.get("/health", probes.health),
            web.get("/version", probes.version),
            web.get("/metrics", probes.metrics),
            web.get("/debug/state", probes.state),
        ]
    )
