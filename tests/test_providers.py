"""The bundled providers: held to the contract, against a mock that answers as OpenRouter does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from chatd_plugins.anthropic import open_anthropic
from chatd_plugins.echo import open_echo
from chatd_plugins.openai_compatible import open_openai_compatible
from chatd_plugins.openrouter import open_openrouter
from openrouter.components import ChatRequest, ChatResult, ChatStreamChunk
from tornado.ioloop import IOLoop

import chatd
from chatd.domain import Message, Usage, new_id
from chatd.provider import Finish, Provider, ProviderRequest, ReasoningDelta, UsageReport
from chatd.testing import HttpProviderConformance, ProviderCase, ProviderConformance
from chatd.testing.fake_provider import FakeProvider, http_response
from chatd.testing.provider import collect, failure, text_of
from tests.conftest import Serve
from tests.support import clean_env

AIMOCK = Path(__file__).parent.parent / "node_modules" / ".bin" / "aimock"
KEY = "sk-or-v1-0123456789abcdef"
QUESTION = "Say hello."
ANSWER = "Hello from the mock, with an é and a 😀 in it."
ASKED, ANSWERED_BY = "openai/gpt-4o", "openai/gpt-4o-2024-08-06"
USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "total_tokens": 18,
    "cost": 0.00042,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
FIXTURES = {
    "fixtures": [
        {
            "match": {"userMessage": QUESTION},
            "response": {
                "content": ANSWER,
                "model": ANSWERED_BY,
                "reasoning": "They want a greeting.",
                "usage": USAGE,
            },
        },
        {
            "match": {"userMessage": "Fail with "},
            "response": {"error": {"message": "no credit left", "type": "x"}, "status": 402},
        },
    ]
}


class Aimock:
    """A running mock, and what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def asked_by(self, user: str) -> list[dict[str, Any]]:
        """The requests with this `user`, oldest first, each with its body as it came."""
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{self.url}/__aimock/journal") as answer,
        ):
            entries = [e for e in await answer.json() if (e["body"] or {}).get("user") == user]
        for entry in entries:
            # The mock's own note.
            entry["body"].pop("_endpointType")
        return entries


