"""Leases: turns that run, are stopped and are lost with their process."""

from __future__ import annotations

import asyncio

import pytest

from chatd.domain import (
    Session,
    TurnStatus,
    new_id,
)
from chatd.errors import NotFound, TurnInProgress
from chatd.storage import (
    FinishTurn,
    Renewed,
    Storage,
)
from chatd.testing.storage.base import (
    AFTER_SHORT_LEASE,
    SHORT_LEASE,
    StorageCase,
    a_chatbot,
    a_turn,
    begin,
    complete,
)


class LeaseConformance(StorageCase):
    """Leases: turns that run, are stopped and are lost with their process, sentence by sentence."""

    async def test_a_turn_whose_lease_ran_out_gives_way(
        self, storage: Storage, session: Session
    ) -> None:
        lost = await begin(storage, a_turn(session, "lost", lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        begun = await begin(storage, a_turn(session, "next"))
        assert [m.content for m in begun.history] == ["lost"]
        record = await storage.get_turn(lost.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.error_code) == (TurnStatus.INTERRUPTED, "process_lost")

    async def test_a_renewed_turn_keeps_running(self, storage: Storage, session: Session) -> None:
        begun = await begin(storage, a_turn(session, lease_seconds=SHORT_LEASE))
        unknown = new_id()
        renewed = await storage.renew_turns([(begun.turn_id, begun.run), (unknown, 1)], 60)
        assert renewed == Renewed(lost=frozenset({unknown}))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        await storage.sweep()
        with pytest.raises(TurnInProgress):
            await storage.begin_turn(a_turn(session))

    async def test_who_runs_a_turn_is_told_to_stop_it(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session))
        turns = [(begun.turn_id, begun.run)]
        assert await storage.renew_turns(turns, 60) == Renewed()
        assert await storage.stop_turn(begun.turn_id, session.chatbot_id) is True
        assert await storage.renew_turns(turns, 60) == Renewed(stopping=frozenset({begun.turn_id}))
        stopped = FinishTurn(begun.turn_id, TurnStatus.STOPPED, "Half")
        assert await storage.finish_turn(stopped) is True
        assert await storage.stop_turn(begun.turn_id, session.chatbot_id) is False

    async def test_another_chatbot_cannot_stop_a_turn(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session))
        other = a_chatbot()
        await storage.add_chatbot(other)
        assert await storage.stop_turn(begun.turn_id, other.id) is False
        assert await storage.stop_turn(new_id(), session.chatbot_id) is False
        assert await storage.renew_turns([(begun.turn_id, begun.run)], 60) == Renewed()

    async def test_the_turn_that_runs_in_a_session_is_found(
        self, storage: Storage, session: Session
    ) -> None:
        assert await storage.running_turn(session.id, session.chatbot_id) is None
        begun = await begin(storage, a_turn(session))
        running = await storage.running_turn(session.id, session.chatbot_id)
        assert running is not None
        assert (running.id, running.status, running.run) == (begun.turn_id, "running", begun.run)
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a"))
        assert await storage.running_turn(session.id, session.chatbot_id) is None
        for id, chatbot_id in [(new_id(), session.chatbot_id), (session.id, new_id())]:
            with pytest.raises(NotFound):
                await storage.running_turn(id, chatbot_id)

    async def test_a_turn_keeps_that_its_history_was_cut(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session))
        done = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a", history_truncated=True)
        await storage.finish_turn(done)
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert record.history_truncated is True

    async def test_a_turn_that_ended_cannot_be_renewed(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await complete(storage, session, "q", "a")
        assert await storage.renew_turns([(turn, 1)], 60) == Renewed(lost=frozenset({turn}))
        assert await storage.renew_turns([], 60) == Renewed()
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.status is TurnStatus.COMPLETED

    async def test_a_sweep_ends_turns_whose_lease_ran_out_and_no_others(
        self, storage: Storage, session: Session
    ) -> None:
        await storage.sweep()
        alive = Session(new_id(), session.chatbot_id)
        await storage.create_session(alive)
        lost = await begin(storage, a_turn(session, lease_seconds=SHORT_LEASE))
        kept = await begin(storage, a_turn(alive))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        assert await storage.sweep() == 1
        assert await storage.sweep() == 0
        for turn, status in [
            (lost, TurnStatus.INTERRUPTED),
            (kept, TurnStatus.RUNNING),
        ]:
            record = await storage.get_turn(turn.turn_id, session.chatbot_id)
            assert record is not None
            assert record.status is status
