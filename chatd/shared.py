"""What processes share beside storage: how often was asked, what is spent, what is said just now.

All of it may be lost without harm to what is stored: chatd then goes on with what it knows itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from chatd.errors import ChatdError


class SharedUnavailable(ChatdError):
    """What is shared cannot be asked just now; the text is for the operator's log."""


@dataclass(frozen=True, slots=True)
class Window:
    """A limit under a key: in any `seconds`, no more than `count` are taken."""

    key: str
    count: int
    seconds: int


@dataclass(frozen=True, slots=True)
class Left:
    """How many may still be taken of a window, and in how many seconds one comes back."""

    left: int
    reset: float


@dataclass(slots=True)
class Wish:
    """What a turn wants to hold of an account, in USD.

    :param hold: a name of its own for what is held.
    :param budget: what may be spent at most.
    :param reserve: what the turn may cost; it holds what the dearest turn cost when that was more.
    :param seconds: how long it is held unless that is said again.
    """

    hold: str
    budget: float
    reserve: float
    seconds: float


@dataclass(slots=True)
class Spending:
    """What a turn that ended adds to its account, or takes back of it, in USD.

    :param guesses: of how many turns, 1, 0 or -1, the cost was guessed, as `guessed`.
    :param most: what the turn cost, for what later ones hold.
    """

    cost: float
    guesses: int = 0
    guessed: float = 0.0
    most: float = 0.0


@dataclass(slots=True)
class Account:
    """What is known of what a chatbot spends in a day, in USD.

    :param spent: None while nobody told what storage knows of the day.
    :param settled: all that turns cost which ended since the account began.
    :param held: what `running` turns hold.
    :param granted: what was asked for is held now, as `amount`.
    """

    spent: float | None
    settled: float = 0.0
    held: float = 0.0
    running: int = 0
    most: float = 0.0
    guesses: int = 0
    guessed: float = 0.0
    granted: bool = False
    amount: float = 0.0


class Shared(Protocol):
    """State that processes share. Each method is atomic, whoever else calls one.

    Each may raise `SharedUnavailable`, or anything else, which counts the same; chatd gives each a
    short time. What is written is forgotten once it cannot matter any more.
    """

    async def take(self, group: str, hold: str, windows: Sequence[Window]) -> Sequence[Left]:
        """Takes one of each window, unless one of them has none left: then of none.

        Returns what was left before. Nothing was taken when one of them is 0.

        :param group: whatever is asked for together has the same, so that it can be kept in one place.
        :param hold: a name of its own for what is taken.
        """

    async def give_back(self, group: str, hold: str, windows: Sequence[Window]) -> None:
        """Gives back what was taken under this name. A second call does nothing."""

    async def reserve(self, account: str, wish: Wish) -> Account:
        """Holds what a turn may cost, if it fits, and says how the account stands.

        It fits when something is left of the budget, and nothing else runs or what is spent and
        held and its own amount are within it. Nothing is granted while `spent` is None.
        """

    async def account(self, account: str) -> Account:
        """How the account stands."""

    async def learn(self, account: str, spent: float, *, settled: float, most: float) -> None:
        """Sets what is spent to what storage says, and what was settled since it was asked.

        :param settled: what `Account.settled` was before storage was asked.
        :param most: what a turn cost at most, if that is more than is known.
        """

    async def hold(self, account: str, holds: Mapping[str, float], seconds: float) -> None:
        """Says again of turns that run what they hold, for so many seconds from now."""

    async def settle(self, account: str, hold: str, spending: Spending | None) -> None:
        """Gives back what a turn held, and adds what it spent. What is not held any more is not."""

    async def publish(self, channel: str, message: bytes) -> None:
        """Tells all who listen on a channel now. What nobody hears is lost."""

    def listen(self, channels: Sequence[str]) -> AsyncGenerator[bytes | None, None]:
        """What is published on the channels from the first item on, which is None.

        It raises when a message may have been missed.
        """

    async def check(self) -> None:
        """Raises `SharedUnavailable`, with what to do, while it cannot be written to."""

    async def close(self) -> None:
        """Ends what is open. Nothing is asked after that."""
