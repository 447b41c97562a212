"""How much: how often visitors and clients may ask, counted over moving windows.

All limits are asked before any is counted, and they are counted once the work has begun: what is
refused takes nothing from them. What is tried in vain is counted by itself, and bounded too.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter

from chatd.config import LimitsConfig
from chatd.domain import Chatbot, Rate, rates
from chatd.errors import RateLimited

log = logging.getLogger(__name__)

MAX_KEYS = 100_000
"""Who is counted at one time for one length of window; who asked least recently is forgotten."""

IPV6_PREFIX = 64
"""What one customer of a provider has at least (RFC 6177), and may take every address of."""

IN_VAIN = 5
"""How many times as often as something may be done it may be tried in vain. Who writes into one
session from several windows runs into turns that go on; nobody does that all the time."""

Kind = Literal["sessions", "turns"]
"""What is counted: sessions that begin, or turns."""


class Counters(Protocol):
    """Where it is counted who took how much: in this process, or in a place that several share."""

    async def left(self, rate: Rate, key: str) -> tuple[int, float]:
        """How many may still be taken under this key, and in how many seconds one comes back."""

    async def take(self, rate: Rate, key: str) -> bool:
        """Takes one, unless none is left; whether it was taken."""


class WindowCounters:
    """Moving windows: of any span as long as the rate's, no more than its count is taken.

    :param storage: of the package `limits`, which has one for Redis too.
    """

    def __init__(self, storage: Storage | None = None) -> None:
        self._window = MovingWindowRateLimiter(storage or MemoryWindows())

    async def left(self, rate: Rate, key: str) -> tuple[int, float]:
        stats = await self._window.get_window_stats(_item(rate), key)
        return stats.remaining, max(0.0, stats.reset_time - time.time())

    async def take(self, rate: Rate, key: str) -> bool:
        return await self._window.hit(_item(rate), key)


def _item(rate: Rate) -> RateLimitItemPerSecond:
    return RateLimitItemPerSecond(rate.count, rate.seconds)


class MemoryWindows(MemoryStorage):
    """Windows in memory, forgotten as they run out, at no cost for those that did not.

    The class above looks at every key for each one that is taken, on a thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[int, OrderedDict[str, deque[float]]] = {}

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        now = time.time()
        keys = self._taken.setdefault(expiry, OrderedDict())
        times = self._since(keys, key, now - expiry)
        if len(times) + amount > limit:
            return False
        times.extend([now] * amount)
        keys[key] = times
        keys.move_to_end(key)
        self._forget(keys, now - expiry)
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        now = time.time()
        times = self._since(self._taken.get(expiry, OrderedDict()), key, now - expiry)
        return (times[0] if times else now), len(times)

    @staticmethod
    def _since(keys: Mapping[str, deque[float]], key: str, start: float) -> deque[float]:
        times = keys.get(key, deque())
        while times and times[0] <= start:
            times.popleft()
        return times

    @staticmethod
    def _forget(keys: OrderedDict[str, deque[float]], start: float) -> None:
        """Drops who asked last before `start`; those are in front, and few at a time."""
        while keys:
            key, times = next(iter(keys.items()))
            if len(keys) <= MAX_KEYS and times and times[-1] > start:
                return
            del keys[key]


@dataclass(frozen=True, slots=True)
class Quota:
    """One limit as it stands for a request.

    `left` is how many more may be taken, `reset` in how many seconds one comes back.
    """

    name: str
    rate: Rate
    key: str
    left: int
    reset: float

    @property
    def policy(self) -> str:
        """A name for the limit and its window; a limit may have several."""
        return f"{self.name}/{self.rate.seconds}"


@dataclass(frozen=True, slots=True)
class Admission:
    """What the limits say of a request: those that are its own, and those that others share."""

    own: tuple[Quota, ...]
    shared: tuple[Quota, ...]

    @property
    def tightest(self) -> Quota | None:
        """The limit to mind: one that refuses, the longest; else the requester's own nearest."""
        refusing = [quota for quota in (*self.own, *self.shared) if quota.left < 0]
        if refusing:
            return max(refusing, key=lambda quota: quota.reset)
        return min(self.own, key=lambda quota: quota.left, default=None)

    @property
    def given_back(self) -> Admission:
        """The same when the work did not begin, so that it took nothing."""
        return Admission(_one_more(self.own), _one_more(self.shared))

    @property
    def refusing(self) -> Quota | None:
        """The limit that refuses, if one does."""
        quota = self.tightest
        return quota if quota is not None and quota.left < 0 else None

    def require(self) -> None:
        """Raises `RateLimited` when one of the limits refuses."""
        if (quota := self.refusing) is not None:
            raise RateLimited(
                f"At most {quota.rate} are taken ({quota.name}). Wait as long as Retry-After says.",
                retry_after=max(1, math.ceil(quota.reset)),
            )


