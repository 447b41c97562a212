"""Erases sessions that their chatbot's `retention_days` say are too old."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from chatd.domain import Chatbot
from chatd.errors import StorageUnavailable
from chatd.storage import Storage

log = logging.getLogger(__name__)

BATCH = 100
"""Sessions that are looked at in one call."""

EVERY_SECONDS = 3600.0
"""How often a server looks, give or take a tenth, so that many do not look at the same moment."""

CALL_SECONDS = 30.0
"""How long storage may take for a batch before the job is put off."""

MOST_REST_SECONDS = 1.0
"""The longest pause between two batches; it is as long as the last batch took."""

Progress = Callable[[int], None]


async def enforce(
    storage: Storage, chatbots: Sequence[Chatbot], progress: Progress | None = None
) -> Mapping[str, int]:
    """Erases what is too old of these chatbots; says how many sessions, by chatbot.

    It takes turns with whoever uses the storage: after each batch it rests as long as that took.
    Broken off, it goes on when it is repeated, and several at once share the work. Raises
    `StorageUnavailable`.

    :param progress: called after each batch with how many are erased so far.
    """
    erased: dict[str, int] = {}
    for chatbot in chatbots:
        if (days := chatbot.settings.retention_days) is not None:
            erased[chatbot.id] = 0
            async for batch in _erase(storage, chatbot, days):
                erased[chatbot.id] += batch
                if progress:
                    progress(sum(erased.values()))
    if any(erased.values()):
        await storage.reclaim()
    return erased


async def _erase(storage: Storage, chatbot: Chatbot, days: int) -> AsyncIterator[int]:
    """Erases a chatbot's idle sessions, batch by batch; says how many in each."""
    before = datetime.now(UTC) - timedelta(days=days)
    loop = asyncio.get_running_loop()
    after: str | None = None
    while True:
        began = loop.time()
        async with asyncio.timeout(CALL_SECONDS):
            done = await storage.erase_idle_sessions(chatbot.id, before, limit=BATCH, after=after)
        took = loop.time() - began
        yield done.sessions
        if (after := done.after) is None:
            return
        await asyncio.sleep(min(took, MOST_REST_SECONDS))


class RetentionJob:
    """Enforces retention at its start and then every hour, behind everything else.

    :param storage: gives the one that is in use.
    """

    def __init__(self, storage: Callable[[], Storage]) -> None:
        self._storage = storage
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begins; returns at once."""
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Ends it, between two batches or within one, which storage then undoes or completes."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _keep(self) -> None:
        while True:
            await self._once()
            await asyncio.sleep(EVERY_SECONDS * random.uniform(0.9, 1.1))

    async def _once(self) -> None:
        try:
            storage = self._storage()
            chatbots = await storage.list_chatbots()
            erased = await enforce(storage, chatbots)
        except (TimeoutError, StorageUnavailable) as error:
            log.warning("retention is put off: %s", error or "no answer in time")
            return
        except Exception:
            log.exception("storage raised what no storage should while erasing old sessions")
            return
        days = {chatbot.id: chatbot.settings.retention_days for chatbot in chatbots}
        for chatbot_id, count in erased.items():
            if count:
                log.info(
                    "retention erased %d sessions of chatbot %s in which nothing happened for %d days",
                    count,
                    chatbot_id,
                    days[chatbot_id],
                )
