"""Fixtures. pytest-tornasync has no async ones: plain fixtures run their part with `io_loop`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tornado.ioloop import IOLoop

from tests.support import ECHO_CONFIG, Served, open_served


@pytest.fixture
def serve(io_loop: IOLoop, tmp_path: Path) -> Iterator[Callable[[str], Served]]:
    """Serves a configuration's text, in which `%(db)s` stands for a new database."""
    stack = AsyncExitStack()

    def start(text: str) -> Served:
        path = tmp_path / "chatd.yaml"
        path.write_text(text.replace("%(db)s", str(tmp_path / "chatd.db")))
        return io_loop.run_sync(lambda: open_served(path, stack), timeout=30)

    yield start
    io_loop.run_sync(stack.aclose, timeout=30)


@pytest.fixture
def served(serve: Callable[[str], Served]) -> Served:
    """A server that echoes, with one allowed origin, https://site.example."""
    return serve(ECHO_CONFIG)
