"""What SQLite's storage remembers of sessions is what its file says, whatever was done to it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
from chatd_plugins.sqlite import SQLiteStorage, open_sqlite
from chatd_plugins.sqlite.connection import unavailable
from chatd_plugins.sqlite.recent import SESSION_WEIGHT, Recent
from chatd_plugins.sqlite.turns import begin_turn, finish_turn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from chatd.domain import Message, Session, TurnStatus, new_id
from chatd.errors import RequestError
from chatd.storage import BeginTurn, ExistingTurn, FinishTurn
from chatd.testing.storage import a_chatbot, a_turn

WORDS = st.text("aé漢😀\0 ", max_size=30)
ENDS = [status for status in TurnStatus if status is not TurnStatus.RUNNING]
PLACES = st.sampled_from([0, 0, 0, 1])
"""Which of the sessions."""

BEGINS = st.fixed_dictionaries(
    {
        "place": PLACES,
        "said": st.lists(WORDS, min_size=1, max_size=2),
        "budget": st.sampled_from([100, 100, 100, 0, 40, 200, 10_000]),
        "key": st.sampled_from([None] * 6 + ["a", "b"]),
        "hash": st.sampled_from([b"1", b"1", b"2"]),
        "lease": st.sampled_from([60] * 5 + [-1]),
        "again": st.sampled_from([None] * 8 + [0, 1, 2]),
        "stranger": st.sampled_from([False] * 9 + [True]),
    }
)
ENDINGS = st.fixed_dictionaries(
    {
        "turn": st.sampled_from([0, 0, 0, 1, 2]),
        "status": st.sampled_from([TurnStatus.COMPLETED] * 4 + ENDS),
        "reply": st.none() | WORDS,
        "run": st.sampled_from([1] * 7 + [2]),
        "rerunnable": st.booleans(),
    }
)
KINDS = {
    "turn": (15, st.tuples(BEGINS, ENDINGS)),
    "begin": (2, BEGINS),
    "finish": (2, ENDINGS),
    "turn elsewhere": (1, st.tuples(BEGINS, ENDINGS)),
    "begin elsewhere": (1, BEGINS),
    "finish elsewhere": (1, ENDINGS),
    "append elsewhere": (1, PLACES),
    "erase elsewhere": (1, PLACES),
    "begin beside a failure": (1, BEGINS),
    "erase": (1, PLACES),
    "move": (1, PLACES),
    "append": (1, PLACES),
    "erase idle": (1, PLACES),
    "sweep": (1, PLACES),
}
"""What is done, how often, and with what."""

STEPS = st.lists(
    st.sampled_from([kind for kind, (often, _) in KINDS.items() for _ in range(often)]).flatmap(
        lambda kind: st.tuples(st.just(kind), KINDS[kind][1])
    ),
    min_size=20,
    max_size=60,
)


def comparable(result: Any) -> Any:
    """What can be compared of a result: times differ."""
    if isinstance(result, ExistingTurn):
        return replace(result.turn, finished_at=None)
    return (type(result), str(result)) if isinstance(result, Exception) else result


class Pair:
    """A storage that remembers, and a connection to its file that does not."""

    def __init__(self, storage: SQLiteStorage, path: Path, sessions: list[Session]) -> None:
        self.storage = storage
        self.sessions = sessions
        self.begun: list[str] = [new_id()]
        self.path = path
        self.other = apsw.Connection(str(path))
        self.other.pragma("foreign_keys", True)
        self.other.set_busy_timeout(5000)

    def said_by_the_file(self, work: Callable[[apsw.Connection], Any], *, keep: bool) -> Any:
        """What comes of an operation, and the rows of turns and messages after it."""
        self.other.execute("BEGIN IMMEDIATE")
        try:
            try:
                result = work(self.other)
            except (RequestError, apsw.ConstraintError) as error:
                # As the writer does: what failed leaves nothing behind.
                self.other.execute("ROLLBACK; BEGIN IMMEDIATE")
                known = isinstance(error, apsw.Error)
                result = unavailable(error, self.path) if known else error
            return comparable(result), self.rows()
        finally:
            self.other.execute("COMMIT" if keep else "ROLLBACK")

    def rows(self) -> list[Any]:
        return [
            self.other.execute(
                "SELECT turn_id, seq, session_id, status, run, idempotency_key, rerunnable,"
                " reply_id IS NULL, error_code FROM turns ORDER BY turn_id"
            ).fetchall(),
            self.other.execute(
                "SELECT session_id, role, content, turn_id FROM conversations ORDER BY id"
            ).fetchall(),
        ]

    def request(self, wanted: dict[str, Any]) -> BeginTurn:
        session = self.sessions[wanted["place"]]
        again = wanted["again"]
        turn_id = new_id() if again is None else self.begun[-1 - again % len(self.begun)]
        self.begun.append(turn_id)
        return a_turn(
            session,
            *wanted["said"],
            turn_id=turn_id,
            history_chars=wanted["budget"],
            idempotency_key=wanted["key"],
            request_hash=wanted["hash"],
            lease_seconds=wanted["lease"],
            **({"chatbot_id": new_id()} if wanted["stranger"] else {}),
        )

    def result(self, wanted: dict[str, Any]) -> FinishTurn:
        turn_id = self.begun[-1 - wanted["turn"] % len(self.begun)]
        return FinishTurn(
            turn_id,
            wanted["status"],
            wanted["reply"],
            run=wanted["run"],
            rerunnable=wanted["rerunnable"],
        )

    async def begin(self, request: BeginTurn, *beside: BeginTurn) -> None:
        expected = self.said_by_the_file(lambda db: begin_turn(db, Recent(), request), keep=False)
        found, *failed = await asyncio.gather(
            *(self.storage.begin_turn(each) for each in (request, *beside)), return_exceptions=True
        )
        assert (comparable(found), self.rows()) == expected
        assert all(isinstance(error, RequestError) for error in failed)

    async def finish(self, result: FinishTurn) -> None:
        expected = self.said_by_the_file(lambda db: finish_turn(db, Recent(), result), keep=False)
        assert (await self.storage.finish_turn(result), self.rows()) == expected

    async def do(self, step: str, wanted: Any) -> None:
        match step:
            case "begin":
                await self.begin(self.request(wanted))
            case "finish":
                await self.finish(self.result(wanted))
            case "turn":
                await self.begin(self.request(wanted[0]))
                await self.finish(self.result({**wanted[1], "turn": 0}))
            case "turn elsewhere":
                await self.do("begin elsewhere", wanted[0])
                await self.do("finish elsewhere", {**wanted[1], "turn": 0})
            case "begin elsewhere":
                request = self.request(wanted)
                self.said_by_the_file(lambda db: begin_turn(db, Recent(), request), keep=True)
            case "finish elsewhere":
                result = self.result(wanted)
                self.said_by_the_file(lambda db: finish_turn(db, Recent(), result), keep=True)
            case "begin beside a failure":
                session = self.sessions[1 - wanted["place"]]
                await self.begin(self.request(wanted), no_text(session))
            case "sweep":
                await self.storage.sweep()
            case _:
                await self.change(step, self.sessions[wanted])

    async def change(self, step: str, session: Session) -> None:
        storage = self.storage
        match step:
            case "append elsewhere":
                self.other.execute(
                    "INSERT INTO conversations (session_id, role, content) VALUES (?, 'user', 'x')",
                    (session.id,),
                )
            case "erase elsewhere":
                self.other.execute("DELETE FROM sessions WHERE session_id = ?", (session.id,))
                await storage.create_session(session)
            case "erase":
                await storage.delete_session(session.id, session.chatbot_id)
                await storage.create_session(session)
            case "erase idle":
                before = datetime.now(UTC) + timedelta(minutes=1)
                await storage.erase_idle_sessions(session.chatbot_id, before, limit=1)
                for each in self.sessions:
                    await storage.create_session(each)
            case "move":
                part = await storage.export_session(session.id)
                assert part is not None
                await storage.delete_session(session.id, session.chatbot_id)
                await storage.import_session(part)
            case "append":
                part = await storage.export_session(session.id)
                assert part is not None
                if part.messages:
                    more = replace(part.messages[-1], id=2**40, content="more", turn_id=None)
                    await storage.import_session(replace(part, messages=[*part.messages, more]))


def no_text(session: Session) -> BeginTurn:
    """A turn that fails when it is half stored."""
    return a_turn(session, messages=[Message("user", "stored"), Message("user", None)])  # type: ignore[arg-type]


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
@given(STEPS, st.sampled_from([10**6, 3 * SESSION_WEIGHT]))
def test_a_turn_is_what_the_file_says_whatever_was_done_before(
    steps: list[tuple[str, Any]], max_weight: int
) -> None:
    asyncio.run(_hold(steps, max_weight))


async def _hold(steps: list[tuple[str, Any]], max_weight: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chatd.db"
        storage = await open_sqlite({"path": str(path), "synchronous": "off"})
        try:
            chatbot = a_chatbot()
            await storage.add_chatbot(chatbot)
            sessions = [Session(new_id(), chatbot.id, None, user) for user in (None, "a")]
            for session in sessions:
                await storage.create_session(session)
            storage._recent.max_weight = max_weight
            pair = Pair(storage, path, sessions)
            for step, wanted in steps:
                await pair.do(step, wanted)
                assert storage._recent.weight <= max_weight
            pair.other.close()
        finally:
            await storage.close()
