"""What a chatbot may cost in a day: reserved before a turn, settled on what it cost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta

from chatd.config import LimitsConfig
from chatd.domain import Chatbot
from chatd.errors import BudgetExhausted, RateLimited, StorageUnavailable
from chatd.storage import Storage

log = logging.getLogger(__name__)

READ_SECONDS = 30.0
"""How often storage is asked again what a day has cost: other processes spend of it too."""

HELD_SECONDS = 5.0
"""When to come back while turns that run hold the rest of a budget; most turns take that long."""


@dataclass(slots=True)
class _Ledger:
    """One day of a chatbot, in USD.

    `spent` is what turns that ended cost, as storage says, and what ended here since; `settled` all
    that ended here. `running` turns hold `held`. `most` is what a turn cost at most. Of
    `guesses` turns that ended here storage knows no cost; they count as `guessed` together.
    """

    day: date
    spent: float = 0.0
    settled: float = 0.0
    held: float = 0.0
    running: int = 0
    most: float = 0.0
    guesses: int = 0
    guessed: float = 0.0
    read_at: float | None = None
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Reservation:
    """What a turn holds of its chatbot's budget. Ends once, by `settle` or `release`.

    :param reserve: what the turn counts as while neither its cost nor a guess of it is known.
    """

    def __init__(self, ledger: _Ledger, amount: float, reserve: float) -> None:
        self.reserve = reserve
        self._ledger = ledger
        self._amount = amount
        self._counted = 0.0
        self._guess: float | None = None
        ledger.held += amount
        ledger.running += 1

    def settle(self, cost_usd: float | None, *, guess: float | None = None) -> None:
        """Counts what the turn cost; when that is unknown the guess, and without one the reserve."""
        self.release()
        if cost_usd is None and guess is not None:
            self._guess = guess
            self._ledger.guesses += 1
            self._ledger.guessed += guess
            cost_usd = guess
        self._count(self.reserve if cost_usd is None else cost_usd)

    def correct(self, cost_usd: float) -> None:
        """Counts what the turn cost, which storage knows by now, in place of what it counted as."""
        if self._guess is not None:
            self._ledger.guesses -= 1
            self._ledger.guessed -= self._guess
            self._guess = None
        self._count(cost_usd)

    def _count(self, cost: float) -> None:
        more = cost - self._counted
        self._counted = cost
        self._ledger.spent += more
        self._ledger.settled += more
        self._ledger.most = max(self._ledger.most, cost)

    def release(self) -> None:
        """Gives it back: the turn did not begin."""
        self._ledger.held -= self._amount
        self._ledger.running -= 1


class Budgets:
    """Keeps each chatbot within its budget of the day, which begins at midnight UTC.

    A turn begins when what was spent, what running turns hold and its own reserve fit the budget;
    or when nothing else runs and something is left. The reserve is what is set, or what the
    dearest turn of the day cost when that was more. So a budget is overrun by no more than one turn,
    if no turn costs more than its reserve.

    :param now: the time, in UTC; by default the machine's.
    """

    def __init__(
        self, storage: Storage, defaults: LimitsConfig, *, now: Callable[[], datetime] | None = None
    ) -> None:
        self._now = now or _now
        self._storage = storage
        self.defaults = defaults
        """For chatbots that set nothing else."""
        self._ledgers: dict[str, _Ledger] = {}

    async def reserve(self, chatbot: Chatbot) -> Reservation | None:
        """Holds what a turn may cost; None for a chatbot without a budget.

        Raises `BudgetExhausted`; `RateLimited` while running turns hold what is left; or
        `StorageUnavailable` when it cannot be learned what the day has cost so far.
        """
        settings = chatbot.settings
        budget = settings.daily_budget_usd
        if budget is None:
            budget = self.defaults.daily_budget_usd
        if isinstance(budget, str):
            return None
        reserve = settings.turn_reserve_usd
        if reserve is None:
            reserve = self.defaults.turn_reserve_usd
        now = self._now()
        ledger = self._ledger(chatbot.id, now.date())
        await self._learn(chatbot.id, ledger, reserve)
        if ledger.spent >= budget:
            raise BudgetExhausted(retry_after=_until_midnight(now))
        amount = max(reserve, ledger.most)
        if ledger.running and ledger.spent + ledger.held + amount > budget:
            # Not exhausted: it will do to come back when one of them has ended.
            raise RateLimited(
                "This chatbot gives as many answers at once as it may just now. "
                "Wait as long as Retry-After says.",
                retry_after=HELD_SECONDS,
            )
        return Reservation(ledger, amount, reserve)

    def _ledger(self, chatbot_id: str, day: date) -> _Ledger:
        ledger = self._ledgers.get(chatbot_id)
        if ledger is None or ledger.day != day:
            # Turns that began yesterday settle with yesterday's, which they keep alive.
            ledger = self._ledgers[chatbot_id] = _Ledger(day)
        return ledger

    async def _learn(self, chatbot_id: str, ledger: _Ledger, reserve: float) -> None:
        """Reads what the day has cost, when that was not read lately. Raises as `reserve` does."""
        now = asyncio.get_running_loop().time()
        if ledger.read_at is None:
            async with ledger.reading:
                if ledger.read_at is None:
                    await self._read(chatbot_id, ledger, reserve)
                    ledger.read_at = now
        elif now - ledger.read_at > READ_SECONDS:
            ledger.read_at = now
            try:
                await self._read(chatbot_id, ledger, reserve)
            except StorageUnavailable as error:
                log.warning("what chatbot %s spent is not read again: %s", chatbot_id, error.detail)

    async def _read(self, chatbot_id: str, ledger: _Ledger, reserve: float) -> None:
        settled = ledger.settled
        midnight = datetime.combine(ledger.day, time(), UTC)
        totals = await self._storage.usage_totals(by="day", chatbot_id=chatbot_id, since=midnight)
        spent = 0.0
        for total in totals:
            if total.key == ledger.day.isoformat():
                known = total.cost_usd or 0.0
                unknown = max(0, total.unknown_cost - ledger.guesses)
                spent += known + unknown * reserve + ledger.guessed
                ledger.most = max(ledger.most, known / max(1, total.turns))
        # What ended meanwhile may be in the sum already; counted twice it errs on the safe side,
        # until it is read again.
        ledger.spent = spent + ledger.settled - settled


def _now() -> datetime:
    return datetime.now(UTC)


def _until_midnight(now: datetime) -> float:
    """The seconds that are left of the day, in UTC."""
    tomorrow = datetime.combine(now.date() + timedelta(days=1), time(), UTC)
    return (tomorrow - now).total_seconds()
