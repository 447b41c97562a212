"""What counts of a day's budget for answers that were stopped or broken off, whose cost nobody tells."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from chatd.domain import Chatbot, TurnStatus
from chatd.storage import TurnRecord
from chatd.testing import FakeProvider
from chatd.testing.fake_provider import SSE_HEAD, Hold, Pause, Reset, http_response, sse
from tests.conftest import Serve
from tests.support import ECHO_CONFIG, KEY, Served
from tests.test_http import assert_problem
from tests.test_settling import CONFIG as OPENROUTER
from tests.test_settling import GENERATION, chunk

CONFIG = """
storage: %(storage)s
providers:
  main: {use: openai_compatible, base_url: URL, retries: {attempts: 1}, prices: PRICES}
models:
  - {match: "*", ask: [main]}
"""
PRICE = '[{match: "test/*", input: 2, output: 30}]'
THOUSANDTH = 1e-3


def delta(text: str, kind: str = "content") -> bytes:
    return sse({"choices": [{"index": 0, "delta": {kind: text}}]})


def answer_of(**usage: Any) -> bytes:
    """A whole answer, and what it says that it took."""
    choice = {"message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}
    return http_response(200, json.dumps({"choices": [choice], "usage": usage}).encode())


async def talk(served: Served, bot: Chatbot) -> int:
    """One turn in a session of its own; the status of its answer."""
    return (await served.chat(bot, await served.session(bot), "hi")).status


async def stopped(served: Served, bot: Chatbot, *, stream: bool = True) -> TurnRecord:
    """A turn that is stopped after its first words, as it is stored."""
    session = await served.session(bot)
    asked = asyncio.create_task(served.chat(bot, session, "hi" * 100, stream=stream))
    turns = served.runtime.services.turns

    def has_begun() -> bool:
        running = list(turns._running.values())
        return any(turn.has_answer if stream else turn.trail.attempts for turn in running)

    async with asyncio.timeout(10):
        while not has_begun():
            await asyncio.sleep(0.01)
    await turns.stop_in(bot, session)
    await asked
    turn = await served.last_turn(bot, session)
    assert turn.status is TurnStatus.STOPPED
    return turn


async def spent(served: Served, bot: Chatbot) -> float:
    """What counts of the chatbot's budget of today."""
    budgets = served.runtime.services.turns._budgets
    assert budgets is not None
    return await budgets.spent(bot.id)


