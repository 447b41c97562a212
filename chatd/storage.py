"""The contract of a storage: few, whole operations, each atomic and each one round trip.

A turn costs two of them, `begin_turn` and `finish_turn`. `chatd.testing.StorageConformance`
holds an implementation to every sentence here. What is made for each turn is not frozen, at a fifth of
the cost: nobody changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from chatd.domain import Chatbot, Message, Session, StoredMessage, TurnStatus, Usage

Rating = Literal["up", "down"]
UsageBy = Literal["day", "model", "side"]


@dataclass(slots=True, unsafe_hash=True)
class BeginTurn:
    """What a turn starts with.

    `history_chars` is the budget for history: the sum of `Message.cost_chars` over what comes
    back. `request_hash` is a digest of the request's body, `lease_seconds` how long the turn
    counts as running without a `renew_turns`.
    """

    turn_id: str
    session_id: str
    chatbot_id: str
    messages: Sequence[Message]
    history_chars: int
    lease_seconds: float
    label: str | None = None
    idempotency_key: str | None = None
    request_hash: bytes | None = None


@dataclass(slots=True, unsafe_hash=True)
class BegunTurn:
    """The turn runs. Its id is the request's, or that of the earlier turn it runs again.

    `history` is oldest first and holds whole turns only; `history_truncated` says that older
    ones were left out for the budget. `user_id` is the session's. `run` grows each time the turn
    runs again, and fences off who ran it before.
    """

    turn_id: str
    history: Sequence[Message]
    history_truncated: bool
    user_id: str | None = None
    run: int = 1


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A turn as it is stored. `reply` is what was said, in whole or up to where it ended.

    `side` is what splitting the traffic chose for it, like `main/openai/gpt-5`; None when nothing
    was split.
    """

    id: str
    session_id: str
    chatbot_id: str
    status: TurnStatus
    label: str | None = None
    reply: str | None = None
    model: str | None = None
    provider: str | None = None
    finish_reason: str | None = None
    error_code: str | None = None
    usage: Usage = Usage()
    attempts: Sequence[Mapping[str, Any]] = ()
    rating: Rating | None = None
    comment: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    history_truncated: bool = False
    run: int = 1
    side: str | None = None


@dataclass(frozen=True, slots=True)
class ExistingTurn:
    """This idempotency key belongs to this turn: follow it while it runs, else replay it."""

    turn: TurnRecord


@dataclass(slots=True, unsafe_hash=True)
class FinishTurn:
    """How a turn ended. `status` is any but `running`; an empty `reply` stores no message.

    `run` is what `BegunTurn` said, and `side` what splitting the traffic chose.

    `rerunnable` says that no model was reached, so that the same idempotency key may run it
    again.
    """

    turn_id: str
    status: TurnStatus
    reply: str | None = None
    model: str | None = None
    provider: str | None = None
    finish_reason: str | None = None
    error_code: str | None = None
    usage: Usage = Usage()
    attempts: Sequence[Mapping[str, Any]] = ()
    rerunnable: bool = False
    run: int = 1
    history_truncated: bool = False
    side: str | None = None


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """What a chatbot's turns took, of one day, model or side: `key` says of which.

    A day is that of a turn's start in UTC, like `2026-01-31`; a model the one that answered. `turns`
    are those that ended, however they did. Tokens and cost are the sum of what is known of them,
    and None when nothing is. `unknown_cost` are the turns that may have cost something beside:
    they have no cost, and are not `rerunnable`, for such a turn reached no model.
    """

    chatbot_id: str
    key: str | None
    turns: int = 0
    completed: int = 0
    failed: int = 0
    stopped: int = 0
    interrupted: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost_usd: float | None = None
    unknown_cost: int = 0
    rated_up: int = 0
    rated_down: int = 0


@dataclass(frozen=True, slots=True)
class Erased:
    """What came of a bounded erasure: so many sessions, and the place from which to go on.

    `after` is the storage's own word, and None when nothing is left to look at.
    """

    sessions: int
    after: str | None = None


@dataclass(frozen=True, slots=True)
class Renewed:
    """What renewing leases told: turns that run no more or elsewhere, and turns to stop."""

    lost: frozenset[str] = frozenset()
    stopping: frozenset[str] = frozenset()


PART_CHARS = 2**21
"""About how much of a session moves at once: the sum of what its messages take."""

PART_MESSAGE_CHARS = 256
"""What a message takes of a part beside its text."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a session holds, counted. Two storages whose tallies are equal hold the same of it.

    `chars` are code points, of messages and of comments; `ended` are turns that do not run, and
    `priced` those whose cost is known.
    """

    messages: int = 0
    chars: int = 0
    turns: int = 0
    ended: int = 0
    rated_up: int = 0
    rated_down: int = 0
    priced: int = 0


