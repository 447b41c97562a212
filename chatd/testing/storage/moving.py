"""Moving sessions from one storage to another."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from chatd.domain import (
    Chatbot,
    Session,
    TurnStatus,
    Usage,
    new_id,
)
from chatd.errors import ConflictError, IdempotencyKeyReused, NotFound
from chatd.storage import (
    PART_CHARS,
    PART_MESSAGE_CHARS,
    ExistingTurn,
    FinishTurn,
    SessionPart,
    Storage,
    Tally,
)
from chatd.testing.storage.base import (
    StorageCase,
    a_chatbot,
    a_turn,
    begin,
    complete,
    keyed,
    transcript,
)


class MovingConformance(StorageCase):
    """Moving sessions from one storage to another, sentence by sentence."""

    async def test_a_healthy_storage_has_nothing_wrong_with_it(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q", "a")
        assert list(await storage.diagnose()) == []

    async def test_a_chatbot_keeps_the_times_it_is_added_with(self, storage: Storage) -> None:
        made, changed = datetime(2024, 2, 29, 12, 30, tzinfo=UTC), datetime(2025, 1, 2, tzinfo=UTC)
        chatbot = a_chatbot(created_at=made, updated_at=changed)
        await storage.add_chatbot(chatbot)
        found = await storage.get_chatbot(chatbot.id)
        assert found is not None
        assert (found.created_at, found.updated_at) == (made, changed)

    async def test_all_sessions_are_listed_in_pages_in_the_order_of_their_ids(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        made = [Session(new_id(), owner.id, "api", "v") for owner in [chatbot, other] * 4]
        for session in made:
            await storage.create_session(session)
        seen: list[Session] = []
        while page := await storage.list_sessions(limit=3, after=seen[-1].id if seen else None):
            assert len(page) <= 3
            seen += page
        assert [s.id for s in seen] == sorted(s.id for s in made)
        assert {(s.id, s.chatbot_id) for s in seen} == {(s.id, s.chatbot_id) for s in made}
        assert all(s.created_at is not None and s.user_id == "v" for s in seen)
        assert list(await storage.list_sessions(limit=3, after=seen[-1].id)) == []

    async def test_the_sessions_of_a_chatbot_and_of_a_user_are_listed(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        made = [
            Session(new_id(), owner.id, "api", user)
            for owner in (chatbot, other)
            for user in ("ann", "ann", "bob", None)
        ]
        for session in made:
            await storage.create_session(session)

        async def told(**wanted: str) -> set[str]:
            found: list[str] = []
            while page := await storage.list_sessions(
                limit=2, after=found[-1] if found else None, **wanted
            ):
                found += [session.id for session in page]
            assert found == sorted(set(found))
            return set(found)

        for wanted in ({}, {"chatbot_id": other.id}, {"user_id": "ann"},
                       {"chatbot_id": other.id, "user_id": "ann"}, {"user_id": "a"}):  # fmt: skip
            fits = {
                s.id
                for s in made
                if all(getattr(s, name) == value for name, value in wanted.items())
            }
            assert await told(**wanted) == fits, wanted

    async def test_a_session_is_tallied(self, storage: Storage, session: Session) -> None:
        assert await storage.tally_session(new_id()) is None
        assert await storage.tally_session(session.id) == Tally()
        first = await complete(storage, session, "naïve 💬", "ok")
        second = await complete(storage, session, "漢", "fine")
        await storage.rate_turn(first, session.id, "up", "👍!")
        await storage.rate_turn(second, session.id, "down", None)
        await begin(storage, a_turn(session, "run"))
        chars = sum(map(len, ("naïve 💬", "ok", "漢", "fine", "👍!", "run")))
        assert await storage.tally_session(session.id) == Tally(5, chars, 3, 2, 1, 1)
        await storage.settle_turn(first, 1, Usage(cost_usd=0.0))
        assert await storage.tally_session(session.id) == Tally(5, chars, 3, 2, 1, 1, 1)

    async def test_an_unknown_session_is_not_exported(self, storage: Storage) -> None:
        assert await storage.export_session(new_id()) is None

    async def test_a_session_that_is_moved_is_the_same_but_for_the_ids_of_its_messages(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session, label="custom_code"))
        attempts = [{"provider": "p", "ms": 12, "error": None}]
        usage = Usage(10, 20, 5, 3, 0.1 + 0.2)
        done = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "Hi! 👋", "m", "p", "stop", None)
        done = dataclasses.replace(done, usage=usage, attempts=attempts, side="main/m")
        await storage.finish_turn(done)
        await storage.rate_turn(begun.turn_id, session.id, "down", "Too short.")
        failed = await begin(storage, a_turn(session, "again"))
        await storage.finish_turn(FinishTurn(failed.turn_id, TurnStatus.FAILED, error_code="x"))
        before = await moved(storage, session)
        turns = [await storage.get_turn(b.turn_id, session.chatbot_id) for b in (begun, failed)]
        (part,) = await parts_of(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        assert await moved(storage, session) == before
        assert turns == [
            await storage.get_turn(b.turn_id, session.chatbot_id) for b in (begun, failed)
        ]
        again = await storage.begin_turn(keyed(session))
        assert isinstance(again, ExistingTurn)
        assert again.turn.reply == "Hi! 👋"
        with pytest.raises(IdempotencyKeyReused):
            await storage.begin_turn(keyed(session, request_hash=b"other"))

    async def test_a_moved_session_goes_on(self, storage: Storage, session: Session) -> None:
        await complete(storage, session, "q1", "a1")
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        (part,) = await parts_of(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        again = await begin(storage, keyed(session))
        assert (again.turn_id, again.run) == (begun.turn_id, begun.run + 1)
        assert [m.content for m in again.history] == ["q1", "a1"]
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "a2", run=again.run)
        assert await storage.finish_turn(done)
        await complete(storage, session, "q3", "a3")
        said = [text for _, text in await transcript(storage, session)]
        assert said == ["q1", "a1", "Hello", "a2", "q3", "a3"]

    async def test_a_part_that_is_imported_again_changes_nothing(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q", "a", "q2")
        await begin(storage, a_turn(session, "still running"))
        (part,) = await parts_of(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        page = await storage.list_messages(session.id, session.chatbot_id, limit=10)
        once = await moved(storage, session)
        await asyncio.gather(*(storage.import_session(part) for _ in range(5)))
        assert await storage.list_messages(session.id, session.chatbot_id, limit=10) == page
        assert await moved(storage, session) == once

    async def test_a_turn_that_runs_where_it_was_exported_is_interrupted_where_it_is_imported(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, "q"))
        (part,) = await parts_of(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.error_code) == (TurnStatus.INTERRUPTED, "process_lost")
        assert await transcript(storage, session) == [("user", "q")]
        await complete(storage, session, "next", "reply")

    async def test_what_is_said_after_a_part_was_imported_is_appended_by_the_next(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, "q1"))
        (early,) = await parts_of(storage, session)
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a1"))
        await complete(storage, session, "q2", "a2")
        whole = await moved(storage, session)
        late = await storage.export_session(session.id, place=1)
        assert late is not None
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(early)
        await storage.import_session(late)
        await storage.import_session(late)
        assert await moved(storage, session) == whole

    async def test_a_large_session_moves_in_parts_that_are_bounded(
        self, storage: Storage, session: Session
    ) -> None:
        large = "0123456789abcdef" * 32768
        for i in range(5):
            await complete(storage, session, f"{i}" + large, large)
        await complete(storage, session, "small", large * 5)
        parts = await parts_of(storage, session)
        assert len(parts) > 2
        for part in parts:
            size = sum(len(m.content) + PART_MESSAGE_CHARS for m in part.messages)
            assert size <= PART_CHARS or len(part.messages) == 1
        before = await moved(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        for part in parts:
            await storage.import_session(part)
            await storage.import_session(part)
        assert await moved(storage, session) == before
        await storage.delete_session(session.id, session.chatbot_id)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(parts[1])
        assert await storage.get_session(session.id) is None

    async def test_a_part_of_an_unknown_chatbot_is_not_found(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q", "a")
        (part,) = await parts_of(storage, session)
        await storage.remove_chatbot(session.chatbot_id)
        with pytest.raises(NotFound):
            await storage.import_session(part)
        assert await storage.get_session(session.id) is None

    async def test_another_chatbots_session_is_a_conflict_and_stays_as_it_is(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q", "a")
        (part,) = await parts_of(storage, session)
        other = a_chatbot()
        await storage.add_chatbot(other)
        stolen = dataclasses.replace(part.session, chatbot_id=other.id)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(dataclasses.replace(part, session=stolen))
        assert await parts_of(storage, session) == [part]

    async def test_a_session_that_went_on_by_itself_is_a_conflict(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q", "a")
        (common,) = await parts_of(storage, session)
        await complete(storage, session, "said there", "answered there")
        (there,) = await parts_of(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(common)
        await complete(storage, session, "said here", "answered here")
        before = await moved(storage, session)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(there)
        assert await moved(storage, session) == before

    async def test_a_turn_that_ran_again_is_not_undone(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        (failed,) = await parts_of(storage, session)
        again = await begin(storage, keyed(session))
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "Hi!", run=again.run)
        assert await storage.finish_turn(done)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(failed)
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.reply) == (TurnStatus.COMPLETED, "Hi!")

    async def test_a_key_that_passed_to_a_newer_turn_passes_where_it_is_imported(
        self, storage: Storage, session: Session
    ) -> None:
        old = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(old.turn_id, TurnStatus.FAILED, rerunnable=True))
        (early,) = await parts_of(storage, session)
        new = await begin(storage, keyed(session, request_hash=b"other"))
        await storage.finish_turn(FinishTurn(new.turn_id, TurnStatus.COMPLETED, "Hi!"))
        late = await storage.export_session(session.id, place=1)
        assert late is not None
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(early)
        await storage.import_session(late)
        again = await storage.begin_turn(keyed(session, request_hash=b"other"))
        assert isinstance(again, ExistingTurn)
        assert again.turn.id == new.turn_id


async def parts_of(storage: Storage, session: Session) -> list[SessionPart]:
    """A whole session, exported."""
    parts: list[SessionPart] = []
    while not parts or parts[-1].more:
        place = parts[-1].place + len(parts[-1].messages) if parts else 0
        part = await storage.export_session(session.id, place=place)
        assert part is not None
        parts.append(part)
    return parts


async def moved(storage: Storage, session: Session) -> list[Any]:
    """What is the same of a session wherever it is: all but the ids of messages."""
    parts = await parts_of(storage, session)
    messages = [message for part in parts for message in part.messages]
    places = {message.id: place for place, message in enumerate(messages)}
    turns = {exported.turn.id: exported for part in parts for exported in part.turns}
    return [
        parts[0].session,
        await storage.tally_session(session.id),
        [dataclasses.replace(message, id=0) for message in messages],
        [
            dataclasses.replace(turn, reply_id=turn.reply_id and places[turn.reply_id])
            for turn in turns.values()
        ],
    ]
