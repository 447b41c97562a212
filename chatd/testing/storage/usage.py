"""What turns took."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest

from chatd.domain import (
    Chatbot,
    Session,
    TurnStatus,
    Usage,
    new_id,
)
from chatd.storage import (
    FinishTurn,
    Storage,
    UsageBy,
    UsageTotal,
)
from chatd.testing.storage.base import (
    StorageCase,
    a_chatbot,
    a_turn,
    begin,
    complete,
    keyed,
    past,
)


class UsageConformance(StorageCase):
    """What turns took, sentence by sentence."""

    @pytest.mark.parametrize(
        "status",
        [TurnStatus.COMPLETED, TurnStatus.FAILED, TurnStatus.STOPPED, TurnStatus.INTERRUPTED],
    )
    async def test_what_a_turn_took_is_settled_after_its_end_and_nothing_else_changes(
        self, storage: Storage, session: Session, status: TurnStatus
    ) -> None:
        kept = await complete(storage, session, "keep me", "kept")
        begun = await begin(storage, a_turn(session))
        half = FinishTurn(begun.turn_id, status, "Half", "m", "p", usage=Usage(9), side="main/m")
        await storage.finish_turn(half)
        await storage.rate_turn(begun.turn_id, session.id, "up", "More!")
        before = [await storage.get_turn(id, session.chatbot_id) for id in (kept, begun.turn_id)]
        usage = Usage(10, 20, None, 3, 0.1 + 0.2)
        for _ in range(2):
            assert await storage.settle_turn(begun.turn_id, begun.run, usage) is True
        after = [await storage.get_turn(id, session.chatbot_id) for id in (kept, begun.turn_id)]
        assert before[1] is not None
        assert after == [before[0], dataclasses.replace(before[1], usage=usage)]

    async def test_a_turn_that_runs_or_ran_again_or_is_unknown_cannot_be_settled(
        self, storage: Storage, session: Session
    ) -> None:
        first = await begin(storage, keyed(session))
        usage = Usage(1, 2, cost_usd=0.5)
        assert await storage.settle_turn(first.turn_id, first.run, usage) is False
        await storage.finish_turn(FinishTurn(first.turn_id, TurnStatus.FAILED, rerunnable=True))
        again = await begin(storage, keyed(session))
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "Hi!", run=again.run)
        await storage.finish_turn(done)
        assert await storage.settle_turn(first.turn_id, first.run, usage) is False
        assert await storage.settle_turn(new_id(), 1, usage) is False
        record = await storage.get_turn(first.turn_id, session.chatbot_id)
        assert record is not None
        assert record.usage == Usage()

    async def test_a_turn_of_an_erased_session_cannot_be_settled(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await complete(storage, session, "q", "a")
        await storage.delete_session(session.id, session.chatbot_id)
        assert await storage.settle_turn(turn, 1, Usage(1, 2, cost_usd=0.5)) is False

    async def test_usage_is_totalled_by_day_model_and_side(
        self, storage: Storage, session: Session
    ) -> None:
        await take(storage, session, Usage(1, 10, 100, 1000, 0.25), model="m-1", side="main/m-1")
        await take(storage, session, Usage(2, 20, 200, 2000, 0.5), model="m-1", side="b/m-1")
        await take(storage, session, Usage(4, 40, cost_usd=1), model="m-2", side="b/m-1")
        await take(storage, session, Usage())
        bot, day = session.chatbot_id, datetime.now(UTC).date().isoformat()
        nothing = UsageTotal(bot, None, turns=1, completed=1, unknown_cost=1)
        assert await totals(storage, "day") == [
            UsageTotal(bot, day, 4, 4, 0, 0, 0, 7, 70, 300, 3000, 1.75, 1)
        ]
        assert await totals(storage, "model") == [
            UsageTotal(bot, "m-1", 2, 2, 0, 0, 0, 3, 30, 300, 3000, 0.75),
            UsageTotal(bot, "m-2", 1, 1, 0, 0, 0, 4, 40, None, None, 1),
            nothing,
        ]
        assert await totals(storage, "side") == [
            UsageTotal(bot, "b/m-1", 2, 2, 0, 0, 0, 6, 60, 200, 2000, 1.5),
            UsageTotal(bot, "main/m-1", 1, 1, 0, 0, 0, 1, 10, 100, 1000, 0.25),
            nothing,
        ]

    async def test_usage_counts_turns_by_how_they_ended_and_how_they_were_rated(
        self, storage: Storage, session: Session
    ) -> None:
        rated = [await take(storage, session, Usage(cost_usd=0)) for _ in range(3)]
        for turn, rating in zip(rated, ("up", "down", "down"), strict=True):
            await storage.rate_turn(turn, session.id, rating, None)  # type: ignore[arg-type]
        for status in (TurnStatus.FAILED, TurnStatus.STOPPED, TurnStatus.INTERRUPTED):
            await take(storage, session, Usage(cost_usd=0), status=status)
        (total,) = await totals(storage, "side")
        assert total == UsageTotal(
            session.chatbot_id, None, 6, 3, 1, 1, 1, cost_usd=0, rated_up=1, rated_down=2
        )

    async def test_a_turn_that_runs_is_not_in_the_totals(
        self, storage: Storage, session: Session
    ) -> None:
        assert await totals(storage, "day") == []
        begun = await begin(storage, a_turn(session))
        assert await totals(storage, "day") == []
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a"))
        assert [total.turns for total in await totals(storage, "day")] == [1]

    async def test_a_turn_that_reached_no_model_has_no_unknown_cost(
        self, storage: Storage, session: Session
    ) -> None:
        await take(storage, session, Usage(), status=TurnStatus.FAILED, rerunnable=True)
        (total,) = await totals(storage, "side")
        assert (total.failed, total.unknown_cost, total.cost_usd) == (1, 0, None)
        await take(storage, session, Usage(), status=TurnStatus.FAILED)
        (total,) = await totals(storage, "side")
        assert (total.failed, total.unknown_cost, total.cost_usd) == (2, 1, None)

    async def test_a_cost_that_is_settled_is_in_the_totals(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await take(storage, session, Usage(), status=TurnStatus.STOPPED)
        await storage.settle_turn(turn, 1, Usage(5, 6, cost_usd=0.5))
        (total,) = await totals(storage, "side")
        assert (total.input_tokens, total.cost_usd, total.unknown_cost) == (5, 0.5, 0)

    async def test_usage_is_told_of_one_chatbot_or_of_all_in_their_order(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        theirs = Session(new_id(), other.id)
        await storage.create_session(theirs)
        for each in (session, theirs):
            await take(storage, each, Usage(1), model="m")
            await take(storage, each, Usage(1), model="M")
            await storage.delete_session(each.id, each.chatbot_id)
            await storage.create_session(each)
            await take(storage, each, Usage(1))
        every = [(bot, key) for bot in sorted((session.chatbot_id, other.id))
                 for key in ("M", "m", None)]  # fmt: skip
        assert [(t.chatbot_id, t.key) for t in await totals(storage, "model")] == every
        found = await storage.usage_totals(by="model", chatbot_id=other.id)
        assert [(t.chatbot_id, t.key) for t in found] == [e for e in every if e[0] == other.id]
        assert await storage.usage_totals(by="model", chatbot_id=new_id()) == []

    async def test_a_day_is_utcs_and_a_time_holds_its_start_and_not_its_end(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        midnight = datetime(2024, 3, 1, tzinfo=UTC)
        step = timedelta(microseconds=100)
        sessions = [
            await past(storage, chatbot, time)
            for time in (midnight - step, midnight, midnight + timedelta(days=1) - step)
        ]
        sessions.append(await past(storage, chatbot, midnight + timedelta(days=1)))
        days = [("2024-02-29", 1), ("2024-03-01", 2), ("2024-03-02", 1)]

        async def told(since: datetime | None, until: datetime | None) -> list[tuple[Any, int]]:
            found = [
                await storage.usage_totals(by="day", chatbot_id=id, since=since, until=until)
                for id in (None, chatbot.id)
            ]
            assert found[0] == found[1]
            return [(total.key, total.turns) for total in found[0]]

        for _ in ("stored", "erased"):
            assert await told(None, None) == days
            assert await told(midnight, None) == days[1:]
            assert await told(None, midnight) == days[:1]
            assert await told(midnight, midnight + timedelta(days=1)) == days[1:2]
            for session in sessions:
                await storage.delete_session(session.id, chatbot.id)

    async def test_erasing_sessions_leaves_what_their_turns_took_in_the_totals(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        sessions = [Session(new_id(), chatbot.id, "api", f"v{i}") for i in range(4)]
        for session in sessions:
            await storage.create_session(session)
            first = await take(storage, session, Usage(1, 10, None, 3, 0.25), model="m", side="s")
            await storage.rate_turn(first, session.id, "up", "Great!")
            await take(storage, session, Usage(2), model="m", status=TurnStatus.STOPPED)
            await take(storage, session, Usage(), status=TurnStatus.FAILED, rerunnable=True)
            last = await take(storage, session, Usage(4, cost_usd=1), side="t")
            await storage.rate_turn(last, session.id, "down", None)
        await past(storage, chatbot, datetime(2024, 2, 29, tzinfo=UTC))
        before = {by: await totals(storage, by) for by in get_args(UsageBy)}
        assert sum(total.turns for total in before["day"]) == 17
        for session in sessions:
            assert await storage.delete_session(session.id, chatbot.id) is True
            assert await storage.delete_session(session.id, chatbot.id) is False
            assert {by: await totals(storage, by) for by in get_args(UsageBy)} == before

    async def test_sessions_that_are_erased_at_once_are_all_in_the_totals(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        sessions = [Session(new_id(), chatbot.id) for _ in range(20)]
        for session in sessions:
            await storage.create_session(session)
            for model in ("b", "a", None):
                await take(storage, session, Usage(1, cost_usd=0.5), model=model)
        before = await totals(storage, "model")
        await asyncio.gather(*(storage.delete_session(s.id, chatbot.id) for s in sessions))
        assert await totals(storage, "model") == before
        assert [(total.turns, total.cost_usd) for total in before] == [(20, 10)] * 3

    async def test_a_turn_that_runs_in_an_erased_session_counts_as_interrupted_at_unknown_cost(
        self, storage: Storage, session: Session
    ) -> None:
        await begin(storage, a_turn(session))
        await storage.delete_session(session.id, session.chatbot_id)
        (total,) = await totals(storage, "side")
        assert (total.turns, total.interrupted, total.unknown_cost) == (1, 1, 1)

    async def test_another_chatbot_erases_nothing_and_adds_nothing_to_the_totals(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        await take(storage, session, Usage(1))
        before = await totals(storage, "day")
        assert await storage.delete_session(session.id, other.id) is False
        assert await totals(storage, "day") == before

    async def test_of_a_removed_chatbot_nothing_is_in_the_totals_and_of_others_all(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        kept = Session(new_id(), other.id)
        await storage.create_session(kept)
        for each in (session, kept):
            await take(storage, each, Usage(1))
            await storage.delete_session(each.id, each.chatbot_id)
            await storage.create_session(each)
            await take(storage, each, Usage(2))
        assert await storage.remove_chatbot(session.chatbot_id) is True
        (total,) = await totals(storage, "day")
        assert (total.chatbot_id, total.turns, total.input_tokens) == (other.id, 2, 3)
        await storage.add_chatbot(a_chatbot(id=session.chatbot_id))
        assert await totals(storage, "day") == [total]


async def take(
    storage: Storage,
    session: Session,
    usage: Usage,
    *,
    status: TurnStatus = TurnStatus.COMPLETED,
    **more: Any,
) -> str:
    """A turn that took this and ended; returns its id."""
    begun = await begin(storage, a_turn(session))
    assert await storage.finish_turn(FinishTurn(begun.turn_id, status, usage=usage, **more))
    return begun.turn_id


async def totals(storage: Storage, by: UsageBy) -> list[UsageTotal]:
    return list(await storage.usage_totals(by=by))