@dataclass(frozen=True, slots=True)
class ExportedTurn:
    """All that a storage knows of a turn.

    `turn.reply` is left out: `reply_id` is the id, in the storage it came from, of the message
    that is the reply. `seq` counts the turns of a session.
    """

    turn: TurnRecord
    seq: int
    rerunnable: bool = False
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    reply_id: int | None = None


@dataclass(frozen=True, slots=True)
class SessionPart:
    """A session's messages from a place on, counted from 0, and the turns that own them.

    A turn that is split over two parts is in both. `more` says that messages follow.
    """

    session: Session
    place: int
    messages: Sequence[StoredMessage]
    turns: Sequence[ExportedTurn]
    more: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a storage, and the exact thing to do about it."""

    problem: str
    cure: str


@dataclass(frozen=True, slots=True)
class MessagePage:
    """Messages in the order they were said, the newest page first: pass `data[0].id` as `before`."""

    data: Sequence[StoredMessage]
    has_more: bool


class Storage(Protocol):
    """Where chatbots, sessions, messages and turns live.

    Methods raise `StorageUnavailable` when the storage cannot be asked in time, and nothing is
    half done then. Ids are canonical UUIDs. An id that does not exist, and one that belongs to
    another chatbot, are the same: `None`, `False` or `NotFound`. Every method may be called from
    many tasks at once, and all but `begin_turn` may be repeated without harm;
    `begin_turn` may be repeated with the same `turn_id`.
    """

    async def close(self) -> None:
        """Ends what was begun and lets go of everything. Called once, last."""

    async def check(self) -> None:
        """Returns when storage can be read and written; raises `StorageUnavailable` else."""

    async def diagnose(self) -> Sequence[Finding]:
        """What is wrong with the database, worst first; empty when nothing is.

        A storage that cannot be asked is a finding too, not an exception.
        """

    async def add_chatbot(self, chatbot: Chatbot) -> None:
        """Stores a new chatbot. Raises `ConflictError` when its id or key is taken.

        `created_at` and `updated_at` are kept where they are given; else they are now.
        """

    async def get_chatbot(self, chatbot_id: str) -> Chatbot | None:
        """The chatbot with this id."""

    async def get_chatbot_by_key(self, api_key_hash: bytes) -> Chatbot | None:
        """The chatbot whose API key has this SHA-256 digest."""

    async def list_chatbots(self) -> Sequence[Chatbot]:
        """All chatbots, oldest first."""

    async def update_chatbot(self, chatbot: Chatbot) -> bool:
        """Replaces name, model and settings, and not the key; False when there is no such chatbot."""

    async def set_api_key(self, chatbot_id: str, api_key_hash: bytes) -> bool:
        """Replaces the key; False when there is no such chatbot.

        Raises `ConflictError` when the key is another chatbot's.
        """

    async def remove_chatbot(self, chatbot_id: str) -> bool:
        """Erases a chatbot with its sessions, messages and turns; False when there was none."""

    async def allowed_origins(self) -> frozenset[str]:
        """Every origin that some chatbot allows, for the preflights that name no chatbot."""

    async def create_session(self, session: Session) -> None:
        """Stores a new session. Raises `NotFound` when its chatbot does not exist."""

    async def get_session(self, session_id: str) -> Session | None:
        """The session with this id."""

    async def delete_session(self, session_id: str, chatbot_id: str) -> bool:
        """Erases a session with its messages and turns; False when there was none.

        What its turns took stays in `usage_totals`, without a word that was said and without the
        ids of turns, session and user. A turn that runs counts there as interrupted, with unknown
        cost.
        """

    async def erase_idle_sessions(
        self, chatbot_id: str, before: datetime, *, limit: int, after: str | None = None
    ) -> Erased:
        """Erases sessions of a chatbot in which nothing happened at `before` or later.

        What happens in a session is its creation, its messages, and turns that begin and end. A
        session with a running turn is never erased. Each is erased as by `delete_session`: what
        its turns took stays in `usage_totals`.

        One call looks at `limit` sessions at most, the oldest first, and may look at fewer, so that
        others do not wait for it. `after` of what it returns, given to the next call, goes on from
        there. Several that call it at once, in any number of processes, share the work: a session
        is counted by the one that erased it.
        """

    async def reclaim(self) -> None:
        """Gives the space of what was erased back to the system, in steps that let others work.

        Afterwards the storage's own files hold no trace of it either. A database that sees to its
        space by itself has nothing to do here.
        """

    async def list_messages(
        self, session_id: str, chatbot_id: str, *, limit: int, before: int | None = None
    ) -> MessagePage:
        """The newest `limit` messages whose id is below `before`. Raises `NotFound`."""

    async def begin_turn(self, request: BeginTurn) -> BegunTurn | ExistingTurn:
        """Starts a turn: checks, stores and reads, all in one.

        Decided in this order:

        1. no such session of this chatbot: `NotFound`;
        2. a running turn whose lease ran out becomes `interrupted`;
        3. the session has a turn with this `turn_id`: while it runs it is returned as if begun
           now, after its end as `ExistingTurn`; nothing is stored twice;
        4. the idempotency key is known: with another body `IdempotencyKeyReused`; else the
           turn is returned as `ExistingTurn`. But a turn that ended `rerunnable`, or was
           interrupted before a word of reply was stored, has nothing to replay: when it is the
           session's newest turn and the body is the same, it runs again under its own id with
           the messages that are stored; otherwise the key is taken from it and begins a new
           turn;
        5. another turn runs: `TurnInProgress`, with its id;
        6. else the messages and the turn are stored and the history is returned.

        History is made of messages of completed, stopped and interrupted turns, and of those
        that belong to no turn; never of failed turns.
        """

    async def finish_turn(self, result: FinishTurn) -> bool:
        """Ends a running turn and stores its reply; True when it is stored.

        Repeated, it changes nothing and says True. A turn that was interrupted meanwhile (its
        lease ran out) is still finished as long as no newer turn began in its session; after
        that, when the turn runs again (a newer `run`), and when the session is gone, nothing is
        stored and the answer is False.
        """

    async def settle_turn(self, turn_id: str, run: int, usage: Usage) -> bool:
        """Replaces what a turn took, once that is known better than when it ended.

        Nothing else of the turn changes. Repeated, it changes nothing and says True. False when
        there is no such turn, when it still runs and when its run is another.
        """

    async def renew_turns(self, turns: Sequence[tuple[str, int]], lease_seconds: float) -> Renewed:
        """Lets the leases of these turns (id and run) end `lease_seconds` from now.

        Says which of them run no more, or run again elsewhere: they are lost; and which of them
        `stop_turn` was called for.
        """

    async def stop_turn(self, turn_id: str, chatbot_id: str) -> bool:
        """Asks the process that runs a turn to stop it; False when no such turn runs."""

    async def get_turn(self, turn_id: str, chatbot_id: str) -> TurnRecord | None:
        """A turn of this chatbot."""

    async def running_turn(self, session_id: str, chatbot_id: str) -> TurnRecord | None:
        """The turn that runs in a session now. Raises `NotFound` for an unknown session."""

    async def rate_turn(
        self, turn_id: str, session_id: str, rating: Rating | None, comment: str | None
    ) -> bool:
        """Keeps what a visitor thinks of a turn; False when the session has no such turn."""

    async def usage_totals(
        self,
        *,
        by: UsageBy,
        chatbot_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Sequence[UsageTotal]:
        """What turns took, of all chatbots or of one, in the order of chatbots and keys; None last.

        Counts turns that ended and began at `since` or later and before `until`, and those of
        erased sessions. Of the latter only the day is known: a day counts when its start lies in
        that time. Nothing of a removed chatbot is left.
        """

    async def sweep(self) -> int:
        """Marks running turns as interrupted whose process is gone, and says how many.

        A process is gone when the lease ran out; a storage that knows sooner may say so
        sooner. Such a turn's `error_code` is `process_lost`. Called once at start before any
        turn, and then regularly.
        """

    # Moving

    async def list_sessions(
        self,
        *,
        limit: int,
        after: str | None = None,
        chatbot_id: str | None = None,
        user_id: str | None = None,
    ) -> Sequence[Session]:
        """The first `limit` sessions in the order of their ids, after this id.

        Those of all chatbots and users, or of one chatbot, one user, or one user with one chatbot.
        """

    async def tally_session(self, session_id: str) -> Tally | None:
        """What a session holds, counted; None when there is no such session."""

    async def export_session(self, session_id: str, *, place: int = 0) -> SessionPart | None:
        """A session's messages from this place on; None when there is no such session.

        A part holds at least one message, if there is one, and no more than fit `PART_CHARS`,
        each with `PART_MESSAGE_CHARS` beside its text.
        """

    async def import_session(self, part: SessionPart) -> None:
        """Stores a part of a session that another storage exported.

        The session is made if it is new, with its times. Turns become what the part says; one
        that runs there becomes `interrupted` with the error code `process_lost` here. Messages
        are told by their place: those that are here already are passed over, the others are
        appended under new ids. So a part that is imported again changes nothing.

        Raises `NotFound` when the session's chatbot does not exist, and `ConflictError`, which
        names the session, when it is another chatbot's, when messages before the part are
        missing, and when it went on here by itself: another turn has the same `seq`, or a turn
        ran again.
        """
