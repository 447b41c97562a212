"""Fixtures. pytest-tornasync has no async ones: plain fixtures run their part with `io_loop`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tornado.ioloop import IOLoop

from tests.support import ECHO_CONFIG, Served, open_served

Serve = Callable[[str], Awaitable[Served]]


@pytest.fixture
def serve(io_loop: IOLoop, tmp_path: Path) -> Iterator[Serve]:
    """`await serve(text)` serves a configuration, in which `%(db)s` stands for a new database."""
    stack = AsyncExitStack()

    async def start(text: str) -> Served:
        path = tmp_path / "chatd.yaml"
        path.write_text(text.replace("%(db)s", str(tmp_path / "chatd.db")))
        return await open_served(path, stack)

    yield start
    io_loop.run_sync(stack.aclose, timeout=30)


@pytest.fixture
def served(io_loop: IOLoop, serve: Serve) -> Served:
    """A server that echoes, with one allowed origin, https://site.example."""

    async def start() -> Served:
        return await serve(ECHO_CONFIG)

    return io_loop.run_sync(start, timeout=30)
