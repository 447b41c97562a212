"""Ending a turn, and rating it."""

from __future__ import annotations

import asyncio

import pytest

from chatd.domain import (
    Session,
    TurnStatus,
    Usage,
)
from chatd.storage import (
    FinishTurn,
    Storage,
)
from chatd.testing.storage.base import (
    AFTER_SHORT_LEASE,
    SHORT_LEASE,
    StorageCase,
    a_turn,
    begin,
    complete,
    transcript,
)


class EndingConformance(StorageCase):
    """Ending a turn, and rating it, sentence by sentence."""

    async def test_a_finished_turn_is_read_back_as_it_ended(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, label="custom_code"))
        attempts = [{"provider": "p", "model": "m", "error": None, "ms": 12}]
        stored = await storage.finish_turn(
            FinishTurn(
                begun.turn_id,
                TurnStatus.COMPLETED,
                reply="Hi! 👋",
                model="m-2",
                provider="p",
                finish_reason="stop",
                usage=Usage(10, 20, 5, 3, 0.00012),
                attempts=attempts,
                side="main/openai/gpt-5",
            )
        )
        assert stored is True
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.session_id, record.chatbot_id) == (session.id, session.chatbot_id)
        assert (record.status, record.label) == (TurnStatus.COMPLETED, "custom_code")
        assert (record.reply, record.model, record.provider) == ("Hi! 👋", "m-2", "p")
        assert (record.finish_reason, record.error_code) == ("stop", None)
        assert record.usage == Usage(10, 20, 5, 3, 0.00012)
        assert list(record.attempts) == attempts
        assert record.side == "main/openai/gpt-5"
        assert record.started_at is not None
        assert record.finished_at is not None
        assert record.started_at <= record.finished_at

    async def test_unknown_usage_stays_unknown(self, storage: Storage, session: Session) -> None:
        turn = await complete(storage, session, "q", "a")
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.usage == Usage()

    async def test_a_turn_of_which_nothing_was_split_has_no_side(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await complete(storage, session, "q", "a")
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.side is None

    @pytest.mark.parametrize(
        "status", [TurnStatus.COMPLETED, TurnStatus.STOPPED, TurnStatus.INTERRUPTED]
    )
    async def test_finishing_again_changes_nothing(
        self, storage: Storage, session: Session, status: TurnStatus
    ) -> None:
        begun = await begin(storage, a_turn(session, "q"))
        finish = FinishTurn(begun.turn_id, status, reply="a")
        assert await storage.finish_turn(finish) is True
        assert await storage.finish_turn(finish) is True
        assert await transcript(storage, session) == [("user", "q"), ("assistant", "a")]

    async def test_a_turn_without_a_reply_stores_no_message(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, "q"))
        assert await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, reply=""))
        assert await transcript(storage, session) == [("user", "q")]

    async def test_a_late_finish_counts_while_nothing_followed(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, "q", lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        await storage.sweep()
        assert await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a"))
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.error_code) == (TurnStatus.COMPLETED, None)
        assert await transcript(storage, session) == [("user", "q"), ("assistant", "a")]

    async def test_a_late_finish_after_a_newer_turn_is_not_stored(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, "q", lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        await complete(storage, session, "newer", "reply")
        late = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "late")
        assert await storage.finish_turn(late) is False
        assert [text for _, text in await transcript(storage, session)] == ["q", "newer", "reply"]

    async def test_finishing_a_turn_of_a_deleted_session_is_false(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session))
        await storage.delete_session(session.id, session.chatbot_id)
        finish = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a")
        assert await storage.finish_turn(finish) is False

    async def test_a_rating_is_kept_and_can_be_taken_back(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await complete(storage, session, "q", "a")
        assert await storage.rate_turn(turn, session.id, "down", "Too long.") is True
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert (record.rating, record.comment) == ("down", "Too long.")
        assert await storage.rate_turn(turn, session.id, None, None) is True
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert (record.rating, record.comment) == (None, None)
