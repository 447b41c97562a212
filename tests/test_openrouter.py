"""What only OpenRouter has: answers with ids, what they took, routing for each chatbot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chatd_plugins.openai_compatible import open_openai_compatible
from chatd_plugins.openrouter import open_openrouter
from openrouter.components import ChatRequest, GenerationResponseData, ProviderPreferences
from tornado.ioloop import IOLoop

import chatd
from chatd.domain import ChatbotSettings, Message, Usage
from chatd.provider import Finish, GenerationId, Provider, ProviderRequest, TextDelta
from chatd.registry import load_registry
from chatd.testing.fake_provider import SSE_HEAD, FakeProvider, Hold, http_response, sse
from chatd.testing.provider import collect, failure
from tests.support import chatd_command

KEY = "sk-or-v1-0123456789abcdef"
SAID = {"id": "gen-1", "choices": [{"delta": {"content": "Hello!"}}]}
ENDED = {"id": "gen-1", "choices": [{"delta": {}, "finish_reason": "stop"}]}
WITH_ID = SSE_HEAD.replace(b"Cache", b"X-Generation-Id: gen-head\r\nCache")


def ask(stream: bool = True, **more: Any) -> ProviderRequest:
    return ProviderRequest("a/b", [Message("user", "Hi")], stream=stream, **more)


@pytest.fixture
def provider(io_loop: IOLoop, fake: FakeProvider) -> Iterator[Any]:
    provider = io_loop.run_sync(lambda: open_openrouter({"base_url": fake.url, "api_key": KEY}))
    yield provider
    io_loop.run_sync(provider.close)


# Ids


@pytest.mark.parametrize(
    ("head", "id"), [(SSE_HEAD, "gen-1"), (WITH_ID, "gen-head")], ids=["in-chunks", "in-a-header"]
)
async def test_a_streams_id_comes_once_and_before_any_of_it(
    provider: Provider, fake: FakeProvider, head: bytes, id: str
) -> None:
    fake.answer(head, b": OPENROUTER PROCESSING\n\n", sse(SAID, ENDED, "[DONE]"))
    assert await collect(provider, ask()) == [
        GenerationId(id),
        TextDelta("Hello!"),
        Finish("stop", None),
    ]


async def test_the_id_in_the_header_comes_before_the_first_token_is_there(
    provider: Provider, fake: FakeProvider
) -> None:
    fake.answer(WITH_ID, Hold())
    events = provider.stream(ask())
    assert await anext(events) == GenerationId("gen-head")
    await events.aclose()


async def test_the_id_of_an_answer_in_one_piece_comes_first(
    provider: Provider, fake: FakeProvider
) -> None:
    choice = {"message": {"content": "Hello!"}, "finish_reason": "stop"}
    fake.answer(http_response(200, {"id": "gen-2", "choices": [choice]}))
    events = await collect(provider, ask(stream=False))
    assert events[:2] == [GenerationId("gen-2"), TextDelta("Hello!")]


@pytest.mark.parametrize("id", [None, 7, "", "a b", "é", "x" * 201, "a\nb"])
async def test_what_is_no_id_is_passed_over(
    provider: Provider, fake: FakeProvider, id: Any
) -> None:
    fake.answer(SSE_HEAD, sse({**SAID, "id": id}, {**ENDED, "id": id}, "[DONE]"))
    assert await collect(provider, ask()) == [TextDelta("Hello!"), Finish("stop", None)]


async def test_other_servers_ids_are_not_told(io_loop: IOLoop, fake: FakeProvider) -> None:
    provider = await open_openai_compatible({"base_url": fake.url})
    fake.answer(WITH_ID, sse(SAID, ENDED, "[DONE]"))
    events = await collect(provider, ask())
    await provider.close()
    assert events == [TextDelta("Hello!"), Finish("stop", None)]
    assert not hasattr(provider, "generation")


# What an answer took

GENERATION = {
    "id": "gen-1",
    "model": "a/b",
    "total_cost": 0.0015,
    "usage": 0.0015,
    "tokens_prompt": 10,
    "tokens_completion": 5,
    "native_tokens_prompt": 11,
    "native_tokens_completion": 7,
    "native_tokens_cached": 3,
    "native_tokens_reasoning": 2,
    "created_at": "2026-01-01T00:00:00Z",
    "data_region": "global",
    "is_byok": False,
    "origin": "",
}


async def test_what_an_answer_took_is_asked_by_its_id(provider: Any, fake: FakeProvider) -> None:
    nothing = {
        name: None
        for name, field in GenerationResponseData.model_fields.items()
        if field.is_required()
    }
    body = {"data": {**nothing, **GENERATION}}
    GenerationResponseData.model_validate(body["data"])
    fake.answer(http_response(200, body))
    usage = await provider.generation("gen-1&x=/?é")
    assert usage == Usage(11, 7, cached_tokens=3, reasoning_tokens=2, cost_usd=0.0015)
    [asked] = fake.requests
    assert (asked.method, asked.path) == ("GET", "/generation?id=gen-1%26x%3D/?%C3%A9")
    assert asked.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "answer",
    [
        http_response(404, {"error": {"code": 404, "message": "Generation gen-1 not found"}}),
        http_response(404, "nothing here"),
        http_response(200, {"data": None}),
        http_response(200, {"data": {"native_tokens_prompt": None, "total_cost": "?"}}),
    ],
)
async def test_what_an_answer_took_is_none_as_long_as_it_is_not_known(
    provider: Any, fake: FakeProvider, answer: bytes
) -> None:
    fake.answer(answer)
    assert await provider.generation("gen-1") is None


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (http_response(401, {"error": {"code": 401, "message": f"dead {KEY}"}}), "authentication"),
        (http_response(500), "overloaded"),
        (http_response(200, "<html>"), "protocol"),
        (http_response(307, b"", {"Location": "/elsewhere"}), "protocol"),
    ],
)
async def test_asking_what_an_answer_took_fails_as_the_error_it_is(
    provider: Any, fake: FakeProvider, answer: bytes, kind: str
) -> None:
    fake.answer(answer)
    with pytest.raises(chatd.ProviderError) as raised:
        await provider.generation("gen-1")
    assert raised.value.kind == kind and KEY not in str(raised.value)


async def test_asking_what_an_answer_took_does_not_wait_for_ever(
    provider: Any, fake: FakeProvider
) -> None:
    fake.answer(b"HTTP/1.1 200 OK\r\n", Hold())
    with pytest.raises(chatd.ProviderError) as raised:
        await provider.get("/generation?id=gen-1", seconds=0.2)
    assert raised.value.kind == "timeout"
    await fake.requests[0].closed_within(5)


# Routing

PREFERENCES = {
    "order": ["acme", "other/turbo"],
    "only": ["acme"],
    "ignore": ["slow"],
    "allow_fallbacks": False,
    "require_parameters": True,
    "data_collection": "deny",
    "zdr": True,
    "enforce_distillable_text": False,
    "quantizations": ["fp8", "bf16"],
    "sort": {"by": "price", "partition": "none"},
    "max_price": {"prompt": 1, "completion": "2.50", "request": 0.0000001},
    "preferred_min_throughput": 30,
    "preferred_max_latency": {"p50": 1.5, "p99": 4},
}


async def test_a_chatbots_models_and_preferences_are_in_the_body(
    provider: Provider, fake: FakeProvider
) -> None:
    options = {"models": ["c/d", "e/f"], "provider": PREFERENCES}
    schema = load_registry().providers["openrouter"].options
    assert schema is not None and schema.faults(options) == []
    fake.always(http_response(500))
    await failure(provider, ask(options=options))
    body = fake.requests[0].json
    parsed = ChatRequest.model_validate(body)
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == body
    assert (body["model"], body["models"]) == ("a/b", ["c/d", "e/f"])
    assert body["provider"] == {
        **PREFERENCES,
        "max_price": {"prompt": "1", "completion": "2.50", "request": "0.0000001"},
    }
    await failure(provider, ask())
    assert fake.requests[1].json.keys().isdisjoint({"models", "provider"})


def test_every_preference_that_openrouters_sdk_knows_can_be_given() -> None:
    schema = load_registry().providers["openrouter"].options
    assert schema is not None
    known = schema.document["properties"]["provider"]["properties"]
    # Parameters of the services behind it are not a matter of routing.
    assert (
        known.keys() == PREFERENCES.keys() == ProviderPreferences.model_fields.keys() - {"options"}
    )


async def test_a_chatbots_preferences_are_put_over_the_servers_key_by_key(
    io_loop: IOLoop, fake: FakeProvider
) -> None:
    parameters = {"models": ["x/y"], "provider": {"data_collection": "deny", "sort": "price"}}
    provider = await open_openrouter(
        {"base_url": fake.url, "api_key": KEY, "parameters": parameters}
    )
    fake.always(http_response(500))
    await failure(provider, ask(options={"provider": {"sort": "latency"}}))
    await provider.close()
    assert fake.requests[0].json["models"] == ["x/y"]
    assert fake.requests[0].json["provider"] == {"data_collection": "deny", "sort": "latency"}


# Setting them


def bots(folder: Path, *words: str) -> Any:
    return chatd_command("bots", *words, cwd=folder)


def test_provider_options_are_kept_shown_and_taken_back(tmp_path: Path) -> None:
    options = {"openrouter": {"models": ["a/b", "c/d"], "provider": {"order": ["acme"]}}}
    added = bots(tmp_path, "add", "--name", "B", "--provider-options", json.dumps(options))
    assert added.returncode == 0, added.stderr
    assert bots(tmp_path, "set", "B", "--temperature", "0.5").returncode == 0
    assert json.loads(bots(tmp_path, "show", "B", "--json").stdout)["provider_options"] == options
    assert f"provider_options   {json.dumps(options)}" in bots(tmp_path, "show", "B").stdout
    (tmp_path / "options.json").write_text('{"openrouter": {"models": ["e/f"]}}')
    assert bots(tmp_path, "set", "B", "--provider-options", "@options.json").returncode == 0
    shown = json.loads(bots(tmp_path, "show", "B", "--json").stdout)
    assert shown["provider_options"] == {"openrouter": {"models": ["e/f"]}}
    assert bots(tmp_path, "set", "B", "--provider-options", "default").returncode == 0
    assert json.loads(bots(tmp_path, "show", "B", "--json").stdout)["provider_options"] is None


def test_provider_options_that_no_plugin_takes_are_refused_with_every_fault(
    tmp_path: Path,
) -> None:
    bots(tmp_path, "add", "--name", "B")
    bad = {
        "openruter": {},
        "echo": {"loud": True},
        "openrouter": {
            "modles": ["a/b"],
            "models": "a/b",
            "provider": {"order": [], "zdr": 1, "sort": "prise", "max_price": {"prompt": "cheap"}},
        },
    }
    told = bots(tmp_path, "set", "B", "--provider-options", json.dumps(bad))
    assert told.returncode == 1
    assert told.stderr.splitlines() == [
        "chatd: --provider-options " + fault
        for fault in (
            'no plugin offers the provider "openruter", did you mean "openrouter"?',
            'the provider "echo" takes no options',
            '/openrouter/modles: unknown key, did you mean "models"?',
            "/openrouter/models: must be a list",
            "/openrouter/provider/max_price/prompt: must be a price in dollars like 0.5",
            "/openrouter/provider/order: must not be empty",
            '/openrouter/provider/sort: must be one of "price", "throughput", "latency", "exacto"',
            "/openrouter/provider/zdr: must be true or false",
        )
    ]
    assert json.loads(bots(tmp_path, "show", "B", "--json").stdout)["provider_options"] is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "--provider-options: it is not valid JSON"),
        ("", "--provider-options: it is empty"),
        ('{"openrouter": {"models": ["\\u0000"]}}', "U+0000"),
        ("[1]", "--provider-options: must be an object or null"),
        ('{"openrouter": 1}', "--provider-options /openrouter: must be an object"),
        ('{"echo": {}, "a/b": []}', "--provider-options /a~1b: must be an object"),
        ("@missing.json", "--provider-options @missing.json: cannot be read"),
    ],
)
def test_what_is_no_object_of_options_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    told = bots(tmp_path, "add", "--provider-options", text)
    assert told.returncode == 1 and fault in told.stderr


PLUGIN = """
import chatd