@pytest.fixture(params=[30, 0], ids=["by itself", "and read again"])
def reread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with what the process knows alone, once with what it reads from storage before a turn."""
    monkeypatch.setattr("chatd.budgets.READ_SECONDS", request.param)


@pytest.mark.usefixtures("reread")
async def test_stopped_answers_count_what_was_said_by_the_price_of_the_model(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(CONFIG.replace("URL", fake.url).replace("PRICES", PRICE))
    bot = await served.add_bot(daily_budget_usd=0.06, turn_reserve_usd=0.05)
    fake.always(SSE_HEAD, delta("word " * 80), Hold())
    for _ in range(4):
        # It is not known what it cost, and it is not stored as if it were.
        assert (await stopped(served, bot)).usage.cost_usd is None
    # 100 tokens of answer and 50 of a question, with what a message takes beside its text.
    assert await spent(served, bot) == pytest.approx(4 * (100 * 30 + 54 * 2) / 1e6)
    fake.always(answer_of(prompt_tokens=10, completion_tokens=10))
    assert await talk(served, bot) == 200


@pytest.mark.usefixtures("reread")
async def test_a_long_answer_that_breaks_off_counts_as_what_it_is(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(CONFIG.replace("URL", fake.url).replace("PRICES", PRICE))
    bot = await served.add_bot(daily_budget_usd=0.25, turn_reserve_usd=0.01)
    thoughts = delta("thought " * 2500, "reasoning_content")
    fake.answer(SSE_HEAD, thoughts, delta("word " * 4000), Pause(0.05), Reset())
    await served.chat(bot, await served.session(bot), "hi", stream=True)
    assert await spent(served, bot) == pytest.approx(10_000 * 30 / 1e6, rel=THOUSANDTH)
    refused = await served.chat(bot, await served.session(bot), "hi")
    assert_problem(refused, 429, "budget_exhausted")


async def test_a_price_is_learnt_from_what_answers_cost(serve: Serve, fake: FakeProvider) -> None:
    served = await serve(OPENROUTER.replace("URL", fake.url))
    bot = await served.add_bot(daily_budget_usd=1, turn_reserve_usd=0.05)
    fake.answer(answer_of(prompt_tokens=1000, completion_tokens=10, cost=0.001))
    fake.answer(answer_of(prompt_tokens=10, completion_tokens=100, cost=0.002))
    assert [await talk(served, bot) for _ in range(2)] == [200, 200]
    fake.always(SSE_HEAD, delta("word " * 80), Hold())
    await stopped(served, bot)
    # At most: 54 tokens for a millionth of a USD and 100 for 20 millionths.
    assert await spent(served, bot) == pytest.approx(0.003 + (54 + 100 * 20) / 1e6)


@pytest.mark.parametrize(
    ("prices", "stream"), [("[]", True), (PRICE, False)], ids=["no price", "in one piece"]
)
async def test_what_cannot_be_guessed_counts_as_the_reserve(
    serve: Serve, fake: FakeProvider, prices: str, stream: bool
) -> None:
    served = await serve(CONFIG.replace("URL", fake.url).replace("PRICES", prices))
    bot = await served.add_bot(daily_budget_usd=1, turn_reserve_usd=0.05)
    fake.always(SSE_HEAD, delta("word " * 80), Hold())
    await stopped(served, bot, stream=stream)
    assert await spent(served, bot) == 0.05


async def test_a_provider_that_costs_nothing_costs_nothing_when_it_is_stopped(serve: Serve) -> None:
    config = ECHO_CONFIG.replace("reply:", "word_seconds: 0.1, reply:")
    served = await serve(config)
    bot = await served.add_bot(daily_budget_usd=0.01, turn_reserve_usd=0.05)
    for _ in range(2):
        assert (await stopped(served, bot)).usage.cost_usd == 0
    assert await talk(served, bot) == 200
    # Nor is it taken for spent by who learns it from storage.
    assert await talk(await serve(config), bot) == 200


async def test_a_turn_that_is_stopped_before_anybody_is_asked_counts_nothing(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(CONFIG.replace("URL", fake.url).replace("PRICES", "[]"))
    bot = await served.add_bot(daily_budget_usd=0.01, turn_reserve_usd=0.05)
    turns, session = served.runtime.services.turns, await served.session(bot)
    started = await turns.start(bot, session, [])
    await turns.stop(bot, started.reply.turn_id)
    assert fake.requests == []
    fake.answer(answer_of(prompt_tokens=1, completion_tokens=1))
    assert await talk(served, bot) == 200


async def test_a_cost_that_is_told_afterwards_replaces_the_reserve(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(OPENROUTER.replace("URL", fake.url))
    bot = await served.add_bot(daily_budget_usd=0.04, turn_reserve_usd=0.05)
    fake.answer(SSE_HEAD, chunk("Half an ans"), Hold())
    fake.answer(http_response(200, GENERATION))
    await stopped(served, bot)
    refused = await served.chat(bot, await served.session(bot), "hi")
    assert_problem(refused, 429, "budget_exhausted")
    async with asyncio.timeout(10):
        while await spent(served, bot) != pytest.approx(0.00125):
            await asyncio.sleep(0.05)
    fake.answer(answer_of(prompt_tokens=1, completion_tokens=1, cost=0))
    assert await talk(served, bot) == 200


async def test_a_turn_with_tools_is_held_and_counted(serve: Serve, fake: FakeProvider) -> None:
    served = await serve(CONFIG.replace("URL", fake.url).replace("PRICES", PRICE))
    bot = await served.add_bot(daily_budget_usd=0.06, turn_reserve_usd=0.05)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    asked = {
        "model": "default",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [tool],
    }
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    choice = {
        "message": {"role": "assistant", "content": None, "tool_calls": [call]},
        "finish_reason": "tool_calls",
    }
    usage = {"prompt_tokens": 500, "completion_tokens": 2000}
    whole = http_response(200, json.dumps({"choices": [choice], "usage": usage}).encode())
    fake.always(Pause(0.3), whole)
    bearer = {"Authorization": f"Bearer {KEY}"}

    async def ask() -> Any:
        return await served.post("/v1/chat/completions", asked, headers=bearer)

    first, second = await asyncio.gather(ask(), ask())
    answers = sorted((first, second), key=lambda answer: answer.status)
    # The reserve of the first leaves no room for the second while it runs.
    assert [answer.status for answer in answers] == [200, 429]
    assert answers[1].json["error"]["code"] == "rate_limit_exceeded"
    assert answers[0].json["choices"][0]["finish_reason"] == "tool_calls"
    assert await spent(served, bot) == pytest.approx(0.061)
    refused = await ask()
    assert (refused.status, refused.json["error"]["code"]) == (429, "budget_exhausted")


async def test_tools_that_are_called_count_in_an_answer_that_breaks_off(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(CONFIG.replace("URL", fake.url).replace("PRICES", PRICE))
    bot = await served.add_bot(daily_budget_usd=1, turn_reserve_usd=0.05)
    function = {"name": "look", "arguments": '{"for": "' + "x" * 40_000}
    call = {"index": 0, "id": "c1", "type": "function", "function": function}
    fake.answer(SSE_HEAD, sse({"choices": [{"delta": {"tool_calls": [call]}}]}), Reset())
    asked = {
        "model": "default",
        "stream": True,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }
    bearer = {"Authorization": f"Bearer {KEY}"}
    await served.post("/v1/chat/completions", asked, headers=bearer)
    assert await spent(served, bot) == pytest.approx(10_000 * 30 / 1e6, rel=THOUSANDTH * 3)
