"""What processes would share, in one process alone: the default, and what is left without others."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from chatd.shared import Account, Left, Spending, Window, Wish

MAX_KEYS = 100_000
"""Who is counted at one time for one length of window; who asked least recently is forgotten."""

MAX_ACCOUNTS = 10_000
"""Days of chatbots that are kept; the least recently used go first."""


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

    def give_back(self, key: str, expiry: int) -> None:
        """Takes back the last one that was taken, if one is there."""
        times = self._taken.get(expiry, OrderedDict[str, deque[float]]()).get(key)
        if times:
            times.pop()

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


class WindowCounters:
    """Moving windows: of any span as long as the window's, no more than its count is taken.

    None of it waits for anything, so that what is asked together is asked at once.
    """

    def __init__(self, storage: MemoryWindows | None = None) -> None:
        self._storage = storage or MemoryWindows()
        self._window = MovingWindowRateLimiter(self._storage)

    async def left(self, window: Window) -> Left:
        """How many may still be taken."""
        stats = await self._window.get_window_stats(_item(window), window.key)
        return Left(stats.remaining, max(0.0, stats.reset_time - time.time()))

    async def take(self, windows: Sequence[Window]) -> Sequence[Left]:
        """Takes one of each, as `Shared.take` says."""
        left = [await self.left(window) for window in windows]
        if all(each.left > 0 for each in left):
            await self.count(windows)
        return left

    async def count(self, windows: Sequence[Window]) -> None:
        """Takes one of each that has one."""
        for window in windows:
            await self._window.hit(_item(window), window.key)

    def give_back(self, windows: Sequence[Window]) -> None:
        """Gives back one of each."""
        for window in windows:
            item = _item(window)
            self._storage.give_back(item.key_for(window.key), item.get_expiry())


def _item(window: Window) -> RateLimitItemPerSecond:
    return RateLimitItemPerSecond(window.count, window.seconds)


@dataclass(slots=True)
class _Entries:
    """One account. `base` is what storage said when `mark` was settled."""

    base: float | None = None
    mark: float = 0.0
    settled: float = 0.0
    most: float = 0.0
    guesses: int = 0
    guessed: float = 0.0
    held: float = 0.0
    """The sum of what is held, kept so that nobody adds it up for each turn."""
    next_end: float = math.inf
    """No hold ends before that."""
    _holds: dict[str, tuple[float, float]] = field(default_factory=dict)

    def hold(self, name: str, amount: float, end: float) -> None:
        """Holds so much until then, in place of what this hold had."""
        self.let_go(name)
        self._holds[name] = (amount, end)
        self.held += amount
        self.next_end = min(self.next_end, end)

    def let_go(self, name: str) -> None:
        """Holds no more what this hold has, if it has something."""
        if (known := self._holds.pop(name, None)) is not None:
            # What was added and taken away again need not be nothing.
            self.held = self.held - known[0] if self._holds else 0.0

    def expire(self, now: float) -> None:
        """Lets go of what was held until now at most."""
        if now < self.next_end:
            return
        for name in [name for name, (_, end) in self._holds.items() if end <= now]:
            self.let_go(name)
        self.next_end = min((end for _, end in self._holds.values()), default=math.inf)

    @property
    def spent(self) -> float | None:
        """What is known to be spent; None while storage was not asked."""
        return None if self.base is None else self.base + self.settled - self.mark

    @property
    def running(self) -> int:
        """How many turns hold something."""
        return len(self._holds)

    def shown(self, granted: float | None = None) -> Account:
        """How it stands."""
        return Account(
            spent=self.spent,
            settled=self.settled,
            held=self.held,
            running=self.running,
            most=self.most,
            guesses=self.guesses,
            guessed=self.guessed,
            granted=granted is not None,
            amount=granted or 0.0,
        )


class MemoryAccounts:
    """What chatbots spend: accounts as `Shared` has them, at once and in this process.

    :param clock: seconds, from any start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: OrderedDict[str, _Entries] = OrderedDict()

    def _of(self, account: str) -> _Entries:
        if (entries := self._accounts.get(account)) is None:
            entries = self._accounts[account] = _Entries()
            if len(self._accounts) > MAX_ACCOUNTS:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(account)
        entries.expire(self._clock())
        return entries

    def reserve(self, account: str, wish: Wish) -> Account:
        """As `Shared.reserve`."""
        entries = self._of(account)
        spent, amount = entries.spent, max(wish.reserve, entries.most)
        if spent is None or spent >= wish.budget:
            return entries.shown()
        if entries.running and spent + entries.held + amount > wish.budget:
            return entries.shown()
        entries.hold(wish.hold, amount, self._clock() + wish.seconds)
        return entries.shown(amount)

    def account(self, account: str) -> Account:
        """As `Shared.account`."""
        return self._of(account).shown()

    def learn(self, account: str, spent: float, *, settled: float, most: float) -> None:
        """As `Shared.learn`."""
        entries = self._of(account)
        entries.base, entries.mark = spent, settled
        entries.most = max(entries.most, most)

    def hold(self, account: str, holds: Mapping[str, float], seconds: float) -> None:
        """As `Shared.hold`."""
        entries = self._of(account)
        end = self._clock() + seconds
        for name, amount in holds.items():
            entries.hold(name, amount, end)

    def settle(self, account: str, hold: str, spending: Spending | None) -> None:
        """As `Shared.settle`."""
        entries = self._of(account)
        entries.let_go(hold)
        if spending is not None:
            entries.settled += spending.cost
            entries.guesses += spending.guesses
            entries.guessed += spending.guessed
            entries.most = max(entries.most, spending.most)

    def clear(self) -> None:
        """Forgets everything."""
        self._accounts.clear()


