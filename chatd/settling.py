"""What an answer took that was broken off: asked of its provider afterwards, where that can say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from chatd import logs
from chatd.domain import Usage
from chatd.errors import ProviderError, StorageUnavailable
from chatd.provider import UsageReport, checked
from chatd.routing import Attempt, Trail
from chatd.storage import Storage

log = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds before each time that a provider is asked; a minute in all."""

ASK_SECONDS = 10.0
"""How long a provider may take to say it."""


def unsettled(trail: Trail) -> bool:
    """Whether a provider can say more of what a turn took."""
    return any(_is_open(attempt) for attempt in trail.attempts)


async def settle(
    storage: Storage,
    turn_id: str,
    run: int,
    trail: Trail,
    told: Callable[[float], None] | None = None,
) -> None:
    """Asks for what is not known of a turn that ended, and stores it; for a minute at most.

    Once it is stored `told` is called with the cost in USD, if that is known.
    What could not be learned stays unknown. A process that ends meanwhile does not learn it.
    """
    learned = False
    for pause in PAUSES:
        await asyncio.sleep(pause)
        for attempt in trail.attempts:
            if _is_open(attempt) and (usage := await _ask(attempt)) is not None:
                attempt.usage = attempt.priced(usage)
                learned = True
        if learned and (usage := trail.usage) is not None:
            try:
                learned = not await storage.settle_turn(turn_id, run, usage)
                if told is not None and usage.cost_usd is not None and not learned:
                    told(usage.cost_usd)
            except StorageUnavailable as error:
                log.warning("what turn %s took is not stored yet: %s", turn_id, error.detail)
        if not (learned or unsettled(trail)):
            return
    log.warning("what turn %s took could not be learned in whole", turn_id)


def _is_open(attempt: Attempt) -> bool:
    return attempt.usage is None and attempt.generation is not None


async def _ask(attempt: Attempt) -> Usage | None:
    assert attempt.generation is not None
    try:
        async with asyncio.timeout(ASK_SECONDS):
            usage = await attempt.generation()
        if usage is not None:
            checked(UsageReport(usage))
        return usage
    except (TimeoutError, ProviderError) as error:
        log.info("provider %s does not say what it took: %s", attempt.provider, error)
    except Exception as error:
        log.error("provider %s raised %s", attempt.provider, logs.trace(error))
    return None
