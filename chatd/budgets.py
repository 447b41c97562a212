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
from chatd.shared import Account, Spending, Wish
from chatd.sharing import HOLD_SECONDS, Sharing
from chatd.storage import Storage

log = logging.getLogger(__name__)

READ_SECONDS = 30.0
"""How often storage is asked again what a day has cost: other processes spend of it too."""

TRIES = 3
"""How often it is learned anew what was spent when that was forgotten at once."""

HELD_SECONDS = 5.0
"""When to come back while turns that run hold the rest of a budget; most turns take that long."""


@dataclass(slots=True)
class _Book:
    """One day of a chatbot, as this process knows it: its account, and what turns hold of it here.

    `read_at` is when storage was asked what the day has cost, and `epoch` where it was told then.
    """

    account: str
    day: date
    epoch: int = -1
    read_at: float | None = None
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    holds: dict[str, float] = field(default_factory=dict)


class Reservation:
    """What a turn holds of its chatbot's budget. Ends once, by `settle` or `release`.

    :param reserve: what the turn counts as while neither its cost nor a guess of it is known.
    """

    def __init__(self, sharing: Sharing, book: _Book, hold: str, reserve: float) -> None:
        self.reserve = reserve
        self._sharing = sharing
        self._book = book
        self._hold = hold
        self._counted = 0.0
        self._guess: float | None = None

    def settle(self, cost_usd: float | None, *, guess: float | None = None) -> None:
        """Counts what the turn cost; when that is unknown the guess, and without one the reserve."""
        if cost_usd is None and guess is not None:
            self._guess = guess
            self._count(guess, guesses=1, guessed=guess)
        else:
            self._count(self.reserve if cost_usd is None else cost_usd)

    def correct(self, cost_usd: float) -> None:
        """Counts what the turn cost, which storage knows by now, in place of what it counted as."""
        guessed, self._guess = self._guess, None
        if guessed is None:
            self._count(cost_usd)
        else:
            self._count(cost_usd, guesses=-1, guessed=-guessed)

    def _count(self, cost: float, *, guesses: int = 0, guessed: float = 0.0) -> None:
        self._end(Spending(cost - self._counted, guesses, guessed, most=cost))
        self._counted = cost

    def release(self) -> None:
        """Gives it back: the turn did not begin."""
        self._end(None)

    def _end(self, spending: Spending | None) -> None:
        self._book.holds.pop(self._hold, None)
        self._sharing.settle(self._book.account, self._hold, spending)


