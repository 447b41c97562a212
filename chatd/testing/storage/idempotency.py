"""Idempotency keys."""

from __future__ import annotations

import asyncio

import pytest

from chatd.domain import (
    Session,
    TurnStatus,
    Usage,
    new_id,
)
from chatd.errors import IdempotencyKeyReused, TurnInProgress
from chatd.storage import (
    ExistingTurn,
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
    keyed,
    transcript,
)


class IdempotencyConformance(StorageCase):
    """Idempotency keys, sentence by sentence."""

    async def test_a_key_that_runs_leads_to_the_running_turn(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session))
        again = await storage.begin_turn(keyed(session))
        assert isinstance(again, ExistingTurn)
        assert (again.turn.id, again.turn.status) == (begun.turn_id, TurnStatus.RUNNING)
        assert len(await transcript(storage, session)) == 1

    async def test_a_key_that_ended_leads_to_its_result(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(
            FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "Hi!", "m", usage=Usage(3, 4))
        )
        again = await storage.begin_turn(keyed(session))
        assert isinstance(again, ExistingTurn)
        assert (again.turn.reply, again.turn.model) == ("Hi!", "m")
        assert again.turn.usage == Usage(3, 4)
        assert len(await transcript(storage, session)) == 2

    async def test_a_key_with_another_body_is_refused(
        self, storage: Storage, session: Session
    ) -> None:
        await begin(storage, keyed(session))
        with pytest.raises(IdempotencyKeyReused):
            await storage.begin_turn(keyed(session, request_hash=b"other"))

    async def test_a_key_counts_within_its_session(
        self, storage: Storage, session: Session
    ) -> None:
        other = Session(new_id(), session.chatbot_id)
        await storage.create_session(other)
        first = await begin(storage, keyed(session))
        second = await begin(storage, keyed(other))
        assert first.turn_id != second.turn_id

    async def test_a_remembered_failure_is_replayed(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, error_code="x"))
        again = await storage.begin_turn(keyed(session))
        assert isinstance(again, ExistingTurn)
        assert (again.turn.status, again.turn.error_code) == (TurnStatus.FAILED, "x")

    async def test_a_turn_that_reached_no_model_runs_again_with_its_messages_stored_once(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q", "a")
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        again = await begin(storage, keyed(session))
        assert again.turn_id == begun.turn_id
        assert [m.content for m in again.history] == ["q", "a"]
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "Hi!", run=again.run)
        assert await storage.finish_turn(done)
        assert await transcript(storage, session) == [
            ("user", "q"),
            ("assistant", "a"),
            ("user", "Hello"),
            ("assistant", "Hi!"),
        ]

    async def test_a_turn_lost_with_its_process_runs_again_by_its_key(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session, lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        again = await begin(storage, keyed(session))
        assert again.turn_id == begun.turn_id
        assert await transcript(storage, session) == [("user", "Hello")]
        with pytest.raises(TurnInProgress):
            await storage.begin_turn(a_turn(session))

    async def test_who_ran_a_turn_before_it_ran_again_is_fenced_off(
        self, storage: Storage, session: Session
    ) -> None:
        first = await begin(storage, keyed(session, lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        second = await begin(storage, keyed(session))
        assert second.run > first.run
        late = FinishTurn(first.turn_id, TurnStatus.COMPLETED, "late", run=first.run)
        assert await storage.finish_turn(late) is False
        renewed = await storage.renew_turns([(first.turn_id, first.run)], 60)
        assert renewed.lost == {first.turn_id}
        done = FinishTurn(second.turn_id, TurnStatus.COMPLETED, "right", run=second.run)
        assert await storage.finish_turn(done) is True
        assert await storage.finish_turn(late) is False
        assert await transcript(storage, session) == [("user", "Hello"), ("assistant", "right")]

    async def test_part_of_a_reply_is_replayed_not_run_again(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.INTERRUPTED, "Once"))
        again = await storage.begin_turn(keyed(session))
        assert isinstance(again, ExistingTurn)
        assert again.turn.reply == "Once"

    async def test_a_turn_that_others_followed_is_not_run_again(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        await complete(storage, session, "q", "a")
        again = await begin(storage, keyed(session))
        assert again.turn_id != begun.turn_id
        assert [m.content for m in again.history] == ["q", "a"]

    async def test_a_key_whose_turn_reached_no_model_takes_another_body(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        again = await begin(storage, keyed(session, request_hash=b"other"))
        assert again.turn_id != begun.turn_id
