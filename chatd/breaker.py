"""Who is not asked for a while: a circuit breaker for each provider and model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

BUCKETS = 10
"""In how many steps the window slides."""


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When a provider's model is left alone.

    :param share: of the requests in the window, 0 to 1, that failed.
    :param requests: how many requests the window must hold, so that one failure proves nothing.
    :param window: seconds that are looked back on.
    :param open_seconds: how long it is left alone before a single request tries it.
    """

    share: float = 0.5
    requests: int = 10
    window: float = 30
    open_seconds: float = 15


class BreakerState(StrEnum):
    """Whether requests go through: all, none, or one that tries."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Counts how requests end, and says whether another may be made.

    :param clock: seconds that only grow.
    """

    def __init__(
        self, settings: BreakerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._step = settings.window / BUCKETS
        self._counts: dict[int, list[int]] = {}
        self._opened: float | None = None
        self._probing = False
        self.failed_at = float("-inf")
        """When a request failed last, on the clock."""

    @property
    def state(self) -> BreakerState:
        """What `ask` goes by."""
        if self._opened is None:
            return BreakerState.CLOSED
        if self._clock() < self._opened + self._settings.open_seconds:
            return BreakerState.OPEN
        return BreakerState.HALF_OPEN

    @property
    def lets(self) -> bool:
        """Whether `ask` would give leave now."""
        return self._opened is None or not (self._probing or self.state is BreakerState.OPEN)

    def ask(self) -> Ticket | None:
        """Leave to make a request now, or None; of requests that try a provider one at a time."""
        return self.force() if self.lets else None

    def force(self) -> Ticket:
        """Leave to make a request although it is open, since there is nobody else to ask."""
        self._probing = self._opened is not None
        return Ticket(self, tries=self._probing)

    def _take_back(self, bucket: int) -> None:
        """Counts one no more that had gone well."""
        if bucket in self._counts:
            self._counts[bucket][0] = max(0, self._counts[bucket][0] - 1)

    @property
    def _bucket(self) -> int:
        return int(self._clock() / self._step)

    def _tally(self, which: int) -> None:
        """Counts one that went well (0) or failed (1)."""
        now = self._bucket
        if (counts := self._counts.get(now)) is None:
            for old in [step for step in self._counts if step <= now - BUCKETS]:
                del self._counts[old]
            counts = self._counts[now] = [0, 0]
        counts[which] += 1

    def _succeeded(self, tries: bool) -> bool:
        closes = tries and self._opened is not None
        if closes:
            self._opened, self._probing = None, False
            self._counts.clear()
        self._tally(0)
        return closes

    def _failed(self, tries: bool) -> bool:
        self.failed_at = self._clock()
        self._tally(1)
        good, bad = (sum(counts) for counts in zip(*self._counts.values(), strict=True))
        # Of several that were forced one may have closed it meanwhile.
        if tries and self._opened is not None:
            self._opened, self._probing = self.failed_at, False
        if self._opened is not None or good + bad < self._settings.requests:
            return False
        if bad < self._settings.share * (good + bad):
            return False
        self._opened = self.failed_at
        return True

    def _dropped(self, tries: bool) -> None:
        if tries:
            self._probing = False


class Ticket:
    """One request that a breaker let through. It is told how the request ends.

    :param tries: whether the breaker waits for this one to know whether to close.
    """

    __slots__ = ("_breaker", "_bucket", "_told", "_tries")

    def __init__(self, breaker: Breaker, *, tries: bool) -> None:
        self._breaker = breaker
        self._tries = tries
        self._told = False
        self._bucket: int | None = None

    def succeeded(self) -> bool:
        """The provider answers; True when that closes the breaker."""
        if self._told:
            return False
        self._told = True
        closes = self._breaker._succeeded(self._tries)
        self._bucket = self._breaker._bucket
        return closes

    def failed(self) -> bool:
        """It failed in a way that says something of the provider; True when that opens the breaker.

        An answer that broke off after it had begun is told of by `succeeded` and then by this, and
        counts as failed alone.
        """
        tries = self._tries and not self._told
        self._told = True
        if self._bucket is not None:
            self._breaker._take_back(self._bucket)
            self._bucket = None
        return self._breaker._failed(tries)

    def dropped(self) -> None:
        """It ended, and when nothing was told of it yet, that says nothing of the provider."""
        if not self._told:
            self._told = True
            self._breaker._dropped(self._tries)
