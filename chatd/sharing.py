"""What this process shares with others, and how it goes on while it cannot.

Nothing waits for what is shared for more than a moment: what does not answer is left alone until it
does, and meanwhile this process counts by itself, beginning with what it counted before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from chatd import logs
from chatd.domain import new_id
from chatd.memory import MemoryAccounts, WindowCounters
from chatd.shared import Account, Left, Shared, SharedUnavailable, Spending, Window, Wish

log = logging.getLogger(__name__)

T = TypeVar("T")
Message = Mapping[str, Any]

ASK_SECONDS = 0.25
"""How long a request waits for what is shared, beside the time that this process is busy itself."""

SLICES = 5
"""In how many parts that is waited; one that ends late does not count."""

BUSY_SECONDS = 1.0
"""How long it is waited at most, however busy this process is."""

CHECK_SECONDS = 1.0
"""How long it may take to say that it is there, which no request waits for."""

RETRY_SECONDS = 1.0
"""How often that is asked while it is gone."""

WATCH_SECONDS = 5.0
"""How often that is asked otherwise."""

HOLD_SECONDS = 60.0
"""How long what a turn holds of a budget outlives a process that died; renewed thrice in that time."""

COMPLAIN_SECONDS = 60.0
"""How often it is said that something fails although what is shared is there."""

SAYING = "saying"
"""The name of tasks that end by themselves in a moment."""

EVERYBODY = "all"
"""The channel that each process listens on, beside one of its own."""


class _Patience:
    """Ends what it is given after `ASK_SECONDS`, without those in which this process was busy.

    An answer that came while the event loop did something else is not late.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._slice = ASK_SECONDS / SLICES
        self._left = SLICES
        self._last = self._loop.time() + BUSY_SECONDS
        self._scope = asyncio.timeout(None)
        self._wait()

    async def __aenter__(self) -> None:
        await self._scope.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        """Raises `TimeoutError` when it took too long."""
        self._timer.cancel()
        await self._scope.__aexit__(*error)

    def _wait(self) -> None:
        self._due = self._loop.time() + self._slice
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        if now - self._due < self._slice / 2:
            self._left -= 1
        if self._left and now < self._last:
            self._wait()
        else:
            self._scope.reschedule(now)


