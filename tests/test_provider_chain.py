"""Many turns through a chain of three servers of others, two of which fail again and again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatd.domain import Chatbot, TurnStatus
from chatd.storage import TurnRecord
from tests import test_providers
from tests.conftest import Serve
from tests.gateways import LITELLM_KEY, Llmock, litellm, llmock
from tests.support import Served
from tests.test_providers import ANSWER, KEY, QUESTION, Aimock

aimock = test_providers.aimock
SESSIONS, TURNS = 20, 25
FROM_LITELLM = "From the gateway."
CONFIG = """
storage: %(storage)s
providers:
  mock:
    use: openai_compatible
    base_url: "LLMOCK/v1"
    retries: {attempts: 2, base: 0.01}
    breaker: {share: 1}
  gateway:
    use: openai_compatible
    base_url: "LITELLM/v1"
    api_key: LITELLM_KEY
    retries: {attempts: 1}
    breaker: {share: 1}
  last: {use: openrouter, base_url: "AIMOCK/api/v1", api_key: OPENROUTER_KEY}
models:
  - {match: "*", ask: [mock, gateway, last]}
"""


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llmock]:
    """An llmock that fails half of its requests."""
    rates = (f"{status}={rate}" for status, rate in ((503, 0.3), (500, 0.1), (429, 0.1)))
    options = [option for rate in rates for option in ("--error-rate", rate)]
    with llmock(tmp_path_factory.mktemp("llmock"), *options) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with litellm(tmp_path_factory.mktemp("litellm"), FROM_LITELLM) as url:
        yield url


async def talk(served: Served, bot: Chatbot, number: int) -> str:
    """A session of many turns, plain and streamed in turn."""
    session = await served.session(bot)
    for turn in range(TURNS):
        stream = turn % 2 == 1
        said = f"{QUESTION} This is turn {turn} of session {number}."
        answer = await served.chat(bot, session, said, stream=stream)
        assert answer.status == 200, answer.body
        if stream:
            assert b'"type":"finish"' in answer.body and b'"type":"error"' not in answer.body
        else:
            assert answer.json["response"] and answer.json["finish_reason"] == "stop"
    return session


async def turns_of(served: Served, bot: Chatbot, session: str) -> list[TurnRecord]:
    storage = served.runtime.services.storage
    page = await storage.list_messages(session, bot.id, limit=1000)
    assert [message.role for message in page.data] == ["user", "assistant"] * TURNS
    assert all(message.content for message in page.data)
    ids = dict.fromkeys(message.turn_id or "" for message in page.data)
    turns = [await storage.get_turn(id, bot.id) for id in ids]
    return [turn for turn in turns if turn is not None]


async def test_500_turns_through_a_chain_that_fails_at_every_place_are_500_answers(
    serve: Serve, tmp_path: Path, mock: Llmock, gateway: str, aimock: Aimock
) -> None:
    text = CONFIG.replace("LLMOCK", mock.url).replace("LITELLM_KEY", LITELLM_KEY)
    text = text.replace("LITELLM", gateway).replace("OPENROUTER_KEY", KEY)
    served = await serve(text.replace("AIMOCK", aimock.url))
    bot = await served.add_bot()
    sessions = await asyncio.gather(*(talk(served, bot, number) for number in range(SESSIONS)))
    turns = [turn for session in sessions for turn in await turns_of(served, bot, session)]
    assert len(turns) == SESSIONS * TURNS
    assert {turn.status for turn in turns} == {TurnStatus.COMPLETED}
    # Each has the attempts that it took, of which the last one went well.
    for turn in turns:
        *failed, answered = turn.attempts
        assert answered["error"] is None and answered["provider"] == turn.provider
        assert all(attempt["error"] in ("overloaded", "rate_limit") for attempt in failed)
    # All three were needed, and said what they are made to say.
    answers = Counter(turn.provider for turn in turns)
    assert set(answers) == {"mock", "gateway", "last"}
    assert {turn.reply for turn in turns if turn.provider == "gateway"} == {FROM_LITELLM}
    assert {turn.reply for turn in turns if turn.provider == "last"} == {ANSWER}
    # What is recorded is what was asked: nothing twice, nothing unseen.
    asked = Counter(attempt["provider"] for turn in turns for attempt in turn.attempts)
    verdict = await mock.verdict()
    assert verdict["attempts"] == asked["mock"]
    assert verdict["errors"] == 0, verdict
