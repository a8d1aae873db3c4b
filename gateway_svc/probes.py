"""What operators ask: is it alive, ready, healthy; its version, metrics and state."""

from __future__ import annotations

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from gateway_svc.exporter import make_registry, render
from gateway_svc.gateway import Gateway
from stages import __version__


class Probes:
    """Handlers that read the gateway and change nothing."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._registry = make_registry(gateway)

    async def live(self, request: web.Request) -> web.Response:
        """Handle GET /live: the event loop answers."""
        return _json({"status": "alive"})

    async def ready(self, request: web.Request) -> web.Response:
        """Handle GET /ready: 200 when new requests are welcome, else 503."""
        if self._gateway.is_ready:
            return _json({"status": "ready"})
        status = "draining" if self._gateway.core.is_draining else "starting"
        return _json({"status": status}, status=503)

    async def health(self, request: web.Request) -> web.Response:
        """Handle GET /health: 200 when every stage is heard of and work gets on, else 503."""
        gateway = self._gateway
        problems = gateway.health.problems(gateway.state, gateway.now_ns())
        if not problems:
            return _json({"status": "ok"})
        return _json({"status": "unhealthy", "problems": problems}, status=503)

    async def version(self, request: web.Request) -> web.Response:
        """Handle GET /version."""
        return _json({"version": __version__})

    async def metrics(self, request: web.Request) -> web.Response:
        """Handle GET /metrics."""
        return web.Response(
            body=render(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def state(self, request: web.Request) -> web.Response:
        """Handle GET /debug/state: the group as the supervisor sees it, and the open requests."""
        gateway = self._gateway
        return _json(
            {
                "epoch": gateway.state.epoch,
                "stages": [msgspec.structs.asdict(stage) for stage in gateway.state.stages],
                "gateway": {
                    "epoch": gateway.core.epoch,
                    "is_draining": gateway.core.is_draining,
                    "num_open": gateway.core.num_open,
                    "stats": gateway.core.stats(),
                },
            }
        )


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(document), status=status, content_type="application/json"
    )