@pytest.fixture(scope="module")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aimock]:
    """aimock in a process of its own, on a free port."""
    assert AIMOCK.exists(), "aimock is not installed: `npm ci` installs it"
    folder = tmp_path_factory.mktemp("aimock")
    (folder / "fixtures.json").write_text(json.dumps(FIXTURES))
    config = {"port": 0, "llm": {"fixtures": "fixtures.json", "chunkSize": 5}}
    (folder / "aimock.json").write_text(json.dumps(config))
    with subprocess.Popen(
        [str(AIMOCK), "--config", "aimock.json"],
        cwd=folder,
        env={k: v for k, v in clean_env().items() if not k.startswith("AIMOCK_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"listening on (http://\S+)", line):
                break
        else:
            pytest.fail(f"aimock did not start: {said}")
        yield Aimock(found[1])
        os.kill(process.pid, signal.SIGKILL)


def openrouter_at(aimock: Aimock, **settings: Any) -> Awaitable[Provider]:
    return open_openrouter({"base_url": f"{aimock.url}/api/v1", "api_key": KEY, **settings})


def ask(
    question: str = QUESTION, *, stream: bool = True, user: str | None = None
) -> ProviderRequest:
    return ProviderRequest(
        ASKED,
        [
            Message("system", "Answer briefly."),
            Message("user", "Hi."),
            Message("assistant", "Hi!"),
            Message("user", question),
        ],
        stream=stream,
        max_output_tokens=100,
        temperature=0.5,
        user=user,
        session_id=new_id(),
    )


class TestEcho(ProviderConformance):
    @pytest.fixture
    def case(self) -> ProviderCase:
        return ProviderCase(
            open=lambda: open_echo({"reply": "You said: {message}"}),
            question="  two  spaces ",
            answer="You said:   two  spaces ",
            answered_by="echo",
            usage=Usage(cost_usd=0.0),
        )


class TestEchoOfNothingButSpace(ProviderConformance):
    @pytest.fixture
    def case(self) -> ProviderCase:
        return ProviderCase(
            open=lambda: open_echo({"reply": "{message}"}),
            question="  ",
            answer="  ",
            answered_by="echo",
            usage=Usage(cost_usd=0.0),
        )


class TestSlowEcho(ProviderConformance):
    @pytest.fixture
    def case(self) -> ProviderCase:
        return ProviderCase(
            open=lambda: open_echo({"word_seconds": 0.01, "reply": "I heard: {message}"}),
            answer="I heard: Say hello.",
            answered_by="echo",
            usage=Usage(cost_usd=0.0),
        )


class TestOpenRouter(ProviderConformance):
    @pytest.fixture
    def case(self, aimock: Aimock) -> ProviderCase:
        return ProviderCase(
            open=lambda: openrouter_at(aimock),
            model=ASKED,
            question=QUESTION,
            answer=ANSWER,
            answered_by=ANSWERED_BY,
            usage=Usage(11, 7, cached_tokens=3, reasoning_tokens=2, cost_usd=0.00042),
        )


class TestOpenAICompatible(ProviderConformance):
    @pytest.fixture
    def case(self, aimock: Aimock) -> ProviderCase:
        return ProviderCase(
            open=lambda: open_openai_compatible({"base_url": f"{aimock.url}/v1"}),
            model=ASKED,
            question=QUESTION,
            answer=ANSWER,
            answered_by=ANSWERED_BY,
            # OpenAI's own usage has no cost.
            usage=Usage(11, 7),
        )


class TestAnthropic(ProviderConformance):
    @pytest.fixture
    def case(self, aimock: Aimock) -> ProviderCase:
        return ProviderCase(
            open=lambda: open_anthropic({"base_url": aimock.url, "api_key": KEY}),
            model="claude-haiku-4-5",
            question=QUESTION,
            answer=ANSWER,
            answered_by=ANSWERED_BY,
            usage=Usage(11, 7),
        )


class TestAnthropicOverHttp(HttpProviderConformance):
    @pytest.fixture
    def open_at(self) -> Callable[[str], Awaitable[Provider]]:
        return lambda url: open_anthropic({"base_url": url, "api_key": self.key})


class TestOpenRouterOverHttp(HttpProviderConformance):
    @pytest.fixture
    def open_at(self) -> Callable[[str], Awaitable[Provider]]:
        return lambda url: open_openrouter({"base_url": url, "api_key": self.key})


class TestOpenAICompatibleOverHttp(HttpProviderConformance):
    @pytest.fixture
    def open_at(self) -> Callable[[str], Awaitable[Provider]]:
        return lambda url: open_openai_compatible({"base_url": url, "api_key": self.key})


async def test_an_echo_says_plainly_that_it_is_one(io_loop: IOLoop) -> None:
    said = text_of(await collect(await open_echo({}), ask("Good day!")))
    assert "echo, not a model" in said and "Good day!" in said and "OPENROUTER_API_KEY" in said


@pytest.fixture
def provider(io_loop: IOLoop, aimock: Aimock) -> Iterator[Provider]:
    """The OpenRouter provider, asking the mock."""
    provider = io_loop.run_sync(
        lambda: openrouter_at(aimock, app_title="Tests", app_url="https://site.example")
    )
    yield provider
    io_loop.run_sync(provider.close)


def assert_openrouter_takes(body: dict[str, Any]) -> None:
    """The official SDK's model has a place for every field, and takes what is in it."""
    parsed = ChatRequest.model_validate(body)
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == body


@pytest.mark.parametrize("stream", [True, False])
async def test_openrouters_own_sdk_takes_the_body_that_is_sent(
    provider: Provider, aimock: Aimock, stream: bool
) -> None:
    user = new_id()
    request = ask(stream=stream, user=user)
    await collect(provider, request)
    [asked] = await aimock.asked_by(user)
    assert asked["path"] == "/api/v1/chat/completions"
    assert_openrouter_takes(asked["body"])
    assert asked["body"] == {
        "model": ASKED,
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": QUESTION},
        ],
        "stream": stream,
        "max_tokens": 100,
        "temperature": 0.5,
        "user": user,
        "session_id": request.session_id,
    }


async def test_the_parameters_of_the_configuration_are_in_the_body(
    io_loop: IOLoop, aimock: Aimock
) -> None:
    user = new_id()
    parameters = {"top_p": 0.9, "provider": {"sort": "price"}, "models": ["a/b", "c/d"]}
    provider = await openrouter_at(aimock, parameters=parameters)
    await collect(provider, ask(user=user))
    await provider.close()
    [asked] = await aimock.asked_by(user)
    assert_openrouter_takes(asked["body"])
    assert {name: asked["body"][name] for name in parameters} == parameters


async def test_openrouter_is_told_who_asks(provider: Provider, aimock: Aimock) -> None:
    user = new_id()
    await collect(provider, ask(user=user))
    [asked] = await aimock.asked_by(user)
    assert asked["headers"]["x-title"] == "Tests"
    assert asked["headers"]["http-referer"] == "https://site.example"
    assert asked["headers"]["accept-encoding"] == "identity"


async def test_openrouter_is_told_chatd_when_no_title_is_set(
    io_loop: IOLoop, fake: FakeProvider
) -> None:
    provider = await open_openrouter({"base_url": fake.url, "api_key": KEY})
    fake.answer(http_response(500))
    await failure(provider, ask())
    await provider.close()
    [asked] = fake.requests
    assert asked.headers["x-title"] == "chatd"
    assert "http-referer" not in asked.headers
    assert asked.headers["authorization"] == f"Bearer {KEY}"


async def test_openrouter_without_a_key_says_where_to_get_one(io_loop: IOLoop) -> None:
    with pytest.raises(chatd.PluginError, match=r"https://openrouter\.ai/keys"):
        await open_openrouter({"api_key": ""})


async def test_a_compatible_server_is_asked_for_usage_and_sent_the_further_headers(
    io_loop: IOLoop, fake: FakeProvider
) -> None:
    provider = await open_openai_compatible(
        {"base_url": f"{fake.url}/v1/", "headers": {"X-Team": "blue-team"}}
    )
    fake.always(http_response(500))
    await failure(provider, ask(stream=True, user="someone"))
    await failure(provider, ask(stream=False, user="someone"))
    await provider.close()
    streamed, plain = fake.requests
    assert streamed.path == plain.path == "/v1/chat/completions"
    assert streamed.json["stream_options"] == {"include_usage": True}
    assert "stream_options" not in plain.json
    assert streamed.json["user"] == "someone"
    # A field that OpenAI does not know is refused by some servers.
    assert "session_id" not in streamed.json
    assert streamed.headers["x-team"] == "blue-team"
    assert "authorization" not in streamed.headers


@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_model_thinks_is_not_part_of_its_answer(
    provider: Provider, stream: bool
) -> None:
    events = await collect(provider, ask(stream=stream))
    thought = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    assert thought == "They want a greeting."
    assert text_of(events) == ANSWER
    assert isinstance(events[-2], UsageReport)
    assert events[-1] == Finish("stop", ANSWERED_BY)


async def test_an_error_of_openrouters_is_told_as_its_kind(provider: Provider) -> None:
    error = await failure(provider, ask("Fail with the account's credit."))
    assert (error.kind, error.status) == (chatd.ProviderErrorKind.CREDIT, 402)
    assert "no credit left" in error.detail
    assert KEY not in error.detail and "Fail with" not in error.detail


async def test_the_mock_answers_in_openrouters_own_shape(io_loop: IOLoop, aimock: Aimock) -> None:
    """Else the tests above would show little."""
    body = {"model": ASKED, "messages": [{"role": "user", "content": QUESTION}]}
    url = f"{aimock.url}/api/v1/chat/completions"
    async with aiohttp.ClientSession() as http:
        async with http.post(url, json=body) as plain:
            result = ChatResult.model_validate(await plain.json())
        async with http.post(url, json={**body, "stream": True}) as streamed:
            lines = (await streamed.text()).splitlines()
    datas = [line.removeprefix("data: ") for line in lines if line]
    chunks = [ChatStreamChunk.model_validate_json(data) for data in datas[:-1]]
    assert result.usage is not None and result.usage.cost == USAGE["cost"]
    assert chunks[-1].usage is not None and chunks[-1].usage.cost == USAGE["cost"]
    assert datas[-1] == "[DONE]"


async def test_a_turn_through_openrouter_is_stored_with_what_it_cost(
    serve: Serve, aimock: Aimock
) -> None:
    served = await serve(f"""
storage: %(storage)s
providers:
  main: {{use: openrouter, api_key: "{KEY}", base_url: "{aimock.url}/api/v1"}}
models:
  - {{match: "*", ask: [main]}}
""")
    bot = await served.add_bot(model=ASKED, system_prompt="Answer briefly.")
    user = new_id()
    session = await served.session(bot, user_id=user)
    answer = await served.chat(bot, session, QUESTION)
    assert answer.status == 200
    assert answer.json["response"] == ANSWER
    assert answer.json["model"] == ANSWERED_BY
    assert answer.json["usage"] == {
        "input_tokens": 11,
        "output_tokens": 7,
        "cached_tokens": 3,
        "reasoning_tokens": 2,
        "cost_usd": 0.00042,
    }
    turn = await served.runtime.services.storage.get_turn(answer.json["turn_id"], bot.id)
    assert turn is not None
    assert turn.usage == Usage(11, 7, cached_tokens=3, reasoning_tokens=2, cost_usd=0.00042)
    assert (turn.model, turn.provider, turn.finish_reason) == (ANSWERED_BY, "main", "stop")


async def test_a_visitors_own_id_stays_here_and_a_pseudonym_goes_to_the_provider(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(f"""
storage: %(storage)s
providers:
  main: {{use: openrouter, api_key: "{KEY}", base_url: "{fake.url}"}}
models:
  - {{match: "*", ask: [main]}}
""")
    fake.always(http_response(400))
    one, other = await served.add_bot(key="one"), await served.add_bot(key="other")
    users = []
    for bot, key in ((one, "one"), (one, "one"), (other, "other")):
        session = await served.session(bot, key=key, user_id="ann@site.example")
        await served.chat(bot, session, "Hello", key=key)
        # Not the id itself, which opens a widget's session.
        assert fake.requests[-1].json["session_id"] not in ("", session)
        users.append(fake.requests[-1].json["user"])
    assert users[0] == users[1] != users[2]
    assert not any(b"ann" in request.body for request in fake.requests)
