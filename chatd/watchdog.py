"""Limits on many waits at the cost of one timer: `asyncio.timeout` makes and drops one for each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class Patience:
    """A limit on waits that are all as long, many at a time, of which a task has one.

    :param seconds: how long each may take.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._dues: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of `work`, whose task is cancelled when it takes too long.

        Raises `TimeoutError` then, and what `work` raises.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        before = task.cancelling()
        self._dues[task] = due = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_at(due, self._check, loop)
        try:
            return await work
        except asyncio.CancelledError:
            if task in self._late and task.uncancel() <= before:
                raise TimeoutError from None
            raise
        finally:
            self._dues.pop(task, None)
            if self._late:
                self._late.discard(task)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for task, due in list(self._dues.items()):
            # Those that began first are first, and due first.
            if loop.time() < due:
                self._timer = loop.call_at(due, self._check, loop)
                return
            del self._dues[task]
            self._late.add(task)
            task.cancel()


class Watchdog:
    """Cancels a task whose wait takes too long, for waits of any length, one after the other.

    It lets its timer run and, when that goes off early, sets it anew. A wait is what lies between `watch` and `rest`. One of it at a time.
    """

    __slots__ = (
        "_before",
        "_due",
        "_fired",
        "_loop",
        "_task",
        "_timer",
        "is_waiting",
        "seconds",
    )

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._due = math.inf
        self._before = 0
        self._fired = False
        self.is_waiting = False
        """Whether a wait began and did not end."""
        self.seconds = math.inf
        """What `in_seconds` was called with last."""

    def in_seconds(self, seconds: float) -> float:
        """So many seconds from now, on the event loop's clock."""
        self.seconds = seconds
        return self._loop.time() + seconds

    def is_past(self, due: float) -> bool:
        """Whether that time has come."""
        return self._loop.time() >= due

    def watch(self, due: float) -> None:
        """Begins a wait of the current task, which is cancelled at `due`."""
        self._task = asyncio.current_task(self._loop)
        self._before = self._task.cancelling() if self._task is not None else 0
        self._due = due
        self.is_waiting = True
        if due < math.inf and (self._timer is None or due < self._timer.when()):
            self.close()
            self._timer = self._loop.call_at(due, self._check)

    def rest(self) -> None:
        """Ends the wait. Raises `CancelledError` when it was cancelled and went on all the same."""
        if self._task is not None and self._task.cancelling() > self._before:
            raise asyncio.CancelledError
        self.is_waiting = False

    def fired(self) -> bool:
        """Whether the wait was cancelled for its length, and for nothing else meanwhile.

        Takes that cancellation back; to be asked once, for what came out of the wait.
        """
        if not self._fired or self._task is None:
            return False
        self._fired = False
        return self._task.uncancel() <= self._before

    def close(self) -> None:
        """Lets go of the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if not self.is_waiting or self._task is None or self._fired:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._check)
            return
        self._fired = True
        self._task.cancel()
