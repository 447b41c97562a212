"""What processes share: the contract, in memory, in Redis and in a cluster of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chatd_plugins.redis import open_redis

import chatd
from chatd.testing import SharedConformance
from chatd.testing.shared import Opener
from tests.redis_server import RedisServer, cluster


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def clustered() -> Iterator[RedisServer]:
    server = cluster()
    yield server
    server.close()


class TestMemory(SharedConformance):
    @pytest.fixture
    def open_shared(self) -> Opener:
        both = chatd.MemoryShared()

        async def open() -> chatd.Shared:
            return both

        return open


class TestRedis(SharedConformance):
    @pytest.fixture
    def open_shared(self, server: RedisServer) -> Opener:
        async def open() -> chatd.Shared:
            return await open_redis({"url": server.url})

        return open


class TestCluster(SharedConformance):
    @pytest.fixture
    def open_shared(self, clustered: RedisServer) -> Opener:
        async def open() -> chatd.Shared:
            return await open_redis({"url": clustered.url, "cluster": True})

        return open
