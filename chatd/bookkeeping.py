"""What storage must be told of turns, for as long as it takes: begun, alive, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from chatd import logs
from chatd.domain import TurnStatus
from chatd.errors import NotFound, StorageUnavailable
from chatd.storage import BeginTurn, BegunTurn, ExistingTurn, FinishTurn, Renewed, Storage
from chatd.watchdog import Patience

log = logging.getLogger(__name__)

BEGIN_SECONDS = 10.0
"""How long storage may take to begin a turn before the client is told to come back."""

STORE_SECONDS = 2.0
"""How long an answer waits to be stored before the client gets it all the same."""

TAKE_BACK_SECONDS = 10.0
"""How long a turn that nobody was told of is looked for: it may begin after it was given up."""

STORE_LATER_SECONDS = 60.0
"""How long storing is tried again after that."""


class Books:
    """Keeps storage's record of turns true.

    `unstored` holds the ends that storage did not take yet, by turn.

    :param lease_seconds: how long a turn outlives a process that died, unless storage knows
        sooner; renewed thrice in that time.
    """

    def __init__(self, storage: Storage, lease_seconds: float) -> None:
        self._storage = storage
        self.lease_seconds = lease_seconds
        self.unstored: dict[str, FinishTurn] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self._beginning = Patience(BEGIN_SECONDS)
        self._finishing = Patience(STORE_SECONDS)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` as a task that draining waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def begin(self, request: BeginTurn) -> BegunTurn | ExistingTurn:
        """Begins a turn. Raises `RequestError`."""
        try:
            return await self._beginning.wait(self._storage.begin_turn(request))
        except (TimeoutError, StorageUnavailable) as error:
            # It may have begun all the same, and nobody would run it.
            self.spawn(self._take_back(request.turn_id))
            if isinstance(error, StorageUnavailable):
                raise
            raise StorageUnavailable(f"begin_turn took more than {BEGIN_SECONDS} s") from None
        except NotFound:
            raise NotFound("This chatbot has no session with this id.") from None

    async def finish(self, finish: FinishTurn) -> bool:
        """Stores how a turn ended; when that takes too long it goes on behind. True when stored."""
        try:
            stored = await self._finishing.wait(self._storage.finish_turn(finish))
        except Exception as error:
            known = isinstance(error, TimeoutError | StorageUnavailable)
            told = (error or "no answer in time") if known else logs.trace(error)
            log.error("turn %s is not stored yet: %s", finish.turn_id, told)
            self.unstored[finish.turn_id] = finish
            self.spawn(self._finish_later(finish))
            return False
        if not stored:
            log.warning("turn %s was not stored: its session went on or is gone", finish.turn_id)
        return stored

    async def sweep(self) -> None:
        """Ends the turns of processes that are gone."""
        try:
            await self._storage.sweep()
        except StorageUnavailable as error:
            # It comes back by itself, and so does this.
            log.error("storage is unavailable: %s", error.detail)

    async def keep(
        self,
        running: Callable[[], Iterable[tuple[str, int]]],
        told: Callable[[Renewed], Awaitable[None]],
    ) -> None:
        """Renews leases and sweeps, for ever.

        :param running: the turns that run here, as id and run.
        :param told: called with what storage says of them.
        """
        while True:
            await asyncio.sleep(self.lease_seconds / 3)
            turns = [*running(), *((f.turn_id, f.run) for f in self.unstored.values())]
            try:
                async with asyncio.timeout(self.lease_seconds / 3):
                    renewed = Renewed()
                    if turns:
                        renewed = await self._storage.renew_turns(turns, self.lease_seconds)
                    await self._storage.sweep()
                    await told(renewed)
            except (TimeoutError, StorageUnavailable) as error:
                log.warning("leases cannot be renewed: %s", error or "no answer in time")
            except Exception:
                log.exception("storage raised what no storage should while renewing leases")

    async def _take_back(self, turn_id: str) -> None:
        """Ends a turn that began although nobody was told so."""
        finish = FinishTurn(turn_id, TurnStatus.FAILED, error_code=StorageUnavailable.code)
        finish = replace(finish, rerunnable=True)
        loop = asyncio.get_running_loop()
        end = loop.time() + TAKE_BACK_SECONDS
        for pause in _backoff(STORE_LATER_SECONDS):
            # False may mean that it begins later: what was sent is still on its way.
            with contextlib.suppress(StorageUnavailable):
                if await self._storage.finish_turn(finish) or loop.time() > end:
                    return
            await asyncio.sleep(pause)

    async def _finish_later(self, finish: FinishTurn) -> None:
        stored = False
        try:
            for pause in _backoff(STORE_LATER_SECONDS):
                await asyncio.sleep(pause)
                try:
                    async with asyncio.timeout(STORE_LATER_SECONDS / 4):
                        stored = await self._storage.finish_turn(finish)
                    break
                except Exception as error:
                    log.error("turn %s is not stored yet: %s", finish.turn_id, type(error).__name__)
        finally:
            del self.unstored[finish.turn_id]
            if stored:
                log.warning("turn %s is stored now", finish.turn_id)
            else:
                log.error("turn %s could not be stored: its reply is lost", finish.turn_id)


def _backoff(total: float, first: float = 0.25, most: float = 5.0) -> list[float]:
    """Pauses in seconds, twice as long each time, that add up to `total`."""
    pauses: list[float] = []
    pause = first
    while sum(pauses) < total:
        pauses.append(pause)
        pause = min(pause * 2, most)
    return pauses
