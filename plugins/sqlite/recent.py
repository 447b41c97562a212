"""The sessions that were talked to last, as the file has them."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, starmap
from typing import Any

import chatd

MAX_WEIGHT = 32 * 2**20
"""The most that is kept of all sessions, in bytes: some 3,000 with 20 messages of 300 letters."""

SESSION_WEIGHT = 1400
"""The bytes that a session takes beside its messages."""

MESSAGE_WEIGHT = 200
"""The bytes that a message takes beside its text."""

Said = tuple[Any, str]
"""A message's role and content."""


class Whole:
    """The messages of a turn, or one that belongs to none: history holds them all or none of them.

    `cost` is what they take of a context budget, in characters, `weight` what of memory, in bytes.
    """

    __slots__ = ("cost", "messages", "weight")

    def __init__(self, messages: Sequence[Said]) -> None:
        self.messages = messages
        chars, weight = 0, 0
        for _, content in messages:
            chars += len(content)
            weight += sys.getsizeof(content)
            if not content.isascii():
                # A text keeps what it is in UTF-8, once it was asked for.
                weight += len(content.encode("utf-8", "surrogatepass"))
        self.cost = chars + len(messages) * chatd.MESSAGE_OVERHEAD_CHARS
        self.weight = weight + len(messages) * MESSAGE_WEIGHT


def messages_of(wholes: Iterable[Whole]) -> list[chatd.Message]:
    """The messages, each made anew: nobody shares one with what is kept."""
    return list(starmap(chatd.Message, chain.from_iterable(whole.messages for whole in wholes)))


@dataclass(slots=True)
class RecentSession:
    """A session, its newest turn and the end of the history before that.

    `seq` is the newest turn's; while it runs, `running` is its id, `asked` what the user said in it
    and `budget` how much history it was given. `wholes` are oldest first; `is_all` says that there
    is no history before them.
    """

    id: str
    chatbot_id: str
    user_id: str | None
    seq: int = 0
    running: str | None = None
    asked: Sequence[Said] = ()
    budget: int = 0
    wholes: deque[Whole] = field(default_factory=deque)
    is_all: bool = False
    cost: int = 0
    weight: int = SESSION_WEIGHT

    def history(self, budget: int) -> tuple[list[chatd.Message], bool] | None:
        """The newest whole turns that fit, and whether older ones were left out.

        None when what is kept does not tell.
        """
        fitting: list[Whole] = []
        for whole in reversed(self.wholes):
            budget -= whole.cost
            if budget < 0:
                break
            fitting.append(whole)
        else:
            if not self.is_all:
                return None
        fitting.reverse()
        return messages_of(fitting), budget < 0


class Recent:
    """What the file says of the sessions that were talked to last, so that it is not read again.

    It holds for the transaction that looks at it, as long as `clear` is called when a transaction
    was undone and when another connection changed the file, and `forget` or `clear` when something
    changes messages or turns that is not told here.
    """

    def __init__(self) -> None:
        self.max_weight = MAX_WEIGHT
        self._sessions: OrderedDict[str, RecentSession] = OrderedDict()
        self._running: dict[str, RecentSession] = {}
        self.weight = 0

    def clear(self) -> None:
        """Forgets everything."""
        self._sessions.clear()
        self._running.clear()
        self.weight = 0

    def forget(self, session_id: str) -> None:
        """Forgets a session."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self.weight -= session.weight
            if session.running is not None:
                del self._running[session.running]

    def resting(self, session_id: str, chatbot_id: str) -> RecentSession | None:
        """A session of this chatbot in which no turn runs, if that is known."""
        session = self._sessions.get(session_id)
        if session is None or session.chatbot_id != chatbot_id or session.running is not None:
            return None
        return session

    def running(self, turn_id: str) -> RecentSession | None:
        """The session in which this turn runs for the first time, if that is known."""
        return self._running.get(turn_id)

    def read(
        self,
        request: chatd.BeginTurn,
        seq: int,
        user_id: str | None,
        wholes: Sequence[Whole],
        *,
        is_all: bool,
    ) -> None:
        """The turn `seq` began, and the history before it was read from the file, newest first."""
        session = RecentSession(request.session_id, request.chatbot_id, user_id)
        session.wholes.extendleft(wholes)
        session.is_all = is_all
        session.cost = sum(whole.cost for whole in wholes)
        session.weight += sum(whole.weight for whole in wholes)
        self.forget(session.id)
        self._sessions[session.id] = session
        self.weight += session.weight
        self.begun(request, seq, session)
        self._evict()

    def begun(self, request: chatd.BeginTurn, seq: int, session: RecentSession) -> None:
        """The turn `seq` of a session that is known began."""
        session.seq = seq
        session.running = request.turn_id
        session.asked = [(message.role, message.content) for message in request.messages]
        session.budget = request.history_chars
        self._running[request.turn_id] = session
        self._sessions.move_to_end(session.id)

    def ended(self, session: RecentSession, reply: str | None) -> None:
        """The turn that runs in a session ended, and is history."""
        assert session.running is not None
        del self._running[session.running]
        session.running = None
        said = [*session.asked, ("assistant", reply)] if reply else session.asked
        if not said:
            return
        whole = Whole(said)
        session.wholes.append(whole)
        session.cost += whole.cost
        weight = whole.weight
        # Twice as much as was asked for, so that it seldom has to be read again.
        while session.cost - session.wholes[0].cost > 2 * session.budget:
            oldest = session.wholes.popleft()
            session.cost -= oldest.cost
            weight -= oldest.weight
            session.is_all = False
        session.weight += weight
        self.weight += weight
        self._evict()

    def _evict(self) -> None:
        while self.weight > self.max_weight:
            self.forget(next(iter(self._sessions)))