async def _in_time(operation: Awaitable[T]) -> T:
    """What comes of it in time. One that does not let itself be cancelled is left to itself.

    Raises `TimeoutError`, and what it raises.
    """
    task = asyncio.ensure_future(operation)
    try:
        async with _Patience():
            return await asyncio.shield(task)
    finally:
        task.cancel()


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken of windows: `left` is what there was before, and nothing is taken at 0."""

    group: str
    hold: str
    windows: Sequence[Window]
    left: Sequence[Left]

    @property
    def granted(self) -> bool:
        """Whether one of each was taken."""
        return all(each.left > 0 for each in self.left)


class Sharing:
    """What is shared with other processes, by a plugin; or nothing, without one.

    `fallbacks` counts what this process decided by itself since it could not ask, and `losses` how
    often what is shared was lost. `epoch` changes whenever the place changes where accounts are.
    """

    def __init__(self, shared: Shared | None = None) -> None:
        self.process = new_id()
        self.epoch = 0
        self.fallbacks = 0
        self.losses = 0
        self._windows = WindowCounters()
        self._accounts = MemoryAccounts()
        self._shared = shared
        self._doubts: BaseException | None = SharedUnavailable("not asked yet")
        self._lost = False
        self._is_open = False
        self._doubted = asyncio.Event()
        self._doubted_at = -math.inf
        self._trusted = asyncio.Event()
        self._complained = -math.inf
        self._heard: dict[str, list[Callable[[Message], None]]] = {}
        self._missed: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Task[None] | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other processes could share anything with this one."""
        return self._shared is not None

    @property
    def is_up(self) -> bool:
        """Whether it can be asked just now."""
        return self._shared is not None and self._doubts is None

    @property
    def hold_seconds(self) -> float:
        """How long something is held unless that is said again."""
        return HOLD_SECONDS if self.is_shared else math.inf

    # Beginning and ending

    async def open(self) -> None:
        """Looks whether it is there, and goes on doing so. A second call does nothing.

        Handlers that must miss nothing are added before.
        """
        if self._shared is not None and not self._is_open:
            self._is_open = True
            await self._look()
            self.spawn(self._watch())

    async def close(self) -> None:
        """Ends what `open` began."""
        if self._shared is not None:
            await self._sent()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _sent(self) -> None:
        """Waits a moment for what is being said, like what the last turns cost."""
        if saying := [task for task in self._tasks if task.get_name() == SAYING]:
            await asyncio.wait(saying, timeout=CHECK_SECONDS)

    def spawn(self, work: Coroutine[Any, Any, None], name: str = "") -> asyncio.Task[None]:
        """Runs `work` as a task that ends with this."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Whether it is there

    async def _ask(self, operation: Callable[[Shared], Awaitable[T]]) -> T:
        """What the plugin says, within a moment. Raises `SharedUnavailable`."""
        if self._shared is None:
            raise SharedUnavailable("nothing is shared")
        if self._doubts is not None:
            await self._looked_at()
        try:
            return await _in_time(operation(self._shared))
        except Exception as error:
            self.fallbacks += 1
            self._doubt(error)
            raise SharedUnavailable(_told(error)) from error

    async def _looked_at(self) -> None:
        """Waits a moment for it to be looked at, if it was doubted just now. Raises as `_ask` does."""
        wait = self._doubted_at + ASK_SECONDS - asyncio.get_running_loop().time()
        if wait > 0 and not self._lost:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._trusted.wait()
        if self._doubts is not None:
            self.fallbacks += 1
            raise SharedUnavailable("it is gone")

    def _doubt(self, error: BaseException) -> None:
        """Asks no more until it was looked at."""
        if self._doubts is None:
            self._doubts = error
            self._doubted_at = asyncio.get_running_loop().time()
            self._trusted.clear()
            self.epoch += 1
            self._accounts.clear()
            self._doubted.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if self._lost else WATCH_SECONDS):
                    await self._doubted.wait()
            await self._look()

    async def _look(self) -> None:
        """Asks whether it is there, and says so in the log when that has changed."""
        assert self._shared is not None
        self._doubted.clear()
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._shared.check()
        except Exception as error:
            self._doubt(error)
            self._doubted.clear()
            if not self._lost:
                self._lost = True
                self.losses += 1
                log.error(
                    "what processes share is gone, and each goes on by itself: %s", _told(error)
                )
            return
        self._trust()

    def _trust(self) -> None:
        """It answers: what it was asked before may have failed all the same."""
        if self._lost:
            log.warning("what processes share is back")
        elif self._doubts is not None and self._listener is not None:
            self._complain(self._doubts)
        if self._doubts is not None:
            self._doubts = None
            self._trusted.set()
            self.epoch += 1
        if self._lost and self._listener is not None:
            # What it listens on may be a connection that is none any more.
            self._listener.cancel()
            self._listener = None
        self._lost = False
        if self._listener is None or self._listener.done():
            self._listener = self.spawn(self._hear())

    def _complain(self, error: BaseException) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._complained > COMPLAIN_SECONDS:
            self._complained = now
            log.warning("what processes share is there, but failed once: %s", _told(error))

    # Limits

    async def take(self, group: str, windows: Sequence[Window]) -> Taken:
        """Takes one of each window, as `Shared.take` says; of this process's own without others."""
        if not windows:
            return Taken(group, "", windows, ())
        hold = new_id() if self.is_shared else ""
        try:
            left = await self._ask(lambda shared: shared.take(group, hold, windows))
        except SharedUnavailable:
            return Taken(group, hold, windows, await self._windows.take(windows))
        taken = Taken(group, hold, windows, left)
        if taken.granted:
            await self._windows.count(windows)
        return taken

    def give_back(self, taken: Taken) -> None:
        """Gives back what was granted, without waiting for it."""
        self._windows.give_back(taken.windows)
        if self.is_shared:
            self._say(lambda shared: shared.give_back(taken.group, taken.hold, taken.windows))

    # Budgets

    async def reserve(self, account: str, wish: Wish) -> Account:
        """As `Shared.reserve`."""
        if self._shared is None:
            return self._accounts.reserve(account, wish)
        try:
            return await self._ask(lambda shared: shared.reserve(account, wish))
        except SharedUnavailable:
            return self._accounts.reserve(account, wish)

    async def account(self, account: str) -> Account:
        """As `Shared.account`. What it says holds for the `epoch` that is now."""
        try:
            return await self._ask(lambda shared: shared.account(account))
        except SharedUnavailable:
            return self._accounts.account(account)

    async def learn(
        self, account: str, spent: float, *, settled: float, most: float, epoch: int
    ) -> None:
        """As `Shared.learn`; nothing when what was settled was said in another epoch."""
        if epoch != self.epoch:
            return
        with contextlib.suppress(SharedUnavailable):
            if self.is_up:
                await self._ask(lambda s: s.learn(account, spent, settled=settled, most=most))
            else:
                self._accounts.learn(account, spent, settled=settled, most=most)

    async def hold(self, account: str, holds: Mapping[str, float]) -> None:
        """As `Shared.hold`."""
        try:
            await self._ask(lambda shared: shared.hold(account, holds, HOLD_SECONDS))
        except SharedUnavailable:
            self._accounts.hold(account, holds, self.hold_seconds)

    def settle(self, account: str, hold: str, spending: Spending | None) -> None:
        """As `Shared.settle`, without waiting for it."""
        if not self.is_shared:
            self._accounts.settle(account, hold, spending)
            return

        def alone() -> None:
            self._accounts.settle(account, hold, spending)

        self._say(lambda shared: shared.settle(account, hold, spending), alone)

    # Messages

    def on(self, kind: str, heard: Callable[[Message], None]) -> Callable[[], None]:
        """Lets `heard` be called with each message of a kind that others send, until it is taken back.

        Returns what takes it back.
        """
        listening = self._heard.setdefault(kind, [])
        listening.append(heard)
        return lambda: listening.remove(heard)

    def on_missed(self, missed: Callable[[], None]) -> Callable[[], None]:
        """Lets `missed` be called when messages may not have come; returns what takes that back."""
        self._missed.append(missed)
        return lambda: self._missed.remove(missed)

    def tell(self, kind: str, **more: Any) -> None:
        """Tells every other process something, without waiting for it."""
        if self.is_shared:
            message = self._message(kind, more)
            self._say(lambda shared: shared.publish(EVERYBODY, message))

    async def send(self, process: str, kind: str, **more: Any) -> None:
        """Tells one process something. Raises `SharedUnavailable`."""
        message = self._message(kind, more)
        await self._ask(lambda shared: shared.publish(_own(process), message))

    def _message(self, kind: str, more: Message) -> bytes:
        return orjson.dumps({"kind": kind, "from": self.process, **more})

    def _say(
        self,
        operation: Callable[[Shared], Awaitable[None]],
        alone: Callable[[], None] = lambda: None,
    ) -> None:
        """Does something without waiting for it; `alone` when it cannot be done."""

        async def saying() -> None:
            try:
                await self._ask(operation)
            except SharedUnavailable:
                alone()

        self.spawn(saying(), SAYING)

    async def _hear(self) -> None:
        assert self._shared is not None
        channels = (EVERYBODY, _own(self.process))
        while True:
            try:
                async with aclosing(self._shared.listen(channels)) as messages:
                    async for message in messages:
                        if message is None:
                            self._may_have_missed()
                        else:
                            self._dispatch(message)
            except Exception as error:
                self._doubt(error)
            await asyncio.sleep(RETRY_SECONDS)

    def _may_have_missed(self) -> None:
        for missed in self._missed:
            missed()

    def _dispatch(self, data: bytes) -> None:
        """Hands a message to who wants it. One that is none of ours is passed over."""
        try:
            message = orjson.loads(data)
            if message["from"] != self.process:
                for heard in self._heard.get(message["kind"], ()):
                    heard(message)
        except Exception as error:
            log.warning("a message of another process is passed over: %s", logs.trace(error))


async def tell_once(shared: Shared, kind: str, **more: Any) -> None:
    """Tells every process something, from one that does not listen. Raises `SharedUnavailable`."""
    message = orjson.dumps({"kind": kind, "from": "", **more})
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await shared.publish(EVERYBODY, message)
    except SharedUnavailable:
        raise
    except Exception as error:
        raise SharedUnavailable(_told(error)) from error


def _own(process: str) -> str:
    return f"to/{process}"


def _told(error: BaseException) -> str:
    """What the log says of a failure: of unknown ones their kind alone, since texts may hold secrets."""
    if isinstance(error, SharedUnavailable):
        return str(error)
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
