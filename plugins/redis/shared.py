"""`chatd.Shared` over redis-py."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio as client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
)

import chatd

from .scripts import ACCOUNT, TAKE, Script

CONNECT_SECONDS = 1.0
"""How long a connection may take to be made, and an answer to come that nobody waits for any more."""

CHECK_SECONDS = 10
"""How long the key lives that shows that the server can be written to."""

_CURES = (
    ((AuthenticationError, AuthorizationError), "check user and password in shared.url"),
    (
        (NoPermissionError,),
        "give the user more rights: +@all on the keys and channels of the prefix",
    ),
    ((ReadOnlyError,), "it is a replica: name the primary in shared.url"),
)
"""What to do about an error that would be the same if it was tried again."""


class RedisShared:
    """`chatd.Shared` in Redis or Valkey. It connects when it is first asked.

    :param url: of the server, or of any node of a cluster. It may hold a password, and is not told.
    :param prefix: what keys and channels begin with.
    :param connections: the most to one server.
    """

    def __init__(self, url: str, *, cluster: bool, prefix: str, connections: int) -> None:
        url = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
        self._url = url
        self._prefix = prefix
        self._cluster = cluster
        self._places = asyncio.Semaphore(connections)
        # A connection that the server closed meanwhile shows when it is used: then once more.
        options: dict[str, Any] = {
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_timeout": CONNECT_SECONDS,
            "retry": Retry(NoBackoff(), 1),
        }
        try:
            self._where = _where(url)
            kind: Any = client.RedisCluster if cluster else client.Redis
            # A pool that is full raises; who asks waits for a place here instead.
            options |= {"max_connections": 2 * connections}
            self._client: Any = kind.from_url(url, **options)
        except (ValueError, TypeError):
            # Its own words may hold the password.
            raise chatd.PluginError(
                "redis: shared.url cannot be read: write it like "
                "redis://user:password@host:6379/0, with %40 for an @ in the password"
            ) from None

    async def take(
        self, group: str, hold: str, windows: Sequence[chatd.Window]
    ) -> Sequence[chatd.Left]:
        arguments = [value for window in windows for value in (window.count, window.seconds)]
        keys = [self._window(group, window) for window in windows]
        told = await self._run(TAKE, keys, hold, *arguments)
        return [
            chatd.Left(max(0, int(left)), max(0.0, float(reset)))
            for left, reset in zip(told[::2], told[1::2], strict=True)
        ]

    async def give_back(self, group: str, hold: str, windows: Sequence[chatd.Window]) -> None:
        async with self._asking(), self._client.pipeline(transaction=False) as pipeline:
            for window in windows:
                pipeline.zrem(self._window(group, window), hold)
            await pipeline.execute()

    async def reserve(self, account: str, wish: chatd.Wish) -> chatd.Account:
        more = (wish.hold, wish.budget, wish.reserve, wish.seconds)
        return _account(await self._run(ACCOUNT, self._of(account), "reserve", *more))

    async def account(self, account: str) -> chatd.Account:
        return _account(await self._run(ACCOUNT, self._of(account), "account"))

    async def learn(self, account: str, spent: float, *, settled: float, most: float) -> None:
        await self._run(ACCOUNT, self._of(account), "learn", spent, settled, most)

    async def hold(self, account: str, holds: Mapping[str, float], seconds: float) -> None:
        flat = [value for hold in holds.items() for value in hold]
        await self._run(ACCOUNT, self._of(account), "hold", seconds, *flat)

    async def settle(self, account: str, hold: str, spending: chatd.Spending | None) -> None:
        more: Sequence[float] = ()
        if spending is not None:
            more = (spending.cost, spending.guesses, spending.guessed, spending.most)
        await self._run(ACCOUNT, self._of(account), "settle", hold, *more)

    async def publish(self, channel: str, message: bytes) -> None:
        # Any node of a cluster tells all others.
        anywhere = {"target_nodes": client.RedisCluster.RANDOM} if self._cluster else {}
        async with self._asking():
            await self._client.execute_command("PUBLISH", self._named(channel), message, **anywhere)

    async def listen(self, channels: Sequence[str]) -> AsyncGenerator[bytes | None, None]:
        with self._told():
            async with self._listener() as listener, listener.pubsub() as pubsub:
                await pubsub.subscribe(*map(self._named, channels))
                subscribed = 0
                async for message in pubsub.listen():
                    if message["type"] == "message":
                        yield message["data"]
                    elif message["type"] == "subscribe":
                        subscribed += 1
                        if subscribed == len(channels):
                            yield None

    async def check(self) -> None:
        key = f"{self._prefix}:check"
        async with self._asking():
            await self._client.set(key, 1, ex=CHECK_SECONDS)

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _listener(self) -> AsyncIterator[Any]:
        """A client that does not connect again by itself, since messages would be missed unseen."""
        options: dict[str, Any] = {
            "socket_connect_timeout": CONNECT_SECONDS,
            # It may be silent for hours.
            "socket_timeout": None,
            "retry": Retry(NoBackoff(), 0),
        }
        if self._cluster:
            await self._client.initialize()
            node = self._client.get_random_node()
            known = {
                name: value
                for name, value in node.connection_kwargs.items()
                if name in ("username", "password") or name.startswith("ssl_")
            }
            options |= {**known, "ssl": self._url.startswith("rediss")}
            listener = client.Redis(host=node.host, port=int(node.port), **options)
        else:
            listener = client.Redis.from_url(self._url, **options)
        try:
            yield listener
        finally:
            await listener.aclose()

    async def _run(self, script: Script, keys: Sequence[str], *arguments: Any) -> Any:
        async with self._asking():
            try:
                return await self._client.evalsha(script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self._client.eval(script.text, len(keys), *keys, *arguments)

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Waits for a connection to be free, and says what fails."""
        with self._told():
            async with self._places:
                yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Says what failed, where, and what to do."""
        try:
            yield
        except (RedisError, OSError) as error:
            text = f"redis at {self._where}: {type(error).__name__}: {error}"
            cures = [cure for kinds, cure in _CURES if isinstance(error, kinds)]
            raise chatd.SharedUnavailable("; ".join([text, *cures])) from error

    def _window(self, group: str, window: chatd.Window) -> str:
        digest = hashlib.blake2b(window.key.encode(), digest_size=16).hexdigest()
        return f"{self._prefix}:window:{{{group}}}:{digest}"

    def _of(self, account: str) -> tuple[str, str]:
        return (
            f"{self._prefix}:account:{{{account}}}",
            f"{self._prefix}:account:{{{account}}}:holds",
        )

    def _named(self, channel: str) -> str:
        return f"{self._prefix}:{channel}"


def _where(url: str) -> str:
    """What of an address may be told: not who logs in."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


def _account(told: Sequence[bytes]) -> chatd.Account:
    settled, held, running, most, guesses, guessed, granted, amount = map(float, told[:8])
    return chatd.Account(
        spent=float(told[8]) if told[8] else None,
        settled=settled,
        held=held,
        running=int(running),
        most=most,
        guesses=int(guesses),
        guessed=guessed,
        granted=bool(granted),
        amount=amount if granted else 0.0,
    )