class MemoryShared:
    """`chatd.Shared` for one process: all who have this object share it, and nobody else."""

    def __init__(self) -> None:
        self.windows = WindowCounters()
        self.accounts = MemoryAccounts()
        self._taken: set[str] = set()
        self._listening: list[tuple[frozenset[str], asyncio.Queue[bytes]]] = []

    async def take(self, group: str, hold: str, windows: Sequence[Window]) -> Sequence[Left]:
        left = await self.windows.take(windows)
        if all(each.left > 0 for each in left):
            self._taken.add(hold)
            asyncio.get_running_loop().call_later(
                max(window.seconds for window in windows), self._taken.discard, hold
            )
        return left

    async def give_back(self, group: str, hold: str, windows: Sequence[Window]) -> None:
        if hold in self._taken:
            self._taken.discard(hold)
            self.windows.give_back(windows)

    async def reserve(self, account: str, wish: Wish) -> Account:
        return self.accounts.reserve(account, wish)

    async def account(self, account: str) -> Account:
        return self.accounts.account(account)

    async def learn(self, account: str, spent: float, *, settled: float, most: float) -> None:
        self.accounts.learn(account, spent, settled=settled, most=most)

    async def hold(self, account: str, holds: Mapping[str, float], seconds: float) -> None:
        self.accounts.hold(account, holds, seconds)

    async def settle(self, account: str, hold: str, spending: Spending | None) -> None:
        self.accounts.settle(account, hold, spending)

    async def publish(self, channel: str, message: bytes) -> None:
        for channels, queue in self._listening:
            if channel in channels:
                queue.put_nowait(message)

    async def listen(self, channels: Sequence[str]) -> AsyncGenerator[bytes | None, None]:
        listening = (frozenset(channels), asyncio.Queue[bytes]())
        self._listening.append(listening)
        try:
            yield None
            while True:
                yield await listening[1].get()
        finally:
            self._listening.remove(listening)

    async def check(self) -> None:
        """It always answers."""

    async def close(self) -> None:
        """Nothing is open."""
