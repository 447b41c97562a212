"""`GET /metrics`: what is counted, for Prometheus."""

from __future__ import annotations

import asyncio
import hmac

from chatd.errors import InvalidApiKey, NotFound
from chatd.handlers.base import ApiHandler, Operation, Route
from chatd.metrics.text import render


class MetricsHandler(ApiHandler):
    """Answers who has the token. Without one in the configuration there is nothing here."""

    async def get(self) -> None:
        token = self.services.config.metrics_token
        if not token:
            raise NotFound("There is nothing at this path. The endpoints are described at /docs.")
        given = self.bearer() or ""
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode()):
            raise InvalidApiKey("Send the server's `metrics_token` as `Authorization: Bearer …`.")
        accept = self.given_headers.get("accept", "")
        snapshots = self.services.metrics.gather()
        # Many models make thousands of lines: milliseconds that turns need not wait for.
        content_type, text = await asyncio.to_thread(render, snapshots, accept)
        self.set_header("Content-Type", content_type)
        self.finish(text)


ROUTES = [
    Route(
        "/metrics",
        MetricsHandler,
        {"GET": Operation(summary="Numbers for Prometheus", auth="none", errors=(InvalidApiKey,))},
        tag="Operation",
    )
]
