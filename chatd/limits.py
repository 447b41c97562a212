"""How much: how often visitors and clients may ask, counted over moving windows.

All limits are asked before any is counted, and what does not begin after all is given back: what is
refused takes nothing from them. What is tried in vain is counted by itself, and bounded too.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from chatd.config import LimitsConfig
from chatd.domain import Chatbot, Rate, rates
from chatd.errors import RateLimited
from chatd.memory import WindowCounters
from chatd.shared import Left, Window
from chatd.sharing import Sharing, Taken

log = logging.getLogger(__name__)

IPV6_PREFIX = 64
"""What one customer of a provider has at least (RFC 6177), and may take every address of."""

IN_VAIN = 5
"""How many times as often as something may be done it may be tried in vain. Who writes into one
session from several windows runs into turns that go on; nobody does that all the time."""

Kind = Literal["sessions", "turns"]
"""What is counted: sessions that begin, or turns."""


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

    @property
    def window(self) -> Window:
        """What is counted for it."""
        return Window(self.key, self.rate.count, self.rate.seconds)


@dataclass(frozen=True, slots=True)
class Admission:
    """What the limits say of a request: those that are its own, and those that others share.

    `taken` is what was counted, if anything was.
    """

    own: tuple[Quota, ...] = ()
    shared: tuple[Quota, ...] = ()
    taken: Taken | None = None

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return bool(self.own or self.shared)

    @property
    def tightest(self) -> Quota | None:
        """The limit to mind: one that refuses, the longest; else the requester's own nearest."""
        refusing = [quota for quota in (*self.own, *self.shared) if quota.left < 0]
        if refusing:
            return max(refusing, key=lambda quota: quota.reset)
        return min(self.own, key=lambda quota: quota.left, default=None)

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


_FREE = Admission()
"""Where nothing is limited."""


class Limits:
    """Says how much is too much.

    :param defaults: for what a chatbot does not set itself.
    :param trusted_proxies: how many proxies stand before this server, each of which adds to
        `X-Forwarded-For` who called it.
    """

    def __init__(
        self, defaults: LimitsConfig, sharing: Sharing, *, trusted_proxies: int = 0
    ) -> None:
        self._defaults = defaults
        self._sharing = sharing
        self._trusted_proxies = trusted_proxies
        # Each process bounds by itself what is tried in it in vain: that costs no model anything.
        self._in_vain = WindowCounters()
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

    async def ask(self, kind: Kind, chatbot: Chatbot, own: Mapping[str, str | None]) -> Admission:
        """Asks all limits for one more of a kind, and counts it unless one of them refuses.

        Call `Admission.require` next, and `give_back` when what is asked for does not begin.

        :param own: who asks: `ip`, `session` and `visitor` of a widget, or `key` of a client,
            who shares nothing with the widget's visitors. None is not counted.
        """
        mine: list[Quota] = []
        for scope, key in own.items():
            if key is not None:
                mine += self._of(kind, scope, key, chatbot)
        others = () if "key" in own else self._of(kind, "chatbot", "", chatbot)
        if not (mine or others):
            return _FREE
        tried = [await self._in_vain.left(_vain(quota).window) for quota in mine]
        if any(left.left < 1 for left in tried):
            return Admission(_stand(map(_vain, mine), tried))
        taken = await self._sharing.take(chatbot.id, [q.window for q in (*mine, *others)])
        left = taken.left
        return Admission(
            _stand(mine, left[: len(mine)]),
            _stand(others, left[len(mine) :]),
            taken if taken.granted else None,
        )

    async def give_back(self, admission: Admission) -> Admission:
        """What the limits say now that nothing began: it was tried in vain, and that is counted.

        That is refused from `IN_VAIN` times the requester's own limits on.
        """
        if admission.taken is not None:
            self._sharing.give_back(admission.taken)
            await self._in_vain.count([_vain(quota).window for quota in admission.own])
        return Admission(_one_more(admission.own), _one_more(admission.shared))

    def _of(self, kind: Kind, scope: str, key: str, chatbot: Chatbot) -> Sequence[Quota]:
        """The limits of a chatbot for one more of a kind, by whom they are counted."""
        name = f"{kind}_per_{scope}"
        settings = chatbot.settings.limits or {}
        text = settings.get(name) or getattr(self._defaults, name, "none")
        if text == "none":
            return ()
        path = f"{name}/{chatbot.id}/{key}"
        return [
            Quota(name, rate, f"{path}/{rate.count}/{rate.seconds}", 0, 0) for rate in rates(text)
        ]


def _stand(quotas: Iterable[Quota], left: Sequence[Left]) -> tuple[Quota, ...]:
    """The limits with what is left after one more; below 0 when that is too much."""
    return tuple(
        replace(quota, left=each.left - 1, reset=each.reset)
        for quota, each in zip(quotas, left, strict=True)
    )


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
