"""GET /v1/models and /v1/models/{id}: the one served model."""

from __future__ import annotations

import time

import msgspec
from aiohttp import web

from gateway_svc.gateway import Gateway
from gateway_svc.openai.check import check_model


class ModelCard(msgspec.Struct, frozen=True, tag_field="object", tag="model"):
    """A model; `max_model_len` is vLLM's field, which benchmark clients read."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """All models."""

    data: list[ModelCard]


class ModelsEndpoint:
    """Shows the model's card; never where on the disk it lies."""

    def __init__(self, gateway: Gateway) -> None:
        self._config = gateway.config
        name = self._config.served_model_name
        self._card = ModelCard(
            name, int(time.time()), "headrace", name, None, self._config.max_model_len
        )

    async def list(self, request: web.Request) -> web.Response:
        """Handle GET /v1/models."""
        return _json(ModelList([self._card]))

    async def show(self, request: web.Request) -> web.Response:
        """Handle GET /v1/models/{id}."""
        check_model(request.match_info["model"], self._config)
        return _json(self._card)


def _json(document: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")