async def open(settings): ...

@chatd.hookimpl
def chatd_register_HOOK(register):
    register.add("mine", open, {}, "mine", options_schema=SCHEMA)
"""


def test_a_plugin_says_what_options_it_takes(tmp_path: Path) -> None:
    source = PLUGIN.replace("HOOK", "provider").replace("SCHEMA", "{'required': ['a']}")
    (tmp_path / "mine.py").write_text(source)
    options = load_registry(tmp_path).providers["mine"].options
    assert options is not None and options.faults({}) == [(("a",), "is required")]


@pytest.mark.parametrize(
    ("hook", "schema", "fault"),
    [
        ("provider", "{'type': 'thing'}", 'options_schema of "mine" is not a JSON Schema'),
        ("storage", "{}", "which only providers have"),
    ],
)
def test_options_that_cannot_be_are_told_at_the_start(
    tmp_path: Path, hook: str, schema: str, fault: str
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.replace("HOOK", hook).replace("SCHEMA", schema))
    with pytest.raises(chatd.PluginError, match=fault):
        load_registry(tmp_path)


def test_provider_options_are_among_the_settings_that_storages_keep() -> None:
    settings = ChatbotSettings(provider_options={"openrouter": {"models": ["a/b"]}})
    assert settings.to_json() == {"provider_options": {"openrouter": {"models": ["a/b"]}}}
    assert ChatbotSettings.from_json(settings.to_json()) == settings
