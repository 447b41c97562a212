"""Two answers at once: the one that begins first is taken, the other is hung up on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from chatd.provider import Event, TextDelta, ToolCallDelta

VISIBLE = (TextDelta, ToolCallDelta)
"""What a client gets to see: after that nobody else can answer."""


_hanging_up: set[asyncio.Task[None]] = set()
"""Kept until they end: the event loop alone does not hold its tasks."""


class Contender(Protocol):
    """What is told when it lost."""

    def lose(self) -> None:
        """Another is taken; this one may never end."""


C = TypeVar("C", bound=Contender)


class Racer(Generic[C]):
    """An answer that is read by a task of its own, so that more than one can be waited for.

    :param attempt: told when another is taken.
    """

    def __init__(self, attempt: C, events: AsyncGenerator[Event, None]) -> None:
        self.attempt = attempt
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.failure: BaseException | None = None
        """What it ended with, when it failed."""
        self.begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Done once something can be seen (true), or it ended before that (false)."""
        self.task = asyncio.create_task(self._read(events))

    async def _read(self, events: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    self._queue.put_nowait(event)
                    if isinstance(event, VISIBLE):
                        self._begin(True)
        except Exception as error:
            self.failure = error
        finally:
            self._begin(False)
            self._queue.put_nowait(None)

    def _begin(self, visible: bool) -> None:
        if not self.begun.done():
            self.begun.set_result(visible)

    async def events(self) -> AsyncGenerator[Event, None]:
        """All of its events from the first on. Raises what it failed with."""
        while (event := await self._queue.get()) is not None:
            yield event
        if self.failure is not None:
            raise self.failure

    def lose(self) -> None:
        """Hangs up, since another one is taken."""
        if not self.task.done():
            self.attempt.lose()
        self.cancel()

    def cancel(self) -> None:
        """Hangs up, if it goes on; what it takes to do so is not waited for."""
        if not self.task.done():
            _hanging_up.add(self.task)
            self.task.add_done_callback(_hanging_up.discard)
            self.task.cancel()


async def hung_up(seconds: float) -> int:
    """Waits that long for what was hung up on to end, and says how much of it does not."""
    if _hanging_up:
        await asyncio.wait(_hanging_up, timeout=seconds)
    return len(_hanging_up)


async def first_to_begin(racers: Sequence[Racer[C]]) -> Racer[C]:
    """The first that says something; when none does, the last one to fail."""
    waiting = {racer.begun: racer for racer in racers}
    while True:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for begun in done:
            racer = waiting.pop(begun)
            if begun.result() or not waiting:
                return racer
