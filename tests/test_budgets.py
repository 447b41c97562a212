"""What a chatbot may cost in a day, whatever many clients do at once and however it is restarted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from typing import Any, Self

import pytest

from chatd.budgets import Budgets
from chatd.config import LimitsConfig
from chatd.domain import Chatbot, ChatbotSettings, new_id
from chatd.errors import BudgetExhausted
from chatd.testing import FakeProvider
from chatd.testing.fake_provider import Pause, http_response
from tests.conftest import Serve
from tests.support import KEY, Answer, Served
from tests.test_http import assert_problem

CONFIG = """
storage: %(storage)s
providers:
  main:
    use: openai_compatible
    base_url: URL
    retries: {attempts: 1}
    prices: [{match: "test/*", input: 0, output: 30}]
models:
  - {match: "*", ask: [main]}
"""
"""A token costs 30 millionths of a USD."""

MANY = 50


def answer_of(tokens: int | None = 1000) -> bytes:
    """What a model answers, of so many tokens: 1000 cost 0.03 USD."""
    choice = {"message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
    return http_response(200, json.dumps({"choices": [choice], **usage}).encode())


@asynccontextmanager
async def priced(serve: Serve, *, tokens: int | None = 1000) -> AsyncIterator[Priced]:
    """A server whose turns cost so much, and the service that it asks."""
    async with FakeProvider() as fake:
        fake.always(Pause(0.02), answer_of(tokens))
        yield Priced(serve, fake)


class Priced:
    """Servers that ask one service, one after the other or at once, over one storage."""

    def __init__(self, serve: Serve, fake: FakeProvider) -> None:
        self._serve = serve
        self.fake = fake

    async def serve(self, more: str = "") -> Served:
        """Another server, with more in its configuration."""
        return await self._serve(CONFIG.replace("URL", self.fake.url) + more)


async def talk(served: Served, bot: Chatbot, key: str = KEY) -> Answer:
    """One turn in a session of its own."""
    return await served.chat(bot, await served.session(bot, key=key), "hi", key=key)


async def spent(served: Served, bot: Chatbot) -> float:
    """What storage says that a chatbot has cost."""
    totals = await served.runtime.services.storage.usage_totals(by="day", chatbot_id=bot.id)
    return sum(total.cost_usd or 0 for total in totals)


async def talk_until_refused(served: Served, bot: Chatbot) -> int:
    """Talks until there is no budget for today, and says how many answers it got."""
    answers = 0
    session = await served.session(bot)
    for _ in range(400):
        answer = await served.chat(bot, session, "hi")
        if answer.status == 200:
            answers += 1
            continue
        if answer.json["code"] == "budget_exhausted":
            return answers
        # The rest is held by others for a moment; the test does not wait as long as a client.
        assert_problem(answer, 429, "rate_limited")
        await asyncio.sleep(0.02)
    raise AssertionError("the budget has no end")


async def test_a_budget_is_overrun_by_no_more_than_one_turn_with_fifty_clients(
    serve: Serve,
) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=1)
        answers = await asyncio.gather(*(talk_until_refused(served, bot) for _ in range(MANY)))
        assert 1 <= await spent(served, bot) <= 1.03 + 1e-9
        assert sum(answers) == len(service.fake.requests) == 34


async def test_turns_dearer_than_their_reserve_raise_it(serve: Serve) -> None:
    async with priced(serve, tokens=7000) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=1, turn_reserve_usd=0.01)
        assert (await talk(served, bot)).status == 200
        await asyncio.gather(*(talk_until_refused(served, bot) for _ in range(MANY)))
        assert 1 <= await spent(served, bot) <= 1.21 + 1e-9


async def test_parallel_turns_hold_their_reserves(serve: Serve) -> None:
    async with priced(serve, tokens=10) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.1, turn_reserve_usd=0.03)
        service.fake.always(Pause(0.5), answer_of(10))
        sessions = [await served.session(bot) for _ in range(5)]
        answers = await asyncio.gather(*(served.chat(bot, session, "hi") for session in sessions))
        assert sorted(answer.status for answer in answers) == [200, 200, 200, 429, 429]
        refused = next(answer for answer in answers if answer.status == 429)
        assert_problem(refused, 429, "rate_limited")
        assert refused.headers["Retry-After"] == "5"
        # They cost next to nothing, so there is room again.
        assert (await talk(served, bot)).status == 200


async def test_a_budget_outlives_a_restart(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.05)
        assert [(await talk(served, bot)).status for _ in range(3)] == [200, 200, 429]
        again = await service.serve()
        assert_problem(await talk(again, bot), 429, "budget_exhausted")
        assert len(service.fake.requests) == 2


async def test_an_erased_session_gives_nothing_back(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.02)
        session = await served.session(bot)
        assert (await served.chat(bot, session, "hi")).status == 200
        bearer = {"Authorization": f"Bearer {KEY}"}
        await served.request("DELETE", f"/api/chat/session/{session}", headers=bearer)
        assert_problem(await talk(await service.serve(), bot), 429, "budget_exhausted")


async def test_what_another_process_spends_counts(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatd.budgets.READ_SECONDS", 0)
    async with priced(serve) as service:
        one, other = await service.serve(), await service.serve()
        bot = await one.add_bot(daily_budget_usd=0.1)
        assert (await talk(other, bot)).status == 200
        assert [(await talk(one, bot)).status for _ in range(3)] == [200, 200, 200]
        assert_problem(await talk(other, bot), 429, "budget_exhausted")


async def test_an_unknown_cost_counts_as_the_reserve(serve: Serve) -> None:
    async with priced(serve, tokens=None) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.1)
        assert [(await talk(served, bot)).status for _ in range(3)] == [200, 200, 429]
        assert_problem(await talk(await service.serve(), bot), 429, "budget_exhausted")


async def test_a_turn_that_reached_no_model_costs_nothing(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.05)
        await service.fake.stop()
        assert {(await talk(served, bot)).status for _ in range(5)} == {502}
        ledger = served.runtime.services.turns._budgets
        assert ledger is not None
        held = await ledger.reserve(bot, new_id())
        assert held is not None
        held.release()
        again = await service.serve()
        assert (await talk(again, bot)).status == 502


async def test_a_replayed_turn_costs_nothing(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.07)
        session = await served.session(bot)
        body = {
            "assistant_id": bot.id,
            "session_id": session,
            "type": "message",
            "messages": [{"role": "user", "content": "hi"}],
        }
        headers = {"X-API-Key": KEY, "Idempotency-Key": "once"}
        answers = [await served.post("/api/chat", body, headers=headers) for _ in range(10)]
        assert {answer.status for answer in answers} == {200}
        assert answers[-1].headers["Idempotency-Replayed"] == "true"
        assert (await talk(served, bot)).status == 200


async def test_a_refused_turn_gives_back_what_it_held(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.1)
        for _ in range(10):
            assert (await served.chat(bot, new_id(), "hi")).status == 404
        assert (await talk(served, bot)).status == 200


async def test_the_next_day_begins_with_a_whole_budget(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Self:
            return super().now(tz) + timedelta(days=1)

    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0.02)
        assert [(await talk(served, bot)).status for _ in range(2)] == [200, 429]
        monkeypatch.setattr("chatd.budgets.datetime", Tomorrow)
        assert [(await talk(served, bot)).status for _ in range(2)] == [200, 429]


async def test_a_turn_over_midnight_counts_for_the_day_it_began(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot()
        bot = replace(bot, settings=ChatbotSettings(daily_budget_usd=0.02, turn_reserve_usd=0.01))
        night = datetime.combine(datetime.now(UTC) + timedelta(days=1), time(), UTC)
        clock = night - timedelta(seconds=1)
        budgets = Budgets(served.runtime.services.storage, LimitsConfig(), now=lambda: clock)
        late = await budgets.reserve(bot, new_id())
        assert late is not None
        clock = night
        # It used up its own day, and nothing of the one that it ended in.
        late.settle(0.02)
        early = await budgets.reserve(bot, new_id())
        assert early is not None
        early.settle(0.03)
        with pytest.raises(BudgetExhausted) as refused:
            await budgets.reserve(bot, new_id())
        assert refused.value.retry_after == 24 * 3600


async def test_a_refusal_says_when_the_day_ends_and_not_what_was_spent(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve()
        bot = await served.add_bot(daily_budget_usd=0)
        begun = await served.post("/api/chat/widget/session", {"chatbot_id": bot.id})
        said = {"session_id": begun.json["session_id"], "message": "hi"}
        before = datetime.now(UTC)
        answer = await served.post("/api/chat/widget", said)
        problem = assert_problem(answer, 429, "budget_exhausted")
        assert not [char for char in problem["detail"] if char.isdigit()]
        wait = int(answer.headers["Retry-After"])
        ends = before + timedelta(seconds=wait)
        assert abs(ends - ends.replace(hour=0, minute=0, second=0)) < timedelta(minutes=1)
        assert answer.headers["RateLimit"] == f'"daily_budget";r=0;t={wait}'
        assert answer.headers["RateLimit-Policy"].endswith(
            ', "daily_budget";q=1;qu="budget";w=86400'
        )
        bearer = {"Authorization": f"Bearer {KEY}"}
        asked = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
        answer = await served.post("/v1/chat/completions", asked, headers=bearer)
        assert (answer.status, answer.json["error"]["code"]) == (429, "budget_exhausted")
        assert service.fake.requests == []


async def test_a_used_up_budget_takes_nothing_from_what_visitors_share(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve("limits: {turns_per_chatbot: 1/hour, turns_per_ip: none}\n")
        bot = await served.add_bot(daily_budget_usd=0)
        begun = await served.post("/api/chat/widget/session", {"chatbot_id": bot.id})
        said = {"session_id": begun.json["session_id"], "message": "hi"}
        for _ in range(3):
            assert_problem(await served.post("/api/chat/widget", said), 429, "budget_exhausted")


async def test_a_chatbots_own_budget_replaces_the_servers(serve: Serve) -> None:
    async with priced(serve) as service:
        served = await service.serve("limits: {daily_budget_usd: 0.02, turn_reserve_usd: 0.01}\n")
        for budget, statuses in [
            (None, [200, 429, 429]),
            (0.05, [200, 200, 429]),
            ("none", [200, 200, 200]),
            (0, [429, 429, 429]),
        ]:
            key = f"key-{new_id()}"
            bot = await served.add_bot(key=key, daily_budget_usd=budget)
            assert [(await talk(served, bot, key)).status for _ in range(3)] == statuses


async def test_an_outage_of_the_provider_does_not_use_up_the_budget(serve: Serve) -> None:
    async with priced(serve) as models:
        served = await models.serve()
        bot = await served.add_bot(daily_budget_usd=0.5, turn_reserve_usd=0.2)
        models.fake.always(http_response(503, b""))
        for _ in range(6):
            assert_problem(await talk(served, bot), 502, "provider_failed")
        models.fake.always(answer_of())
        assert (await talk(served, bot)).status == 200
        # Nor is it taken for spent by who learns it from storage.
        again = await models.serve()
        assert (await talk(again, bot)).status == 200
