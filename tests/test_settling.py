"""What an answer took that was broken off, as OpenRouter tells it afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chatd.domain import TurnStatus, Usage
from chatd.storage import TurnRecord
from chatd.testing.fake_provider import (
    SSE_HEAD,
    FakeProvider,
    Hold,
    Pause,
    Reset,
    http_response,
    sse,
)
from tests.conftest import Serve
from tests.support import Served

ID = "gen-1234-abcd"
GENERATION = {
    "data": {
        "id": ID,
        "total_cost": 0.00125,
        "native_tokens_prompt": 20,
        "native_tokens_completion": 7,
        "native_tokens_cached": 4,
        "native_tokens_reasoning": 2,
        "tokens_prompt": 99,
        "tokens_completion": 99,
    }
}
CONFIG = """
storage: %(storage)s
providers:
  main: {use: openrouter, api_key: sk-or-test, base_url: "URL/api/v1", retries: {attempts: 1}}
models:
  - {match: "*", ask: [main]}
"""
RECORDED = """
storage: %(storage)s
providers:
  main: {use: record, file: "FILE", of: {use: openrouter, api_key: sk-or-test, base_url: "URL/api/v1"}}
models:
  - {match: "*", ask: [main]}
"""


def chunk(text: str) -> bytes:
    return sse({"id": ID, "model": "test/model", "choices": [{"delta": {"content": text}}]})


async def settled(served: Served, session: str) -> TurnRecord:
    """The last turn, once its cost is known."""
    for _ in range(200):
        turn = await served.last_turn(served.bots[0], session)
        if turn.usage.cost_usd is not None:
            return turn
        await asyncio.sleep(0.05)
    raise AssertionError("the cost was never learned")


async def test_the_cost_of_a_broken_answer_is_asked_for_until_it_is_known(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(CONFIG.replace("URL", fake.url))
    bot = await served.add_bot()
    session = await served.session(bot)
    fake.answer(SSE_HEAD, chunk("Half an ans"), Pause(0.05), Reset())
    fake.answer(http_response(404, {"error": {"code": 404, "message": "not yet"}}))
    fake.answer(http_response(200, GENERATION))
    got = await served.chat(bot, session, "Hi")
    # It is not known yet, and so it is not 0.
    assert got.json["usage"]["cost_usd"] is None
    turn = await settled(served, session)
    assert (turn.status, turn.reply) == (TurnStatus.INTERRUPTED, "Half an ans")
    assert turn.usage == Usage(20, 7, 4, 2, 0.00125)
    assert [request.path for request in fake.requests[1:]] == [
        f"/api/v1/generation?id={ID}",
        f"/api/v1/generation?id={ID}",
    ]
    assert fake.requests[2].headers["authorization"] == "Bearer sk-or-test"


async def test_the_cost_of_a_stopped_answer_is_learned_too(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(CONFIG.replace("URL", fake.url))
    bot = await served.add_bot(on_disconnect="stop")
    session = await served.session(bot)
    fake.answer(SSE_HEAD, chunk("Half an ans"), Hold())
    fake.answer(http_response(200, GENERATION))
    asked = asyncio.create_task(served.chat(bot, session, "Hi", stream=True))
    await fake.received(1)
    await asyncio.sleep(0.2)
    asked.cancel()
    turn = await settled(served, session)
    assert (turn.status, turn.reply, turn.usage.cost_usd) == (
        TurnStatus.STOPPED,
        "Half an ans",
        0.00125,
    )


async def test_a_whole_answer_is_not_asked_for(serve: Serve, fake: FakeProvider) -> None:
    served = await serve(CONFIG.replace("URL", fake.url))
    bot = await served.add_bot()
    usage = sse({"id": ID, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
    end = sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}) + usage + sse("[DONE]")
    fake.answer(SSE_HEAD, chunk("Hello!"), end)
    assert (await served.chat(bot, await served.session(bot), "Hi")).status == 200
    await asyncio.sleep(1.3)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("text", [CONFIG, RECORDED], ids=["itself", "within record"])
async def test_a_chatbots_options_reach_the_provider_they_are_for(
    serve: Serve, fake: FakeProvider, tmp_path: Path, text: str
) -> None:
    served = await serve(text.replace("URL", fake.url).replace("FILE", str(tmp_path / "a.jsonl")))
    options = {"models": ["a/b", "c/d"], "provider": {"sort": "price"}}
    bot = await served.add_bot(provider_options={"openrouter": options, "other": {"x": 1}})
    fake.always(SSE_HEAD, chunk("Hello!"), sse("[DONE]"))
    await served.chat(bot, await served.session(bot), "Hi")
    sent = fake.requests[0].json
    assert (sent["models"], sent["provider"]) == (["a/b", "c/d"], {"sort": "price"})
    assert "x" not in sent and "other" not in sent
