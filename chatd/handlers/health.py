"""Health: alive, and able to serve."""

from __future__ import annotations

import asyncio

from chatd.errors import ShuttingDown, StorageUnavailable
from chatd.handlers.base import ApiHandler, Operation, Route

READY_SECONDS = 2.0
"""How long storage may take to say that it is there."""


class HealthHandler(ApiHandler):
    """`GET /health` and `GET /healthz`: the process answers."""

    def get(self) -> None:
        self.answer({"status": "ok"})


class ReadyHandler(ApiHandler):
    """`GET /readyz`: new requests are welcome."""

    async def get(self) -> None:
        if self.services.turns.closing:
            raise ShuttingDown
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.services.storage.check()
        except TimeoutError:
            raise StorageUnavailable(f"check took more than {READY_SECONDS} s") from None
        self.answer({"status": "ready"})


_ALIVE = Operation(
    summary="Whether the process answers",
    auth="none",
    response="status",
)

ROUTES = [
    Route("/health", HealthHandler, {"GET": _ALIVE}, tag="Operation"),
    Route("/healthz", HealthHandler, {"GET": _ALIVE}, tag="Operation"),
    Route(
        "/readyz",
        ReadyHandler,
        {
            "GET": Operation(
                summary="Whether requests can be served",
                description="Storage answers, and the server is not shutting down.",
                auth="none",
                response="status",
                errors=(StorageUnavailable, ShuttingDown),
            )
        },
        tag="Operation",
    ),
]
