"""Beginning a turn."""

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
    BegunTurn,
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
    transcript,
)


class BeginningConformance(StorageCase):
    """Beginning a turn, sentence by sentence."""

    async def test_the_first_turn_has_no_history(self, storage: Storage, session: Session) -> None:
        request = a_turn(session, "Hi")
        begun = await begin(storage, request)
        assert (begun.turn_id, begun.history, begun.history_truncated) == (
            request.turn_id,
            [],
            False,
        )
        assert begun.user_id == "visitor-1"
        assert await transcript(storage, session) == [("user", "Hi")]

    async def test_history_is_what_was_said_before_oldest_first(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q1", "a1")
        await complete(storage, session, "q2", "a2")
        begun = await begin(storage, a_turn(session, "q3"))
        assert [(m.role, m.content) for m in begun.history] == [
            ("user", "q1"),
            ("assistant", "a1"),
            ("user", "q2"),
            ("assistant", "a2"),
        ]

    async def test_several_messages_of_a_turn_keep_their_order(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "one", "reply", "two", "three")
        begun = await begin(storage, a_turn(session))
        assert [m.content for m in begun.history] == ["one", "two", "three", "reply"]

    async def test_history_keeps_to_its_budget_and_leaves_out_whole_turns_oldest_first(
        self, storage: Storage, session: Session
    ) -> None:
        for i in range(4):
            await complete(storage, session, f"q{i}" * 50, f"a{i}" * 50)
        full = await begin(storage, a_turn(session))
        await storage.finish_turn(FinishTurn(full.turn_id, TurnStatus.FAILED))
        two_turns = sum(m.cost_chars for m in full.history[4:])
        for budget, expected in [
            (two_turns, full.history[4:]),
            (two_turns - 1, full.history[6:]),
            (two_turns + 1, full.history[4:]),
            (0, []),
        ]:
            begun = await begin(storage, a_turn(session, history_chars=budget))
            assert begun.history == expected, budget
            assert begun.history_truncated is True
            await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED))
        enough = sum(m.cost_chars for m in full.history)
        begun = await begin(storage, a_turn(session, history_chars=enough))
        assert (begun.history, begun.history_truncated) == (full.history, False)

    async def test_a_budget_of_nothing_is_not_called_truncated_when_there_is_no_history(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, history_chars=0))
        assert begun.history_truncated is False

    async def test_a_failed_turns_question_is_in_the_transcript_and_not_in_history(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await begin(storage, a_turn(session, "poison"))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, error_code="x"))
        begun = await begin(storage, a_turn(session, "next"))
        assert begun.history == []
        assert await transcript(storage, session) == [("user", "poison"), ("user", "next")]

    @pytest.mark.parametrize("status", [TurnStatus.STOPPED, TurnStatus.INTERRUPTED])
    async def test_a_turn_that_was_cut_short_is_in_history(
        self, storage: Storage, session: Session, status: TurnStatus
    ) -> None:
        begun = await begin(storage, a_turn(session, "long story"))
        await storage.finish_turn(FinishTurn(begun.turn_id, status, reply="Once upon"))
        begun = await begin(storage, a_turn(session))
        assert [m.content for m in begun.history] == ["long story", "Once upon"]

    async def test_one_turn_runs_at_a_time_in_a_session(
        self, storage: Storage, session: Session
    ) -> None:
        running = await begin(storage, a_turn(session, "first"))
        with pytest.raises(TurnInProgress) as caught:
            await storage.begin_turn(a_turn(session, "second"))
        assert caught.value.turn_id == running.turn_id
        assert await transcript(storage, session) == [("user", "first")]
        other = Session(new_id(), session.chatbot_id)
        await storage.create_session(other)
        await begin(storage, a_turn(other, "elsewhere"))

    async def test_of_many_turns_at_once_one_runs(self, storage: Storage, session: Session) -> None:
        outcomes = await asyncio.gather(
            *(storage.begin_turn(a_turn(session, f"{i}")) for i in range(20)),
            return_exceptions=True,
        )
        assert sum(isinstance(o, BegunTurn) for o in outcomes) == 1
        assert sum(isinstance(o, TurnInProgress) for o in outcomes) == 19
        assert len(await transcript(storage, session)) == 1

    async def test_one_turns_failure_to_begin_does_not_touch_those_beside_it(
        self, storage: Storage, session: Session
    ) -> None:
        sessions = [Session(new_id(), session.chatbot_id) for _ in range(10)]
        for each in sessions:
            await storage.create_session(each)
        unknown = Session(new_id(), session.chatbot_id)
        mixed = [s for each in sessions for s in (each, unknown)]
        outcomes = await asyncio.gather(
            *(storage.begin_turn(a_turn(s)) for s in mixed), return_exceptions=True
        )
        assert [isinstance(o, BegunTurn) for o in outcomes[::2]] == [True] * 10
        assert [isinstance(o, NotFound) for o in outcomes[1::2]] == [True] * 10
        for each in sessions:
            assert len(await transcript(storage, each)) == 1

    async def test_beginning_the_same_turn_again_stores_nothing_twice(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "q", "a")
        request = a_turn(session, "Hi")
        first = await storage.begin_turn(request)
        assert await storage.begin_turn(request) == first
        assert len(await transcript(storage, session)) == 3

    async def test_beginning_a_turn_again_after_its_end_leads_to_its_result(
        self, storage: Storage, session: Session
    ) -> None:
        request = a_turn(session, "Hi", lease_seconds=SHORT_LEASE)
        await begin(storage, request)
        await storage.finish_turn(FinishTurn(request.turn_id, TurnStatus.COMPLETED, "Hello!"))
        again = await storage.begin_turn(request)
        assert isinstance(again, ExistingTurn)
        assert again.turn.reply == "Hello!"
        lost = a_turn(session, "Hi", lease_seconds=SHORT_LEASE)
        await begin(storage, lost)
        await asyncio.sleep(AFTER_SHORT_LEASE)
        again = await storage.begin_turn(lost)
        assert isinstance(again, ExistingTurn)
        assert again.turn.status is TurnStatus.INTERRUPTED
        assert len(await transcript(storage, session)) == 3
