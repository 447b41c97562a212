"""Lets many streams take turns: what each of them reads and writes by itself costs the most."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

SHARE = 0.5
"""How much of its time the event loop may be busy before streams wait."""

FEW_STREAMS = 50
"""So many never wait: what they cost is little, whatever else the loop is busy with."""

MAX_WAIT = 0.15
"""The longest wait, in seconds: what is said is read at least so often."""

FIRST_WAIT = 0.02
"""What waiting begins with, in seconds; below half of it nobody waits, since nothing is gained."""

WINDOW = 0.25
"""For how many seconds the loop is watched before the wait changes."""

MEMORY = 1.0
"""After so many seconds without a stream that reads, nothing is known of the load."""

TICK = 0.01
"""How far apart, in seconds, those are let go on that have waited; all that are due, at a time."""


class Pace:
    """How long a stream waits between two reads, so that the event loop keeps some of its time.

    What a read and the write after it cost is divided by the wait, so the wait that makes the loop
    busy for `SHARE` of its time is found by multiplying it with how busy it is, over `SHARE`. What
    the wait does not change makes each step smaller, so it never swings.

    :param busy: seconds that the loop's thread has worked.
    """

    def __init__(self, busy: Callable[[], float] = time.thread_time) -> None:
        self.streams = 0
        """How many streams are open."""
        self._busy = busy
        self._wait = 0.0
        self._since = -math.inf
        self._busy_since = 0.0

    def wait(self, now: float) -> float:
        """How long a stream that wants to read waits, in seconds; 0 for not at all.

        :param now: in seconds; it only grows.
        """
        if self.streams <= FEW_STREAMS:
            return 0.0
        if now - self._since >= WINDOW:
            self._adapt(now)
        return self._wait

    def _adapt(self, now: float) -> None:
        passed, busy = now - self._since, self._busy()
        share = (busy - self._busy_since) / passed
        self._since, self._busy_since = now, busy
        if passed > MEMORY:
            self._wait = 0.0
        elif self._wait:
            wait = min(MAX_WAIT, self._wait * share / SHARE)
            self._wait = wait if wait >= FIRST_WAIT / 2 else 0.0
        elif share > SHARE:
            self._wait = FIRST_WAIT


class Pacer:
    """The waits of all streams of an event loop, with one timer, which runs while there are any.

    :param pace: how long they are.
    """

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self._waits: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no timer runs."""
        return self._timer is None

    def wait(self) -> asyncio.Future[None] | None:
        """A wait that begins now and ends when it is done; None when there is none."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        seconds = self.pace.wait(now)
        if not seconds:
            return None
        wait: asyncio.Future[None] = loop.create_future()
        self._waits.append((now + seconds, wait))
        if self._timer is None:
            self._timer = loop.call_later(TICK, self._tick, loop)
        return wait

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        waits, now = self._waits, loop.time()
        # Those that began first are first; a wait that has become shorter does not overtake.
        while waits and waits[0][0] <= now:
            wait = waits.popleft()[1]
            if not wait.done():
                wait.set_result(None)
        self._timer = loop.call_later(TICK, self._tick, loop) if waits else None


class PacedStream:
    """A stream, which takes turns with the others while it is entered."""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._wait: asyncio.Future[None] | None = None
        self._hurries = False

    def __enter__(self) -> PacedStream:
        self._pacer.pace.streams += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._pacer.pace.streams -= 1

    def wait(self) -> asyncio.Future[None] | None:
        """What it waits for before it reads on; None when it need not."""
        self._wait = None if self._hurries else self._pacer.wait()
        return self._wait

    def hurry(self) -> None:
        """Ends its wait: all is there, so there is nothing more to wait for."""
        self._hurries = True
        if self._wait is not None and not self._wait.done():
            self._wait.set_result(None)


_pacers: WeakKeyDictionary[asyncio.AbstractEventLoop, Pacer] = WeakKeyDictionary()


def pacer() -> Pacer:
    """The one of the running event loop."""
    loop = asyncio.get_running_loop()
    if (known := _pacers.get(loop)) is None:
        known = _pacers[loop] = Pacer()
    return known
