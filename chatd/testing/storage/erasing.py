"""Erasing what nobody needs any more: sessions in which nothing happened for long."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from chatd.domain import Chatbot, Session, new_id
from chatd.storage import ExportedTurn, Storage, TurnRecord
from chatd.testing.storage.base import (
    StorageCase,
    a_chatbot,
    a_turn,
    begin,
    complete,
    past,
    transcript,
)

LONG_AGO = datetime(2024, 2, 29, tzinfo=UTC)
CUT = datetime(2025, 1, 1, tzinfo=UTC)


async def erase_all(storage: Storage, chatbot: Chatbot, before: datetime, limit: int = 100) -> int:
    """Erases in as many calls as it takes, and says how many."""
    erased, after = 0, None
    while True:
        done = await storage.erase_idle_sessions(chatbot.id, before, limit=limit, after=after)
        erased += done.sessions
        if (after := done.after) is None:
            return erased


async def those_left(storage: Storage, sessions: list[Session]) -> list[Session]:
    """The sessions that are still there."""
    return [s for s in sessions if await storage.get_session(s.id) is not None]


class ErasingConformance(StorageCase):
    """Erasing idle sessions, sentence by sentence."""

    async def test_idle_sessions_are_erased_with_what_was_said_and_no_others(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        idle = await past(storage, chatbot, LONG_AGO)
        theirs = await past(storage, other, LONG_AGO)
        recent = await past(storage, chatbot, CUT + timedelta(seconds=1))
        part = await storage.export_session(idle.id)
        assert part is not None
        assert await erase_all(storage, chatbot, CUT) == 1
        assert await those_left(storage, [idle, theirs, recent]) == [theirs, recent]
        assert await storage.get_turn(part.turns[0].turn.id, chatbot.id) is None
        assert await transcript(storage, theirs) == [("user", "Hello")]
        assert await erase_all(storage, chatbot, CUT) == 0

    async def test_a_session_that_something_happened_in_since_stays(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        went_on = await past(storage, chatbot, LONG_AGO)
        await complete(storage, went_on, "still here", "so am I")
        assert await erase_all(storage, chatbot, CUT) == 0
        assert len(await transcript(storage, went_on)) == 3

    async def test_what_happened_at_the_very_time_counts_as_since(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        session = await past(storage, chatbot, CUT)
        assert await erase_all(storage, chatbot, CUT) == 0
        assert await those_left(storage, [session]) == [session]
        assert await erase_all(storage, chatbot, CUT + timedelta(milliseconds=1)) == 1

    async def test_a_session_in_which_nothing_was_said_is_as_old_as_its_creation(
        self, storage: Storage, session: Session, chatbot: Chatbot
    ) -> None:
        assert await erase_all(storage, chatbot, CUT) == 0
        assert await erase_all(storage, chatbot, datetime.now(UTC) + timedelta(days=1)) == 1
        assert await storage.get_session(session.id) is None

    async def test_a_turn_that_ended_since_keeps_its_session(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        session = await past(storage, chatbot, LONG_AGO)
        (part,) = [await storage.export_session(session.id)]
        assert part is not None
        late = _ended(part.turns[0], CUT + timedelta(hours=1))
        await storage.import_session(replace(part, turns=[late]))
        assert await erase_all(storage, chatbot, CUT) == 0

    async def test_a_session_with_a_running_turn_is_never_erased(
        self, storage: Storage, session: Session, chatbot: Chatbot
    ) -> None:
        await begin(storage, a_turn(session, "think hard"))
        assert await erase_all(storage, chatbot, datetime.now(UTC) + timedelta(days=1)) == 0
        assert await transcript(storage, session) == [("user", "think hard")]

    async def test_what_the_turns_of_idle_sessions_took_stays_in_the_totals(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        for days in range(3):
            for _ in range(2):
                await past(storage, chatbot, LONG_AGO + timedelta(days=days))
        before = await storage.usage_totals(by="day")
        assert [total.turns for total in before] == [2, 2, 2]
        assert await erase_all(storage, chatbot, CUT) == 6
        assert await storage.usage_totals(by="day") == before

    async def test_one_call_erases_no_more_than_its_limit_and_the_oldest_first(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        sessions = [
            await past(storage, chatbot, LONG_AGO + timedelta(hours=hour)) for hour in range(7)
        ]
        await complete(storage, sessions[1], "kept", "indeed")
        done = await storage.erase_idle_sessions(chatbot.id, CUT, limit=3)
        assert done.sessions == 2
        assert await those_left(storage, sessions) == [sessions[1], *sessions[3:]]
        done = await storage.erase_idle_sessions(chatbot.id, CUT, limit=3, after=done.after)
        assert done.sessions == 3
        assert await those_left(storage, sessions) == [sessions[1], sessions[6]]
        assert await erase_all(storage, chatbot, CUT, limit=3) == 1

    async def test_several_that_erase_at_once_count_each_session_once(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        for hour in range(30):
            await past(storage, chatbot, LONG_AGO + timedelta(hours=hour))
        before = await storage.usage_totals(by="day")
        erased = await asyncio.gather(
            *(erase_all(storage, chatbot, CUT, limit=4) for _ in range(4))
        )
        assert sum(erased) + await erase_all(storage, chatbot, CUT) == 30
        assert await storage.usage_totals(by="day") == before

    async def test_of_an_unknown_chatbot_nothing_is_erased(
        self, storage: Storage, session: Session
    ) -> None:
        done = await storage.erase_idle_sessions(new_id(), datetime.now(UTC), limit=10)
        assert (done.sessions, done.after) == (0, None)

    async def test_reclaiming_space_changes_nothing_that_is_stored(
        self, storage: Storage, session: Session, chatbot: Chatbot
    ) -> None:
        await complete(storage, session, "q", "a" * 100_000)
        idle = await past(storage, chatbot, LONG_AGO)
        await storage.delete_session(idle.id, chatbot.id)
        await storage.reclaim()
        await storage.reclaim()
        assert [text for _, text in await transcript(storage, session)] == ["q", "a" * 100_000]


def _ended(exported: ExportedTurn, time: datetime) -> ExportedTurn:
    turn: TurnRecord = replace(exported.turn, finished_at=time)
    return replace(exported, turn=turn)