class Budgets:
    """Keeps each chatbot within its budget of the day, which begins at midnight UTC.

    A turn begins when what was spent, what running turns hold and its own reserve fit the budget;
    or when nothing else runs and something is left. The reserve is what is set, or what the
    dearest turn of the day cost when that was more. So a budget is overrun by no more than one turn,
    if no turn costs more than its reserve; over all processes that share, else in each.

    :param now: the time, in UTC; by default the machine's.
    """

    def __init__(
        self,
        storage: Storage,
        defaults: LimitsConfig,
        sharing: Sharing | None = None,
        *,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        self._now = now or _now
        self._storage = storage
        self.defaults = defaults
        """For chatbots that set nothing else."""
        self._sharing = sharing or Sharing()
        self._books: dict[tuple[str, date], _Book] = {}

    async def reserve(self, chatbot: Chatbot, turn_id: str) -> Reservation | None:
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
        book = self._book(chatbot.id, now.date())
        wish = Wish(turn_id, budget, reserve, self._sharing.hold_seconds)
        account = await self._asked(chatbot.id, book, wish)
        if account.granted:
            book.holds[wish.hold] = account.amount
            return Reservation(self._sharing, book, wish.hold, reserve)
        if account.spent is not None and account.spent >= budget:
            raise BudgetExhausted(retry_after=_until_midnight(now))
        # Not exhausted: it will do to come back when one of them has ended.
        raise RateLimited(
            "This chatbot gives as many answers at once as it may just now. "
            "Wait as long as Retry-After says.",
            retry_after=HELD_SECONDS,
        )

    async def spent(self, chatbot_id: str) -> float:
        """What a chatbot has spent today, as far as it is known, in USD."""
        account = await self._sharing.account(_account(chatbot_id, self._now().date()))
        return account.spent or 0.0

    async def keep(self) -> None:
        """Says of running turns that they still hold what they hold, for ever."""
        while True:
            await asyncio.sleep(HOLD_SECONDS / 3)
            for book in tuple(self._books.values()):
                if book.holds:
                    await self._sharing.hold(book.account, book.holds)

    async def _asked(self, chatbot_id: str, book: _Book, wish: Wish) -> Account:
        """What comes of a wish. Raises `StorageUnavailable`, as `reserve` does."""
        account = Account(None)
        for _ in range(TRIES):
            if self._is_old(book):
                await self._learn(chatbot_id, book, wish.reserve)
            account = await self._sharing.reserve(book.account, wish)
            if account.spent is not None:
                break
            # The place where accounts are lost what it knew, or is another one since.
            book.read_at = None
        return account

    def _book(self, chatbot_id: str, day: date) -> _Book:
        book = self._books.get((chatbot_id, day))
        if book is None:
            # Turns that began yesterday settle with yesterday's.
            over = [name for name, old in self._books.items() if old.day < day and not old.holds]
            for name in over:
                del self._books[name]
            book = self._books[chatbot_id, day] = _Book(_account(chatbot_id, day), day)
        return book

    def _is_old(self, book: _Book) -> bool:
        """Whether what the day has cost was not read lately."""
        if book.read_at is None or book.epoch != self._sharing.epoch:
            return True
        return asyncio.get_running_loop().time() - book.read_at > READ_SECONDS

    async def _learn(self, chatbot_id: str, book: _Book, reserve: float) -> None:
        """Reads what the day has cost, once for all who ask meanwhile. Raises as `reserve` does."""
        now = asyncio.get_running_loop().time()
        if book.read_at is None or book.epoch != self._sharing.epoch:
            async with book.reading:
                if book.read_at is None or book.epoch != self._sharing.epoch:
                    await self._read(chatbot_id, book, reserve)
                    book.read_at = now
        elif now - book.read_at > READ_SECONDS:
            book.read_at = now
            try:
                await self._read(chatbot_id, book, reserve)
            except StorageUnavailable as error:
                log.warning("what chatbot %s spent is not read again: %s", chatbot_id, error.detail)

    async def _read(self, chatbot_id: str, book: _Book, reserve: float) -> None:
        account = await self._sharing.account(book.account)
        moved, book.epoch = book.epoch != self._sharing.epoch, self._sharing.epoch
        midnight = datetime.combine(book.day, time(), UTC)
        totals = await self._storage.usage_totals(by="day", chatbot_id=chatbot_id, since=midnight)
        spent = most = 0.0
        for total in totals:
            if total.key == book.day.isoformat():
                known = total.cost_usd or 0.0
                unknown = max(0, total.unknown_cost - account.guesses)
                spent += known + unknown * reserve + account.guessed
                most = max(most, known / max(1, total.turns))
        # What ended meanwhile may be in the sum already; counted twice it errs on the safe side,
        # until it is read again.
        settled, epoch = account.settled, book.epoch
        await self._sharing.learn(book.account, spent, settled=settled, most=most, epoch=epoch)
        if (moved or account.spent is None) and book.holds:
            # It may not know what turns hold of it that run already.
            await self._sharing.hold(book.account, book.holds)


def _account(chatbot_id: str, day: date) -> str:
    return f"{chatbot_id}/{day.isoformat()}"


def _now() -> datetime:
    return datetime.now(UTC)


def _until_midnight(now: datetime) -> float:
    """The seconds that are left of the day, in UTC."""
    tomorrow = datetime.combine(now.date() + timedelta(days=1), time(), UTC)
    return (tomorrow - now).total_seconds()
