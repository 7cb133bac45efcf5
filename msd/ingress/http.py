"""The HTTP socket: GET /metrics for Prometheus, GET /health for load balancers; loopback unless config says otherwise.

The only importer of aiohttp here. A further endpoint is one more route in `_routes`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import structlog
from aiohttp import web

from msd.config import HttpIngressConfig
from msd.errors import IngressError

LOOPBACK = "127.0.0.1"
MAX_AT_ONCE = 16
"""Scrapes under way; further ones are told to come again."""
KEEP_ALIVE_S = 75.0
STOP_S = 1.0

_log = structlog.get_logger(__name__)


class HttpIngress:
    """One listening socket; nothing at all when config names none."""

    def __init__(
        self,
        config: HttpIngressConfig,
        *,
        state: Callable[[], str],
        metrics: Callable[[], Awaitable[bytes]],
        content_type: str,
    ) -> None:
        """`state`: starting, serving or draining. `metrics`: the text of one scrape, of `content_type`."""
        self._listen = config.listen
        self._state = state
        self._metrics = metrics
        self._content_type = content_type
        self._num_scrapes = 0
        self._runner: web.AppRunner | None = None
        self.address: tuple[str, int] | None = None
        """Where it listens."""

    async def start(self) -> None:
        """Bind and serve. Raises IngressError."""
        if not self._listen:
            return
        host, _, port = self._listen.rpartition(":")
        host = host.strip("[]") or LOOPBACK
        app = web.Application(client_max_size=1024)
        app.add_routes(self._routes())
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=KEEP_ALIVE_S, shutdown_timeout=STOP_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, int(port)).start()
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            raise IngressError(
                f"cannot listen on http://{self._listen}: {error}", remedy="set ingress.http.listen to a free address"
            ) from error
        self._runner = runner
        self.address = runner.addresses[0][:2]
        _log.info("http_listening", address=f"{self.address[0]}:{self.address[1]}")

    async def close(self) -> None:
        """Stop listening; answers under way have a second."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _routes(self) -> Iterable[web.AbstractRouteDef]:
        return (web.get("/metrics", self._on_metrics), web.get("/health", self._on_health))

    async def _on_metrics(self, request: web.Request) -> web.Response:
        if self._num_scrapes >= MAX_AT_ONCE:
            raise web.HTTPServiceUnavailable(text="too many scrapes at once\n", headers={"Retry-After": "1"})
        self._num_scrapes += 1
        try:
            body = await self._metrics()
        finally:
            self._num_scrapes -= 1
        return web.Response(body=body, headers={"Content-Type": self._content_type})

    async def _on_health(self, request: web.Request) -> web.Response:
        """200 while some mode is warm and new requests are taken, else 503; the word says which."""
        state = self._state()
        return web.json_response({"state": state}, status=200 if state == "serving" else 503)