def _one_more(quotas: Sequence[Quota]) -> tuple[Quota, ...]:
    return tuple(replace(quota, left=quota.left + 1) for quota in quotas)


class Limits:
    """Says how much is too much.

    :param defaults: for what a chatbot does not set itself.
    :param trusted_proxies: how many proxies stand before this server, each of which adds to
        `X-Forwarded-For` who called it.
    """

    def __init__(
        self, defaults: LimitsConfig, counters: Counters, *, trusted_proxies: int = 0
    ) -> None:
        self._defaults = defaults
        self._counters = counters
        self._trusted_proxies = trusted_proxies
        # Each process bounds by itself what is tried in it in vain: that costs no model anything.
        self._in_vain = WindowCounters()
        self._beginning: Counter[str] = Counter()
        self._warned = False

    def address(self, peer: str, forwarded: str) -> str:
        """Under which address a client is counted: an IPv4 address, or an IPv6 network.

        :param peer: who has the connection.
        :param forwarded: the header `X-Forwarded-For`; only what trusted proxies added counts.
        """
        if forwarded and not self._trusted_proxies and not self._warned:
            self._warned = True
            log.warning(
                "requests come with X-Forwarded-For: if a proxy of yours adds it, set "
                "server.trusted_proxies, or all its clients are counted as one"
            )
        return counted_address(peer, forwarded, self._trusted_proxies)

    @asynccontextmanager
    async def ask(
        self, kind: Kind, chatbot: Chatbot, own: Mapping[str, str | None]
    ) -> AsyncIterator[Admission]:
        """Asks all limits for one more of a kind, and counts it when the `async with` ends well.

        When it raises, that is counted as tried in vain, which is refused from `IN_VAIN` times the
        requester's own limits on. Call `Admission.require` first in it: what the limits refuse is
        counted nowhere.

        :param own: who asks: `ip`, `session` and `visitor` of a widget, or `key` of a client,
            who shares nothing with the widget's visitors. None is not counted.
        """
        keys = {scope: key for scope, key in own.items() if key is not None}
        mine = [
            quota for scope, key in keys.items() for quota in self._of(kind, scope, key, chatbot)
        ]
        others = [] if "key" in own else self._of(kind, "chatbot", "", chatbot)
        vain = [_vain(quota) for quota in mine]
        mine = [await self._asked(self._counters, quota) for quota in mine]
        others = [await self._asked(self._counters, quota) for quota in others]
        vain = [await self._asked(self._in_vain, quota) for quota in vain]
        refusing = tuple(quota for quota in vain if quota.left < 0)
        admission = Admission((*mine, *refusing), tuple(others))
        if any(quota.left < 0 for quota in (*admission.own, *others)):
            yield admission
            return
        began = [quota.key for quota in (*mine, *others, *vain)]
        self._beginning.update(began)
        try:
            yield admission
        except BaseException:
            for quota in vain:
                await self._in_vain.take(quota.rate, quota.key)
            raise
        else:
            for quota in (*mine, *others):
                await self._counters.take(quota.rate, quota.key)
        finally:
            self._beginning.subtract(began)
            self._beginning += Counter()

    def _of(self, kind: Kind, scope: str, key: str, chatbot: Chatbot) -> list[Quota]:
        """The limits of a chatbot for one more of a kind, by whom they are counted."""
        name = f"{kind}_per_{scope}"
        settings = chatbot.settings.limits or {}
        text = settings.get(name) or getattr(self._defaults, name, "none")
        path = f"{name}/{chatbot.id}/{key}"
        return [
            Quota(name, rate, f"{path}/{rate.count}/{rate.seconds}", 0, 0) for rate in rates(text)
        ]

    async def _asked(self, counters: Counters, quota: Quota) -> Quota:
        """The limit with what is left after one more; below 0 when that is too much."""
        left, reset = await counters.left(quota.rate, quota.key)
        return replace(quota, left=left - self._beginning[quota.key] - 1, reset=reset)


def _vain(quota: Quota) -> Quota:
    """How often what a limit is of may be tried in vain."""
    rate = Rate(quota.rate.count * IN_VAIN, quota.rate.seconds)
    return Quota(f"failed_{quota.name}", rate, f"failed_{quota.key}", 0, 0)


def counted_address(peer: str, forwarded: str, trusted: int) -> str:
    """The address of a client behind so many trusted proxies, or the network of an IPv6 address.

    Of `forwarded` only as many addresses count, from its right, as there are trusted proxies: what
    stands before them is what the client claims.
    """
    hops = [hop.strip() for hop in forwarded.split(",")] if forwarded.strip() else []
    claimed = hops[-min(trusted, len(hops))] if trusted and hops else peer
    address = _address(claimed) or _address(peer)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(address), IPV6_PREFIX), strict=False))
    return str(address or peer)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, as proxies write it: maybe with a port, an IPv6 one then in brackets."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
