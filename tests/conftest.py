"""Fixtures. pytest-tornasync has no async ones: plain fixtures run their part with `io_loop`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from tornado.ioloop import IOLoop

from chatd.testing.fake_provider import FakeProvider
from tests.pages import chromium
from tests.postgres import Supabase
from tests.support import ECHO_CONFIG, Served, open_served

Serve = Callable[[str], Awaitable[Served]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--phase",
        choices=["together", "alone"],
        help="only the tests that share the machine, or only those marked `alone`",
    )


def pytest_xdist_auto_num_workers() -> int:
    """The tests wait about as long as they compute. The longest of them bounds what more brings."""
    return min(2 * (os.cpu_count() or 1), 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of the other phase."""
    if phase := config.getoption("--phase"):
        parts: dict[str, list[pytest.Item]] = {"together": [], "alone": []}
        for item in items:
            parts["alone" if item.get_closest_marker("alone") else "together"].append(item)
        items[:] = parts.pop(phase)
        (left_out,) = parts.values()
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def database() -> Iterator[Supabase]:
    """A PostgreSQL and a PostgREST, started when the first test wants them."""
    supabase = Supabase()
    yield supabase
    supabase.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, one for each file: the tests of others could not run their own loops."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def fake(io_loop: IOLoop) -> Iterator[FakeProvider]:
    """A service whose answers the test scripts."""
    yield from _running(io_loop)


@pytest.fixture
def first(io_loop: IOLoop) -> Iterator[FakeProvider]:
    """The service that the first provider of a chain asks."""
    yield from _running(io_loop)


@pytest.fixture
def second(io_loop: IOLoop) -> Iterator[FakeProvider]:
    """The service that the second one asks."""
    yield from _running(io_loop)


def _running(io_loop: IOLoop) -> Iterator[FakeProvider]:
    fake = FakeProvider()
    io_loop.run_sync(fake.start)
    yield fake
    io_loop.run_sync(fake.stop)


@pytest.fixture
def storage_config(tmp_path: Path) -> str:
    """The storage that a served configuration uses; override it to use another."""
    return f"{{use: sqlite, path: {tmp_path / 'chatd.db'}}}"


@pytest.fixture
def serve(io_loop: IOLoop, tmp_path: Path, storage_config: str) -> Iterator[Serve]:
    """`await serve(text)` serves a configuration, in which `%(storage)s` stands for a new storage."""
    stack = AsyncExitStack()

    async def start(text: str) -> Served:
        path = tmp_path / "chatd.yaml"
        path.write_text(text.replace("%(storage)s", storage_config))
        return await open_served(path, stack)

    yield start
    # What the test left to be stored is not waited for as long as a server would.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatd.turns.STORE_SECONDS", 0.1)
        io_loop.run_sync(stack.aclose, timeout=30)


@pytest.fixture
def served(io_loop: IOLoop, serve: Serve) -> Served:
    """A server that echoes, with one allowed origin, https://site.example."""

    async def start() -> Served:
        return await serve(ECHO_CONFIG)

    return io_loop.run_sync(start, timeout=30)
