"""Anthropic's wire format: what is sent, and what is read, over a real socket."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chatd_plugins.anthropic import open_anthropic
from openrouter.components import MessagesRequest
from tornado.ioloop import IOLoop

import chatd
from chatd.domain import Message, Usage
from chatd.errors import ProviderErrorKind as Kind
from chatd.provider import (
    Finish,
    Provider,
    ProviderRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    UsageReport,
)
from chatd.testing.fake_provider import (
    SSE_HEAD,
    FakeProvider,
    Flood,
    Hold,
    Pause,
    Reset,
    Step,
    http_response,
    sse,
)
from chatd.testing.provider import collect, failure
from tests.conftest import Serve
from tests.support import chatd_command

ROOT = Path(__file__).parent.parent
KEY = "sk-ant-api03-0123456789abcdef"
MODEL = "claude-haiku-4-5"
DATED = "claude-haiku-4-5-20251001"
QUESTION = "Where is my parcel 4711?"
TOLD = "upstream-words-7f3a"


@pytest.fixture
def provider(io_loop: IOLoop, fake: FakeProvider) -> Iterator[Provider]:
    provider = io_loop.run_sync(lambda: open_anthropic({"base_url": fake.url, "api_key": KEY}))
    yield provider
    io_loop.run_sync(provider.close)


def ask(*messages: Message, stream: bool = True, **more: Any) -> ProviderRequest:
    said = messages or (Message("user", QUESTION),)
    return ProviderRequest(MODEL, said, stream=stream, **more)


async def sent(provider: Provider, fake: FakeProvider, request: ProviderRequest) -> dict[str, Any]:
    """The body that is sent, which the models of a client of this API take."""
    fake.answer(http_response(500))
    await failure(provider, request)
    body: dict[str, Any] = fake.requests[-1].json
    parsed = MessagesRequest.model_validate(body)
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == body
    return body


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


# What is sent


async def test_a_conversation_is_sent_in_the_apis_own_terms(
    provider: Provider, fake: FakeProvider
) -> None:
    request = ask(
        Message("system", "Be kind."),
        Message("user", "Hi."),
        Message("assistant", "Hello!"),
        Message("developer", "Be brief."),
        Message("user", QUESTION),
        max_output_tokens=100,
        temperature=0.5,
        user="someone",
        session_id="not-sent",
    )
    assert await sent(provider, fake, request) == {
        "model": MODEL,
        "max_tokens": 100,
        "system": "Be kind.\n\nBe brief.",
        "messages": [
            {"role": "user", "content": text("Hi.")},
            {"role": "assistant", "content": text("Hello!")},
            {"role": "user", "content": text(QUESTION)},
        ],
        "stream": True,
        "temperature": 0.5,
        "metadata": {"user_id": "someone"},
    }
    asked = fake.requests[-1]
    assert (asked.method, asked.path) == ("POST", "/v1/messages")
    assert asked.headers["x-api-key"] == KEY
    assert asked.headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in asked.headers
    assert asked.headers["accept-encoding"] == "identity"


async def test_what_the_api_needs_is_sent_where_the_chatbot_sets_nothing(
    provider: Provider, fake: FakeProvider
) -> None:
    assert await sent(provider, fake, ask(stream=False)) == {
        "model": MODEL,
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": text(QUESTION)}],
        "stream": False,
    }


async def test_the_settings_are_in_the_request(io_loop: IOLoop, fake: FakeProvider) -> None:
    provider = await open_anthropic(
        {
            "base_url": f"{fake.url}/",
            "api_key": KEY,
            "version": "2030-01-01",
            "max_tokens": 77,
            "headers": {"anthropic-beta": "a-beta"},
            "parameters": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        }
    )
    body = await sent(provider, fake, ask())
    await provider.close()
    assert body["max_tokens"] == 77
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 1024}
    assert fake.requests[-1].path == "/v1/messages"
    assert fake.requests[-1].headers["anthropic-version"] == "2030-01-01"
    assert fake.requests[-1].headers["anthropic-beta"] == "a-beta"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param(
            [Message("user", "a"), Message("user", "b"), Message("assistant", "c")],
            [("user", text("a", "b")), ("assistant", text("c"))],
            id="two-of-one-role",
        ),
        pytest.param(
            [Message("assistant", "Welcome!"), Message("user", "a")],
            [("user", text("(begins)")), ("assistant", text("Welcome!")), ("user", text("a"))],
            id="the-assistant-begins",
        ),
        pytest.param(
            [Message("user", "a"), Message("assistant", " \n"), Message("user", "b")],
            [("user", text("a", "b"))],
            id="nothing-but-space",
        ),
        pytest.param(
            [Message("user", "a"), Message("assistant", "It is ")],
            [("user", text("a")), ("assistant", text("It is"))],
            id="an-answer-to-go-on-from",
        ),
    ],
)
async def test_the_order_of_roles_is_one_that_the_api_takes(
    provider: Provider, fake: FakeProvider, messages: list[Message], expected: Any
) -> None:
    body = await sent(provider, fake, ask(*messages))
    assert [(m["role"], m["content"]) for m in body["messages"]] == expected


async def test_images_are_sent_as_data_or_by_their_address(
    provider: Provider, fake: FakeProvider
) -> None:
    parts = [
        {"type": "text", "text": "Which?"},
        {"type": "image_url", "image_url": {"url": "data:image/PNG;base64,iVBORw0="}},
        {"type": "image_url", "image_url": {"url": "https://site.example/a.jpg", "detail": "low"}},
    ]
    body = await sent(provider, fake, ask(Message("user", "Which?", parts=parts)))
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "Which?"},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0="},
        },
        {"type": "image", "source": {"type": "url", "url": "https://site.example/a.jpg"}},
    ]


async def test_a_part_of_another_kind_is_not_sent(provider: Provider, fake: FakeProvider) -> None:
    parts = [{"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}}]
    error = await failure(provider, ask(Message("user", "", parts=parts)))
    assert (error.kind, error.retryable) == (Kind.INVALID_REQUEST, False)
    assert fake.requests == []


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
IN_TOOLS = [
    Message("user", "Weather?"),
    Message(
        "assistant",
        "I look.",
        tool_calls=[
            call("call:1", "weather", '{"city": "Bonn"}'),
            call("call_2", "weather", "{city"),
            call("call_3", "clock", ""),
        ],
    ),
    Message("tool", "Rain.", tool_call_id="call:1"),
    Message("tool", "", tool_call_id="call_2"),
    Message("tool", "Noon.", tool_call_id="call_3"),
    Message("user", "And now?"),
]


async def test_tools_their_calls_and_their_results_are_translated(
    provider: Provider, fake: FakeProvider
) -> None:
    clock = {"type": "function", "function": {"name": "clock", "strict": True}}
    body = await sent(provider, fake, ask(*IN_TOOLS, parameters={"tools": [WEATHER, clock]}))
    assert body["tools"] == [
        {
            "name": "weather",
            "description": "Tells the weather.",
            "input_schema": WEATHER["function"]["parameters"],  # type: ignore[index]
        },
        {"name": "clock", "input_schema": {"type": "object"}, "strict": True},
    ]
    assert body["tool_choice"] == {"type": "auto"}
    assert body["messages"] == [
        {"role": "user", "content": text("Weather?")},
        {
            "role": "assistant",
            "content": [
                *text("I look."),
                # The API takes no colon in an id.
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Bonn"}},
                {
                    "type": "tool_use",
                    "id": "call_2",
                    "name": "weather",
                    "input": {"arguments": "{city"},
                },
                {"type": "tool_use", "id": "call_3", "name": "clock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": text("Rain.")},
                {"type": "tool_result", "tool_use_id": "call_2"},
                {"type": "tool_result", "tool_use_id": "call_3", "content": text("Noon.")},
                *text("And now?"),
            ],
        },
    ]


async def test_tools_that_are_spoken_of_and_not_offered_any_more_are_not_called(
    provider: Provider, fake: FakeProvider
) -> None:
    body = await sent(provider, fake, ask(*IN_TOOLS))
    assert [tool["name"] for tool in body["tools"]] == ["weather", "clock"]
    assert body["tool_choice"] == {"type": "none"}


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ({}, {"type": "auto"}),
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none"}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            {"type": "tool", "name": "weather"},
        ),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        ({"parallel_tool_calls": False, "tool_choice": "none"}, {"type": "none"}),
    ],
)
async def test_the_choice_among_tools_is_translated(
    provider: Provider, fake: FakeProvider, given: dict[str, Any], choice: dict[str, Any]
) -> None:
    parameters = {"tools": [WEATHER], **given}
    assert (await sent(provider, fake, ask(parameters=parameters)))["tool_choice"] == choice


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["END", "\n", "STOP"]}, {"stop_sequences": ["END", "STOP"]}),
        ({"top_p": 0.9}, {"top_p": 0.9}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object"}},
                }
            },
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        ),
        ({"response_format": {"type": "json_object"}}, {}),
        ({"seed": 1, "frequency_penalty": 1, "logit_bias": {"1": 2}, "verbosity": "low"}, {}),
    ],
)
async def test_parameters_are_translated_and_those_without_an_equal_are_left_out(
    provider: Provider, fake: FakeProvider, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    plain = await sent(provider, fake, ask())
    assert await sent(provider, fake, ask(parameters=given)) == {**plain, **expected}


async def test_a_temperature_beyond_the_apis_scale_is_its_highest(
    provider: Provider, fake: FakeProvider
) -> None:
    assert (await sent(provider, fake, ask(temperature=1.7)))["temperature"] == 1


async def test_without_a_key_it_is_said_where_to_get_one(io_loop: IOLoop) -> None:
    with pytest.raises(chatd.PluginError, match="ANTHROPIC_API_KEY"):
        await open_anthropic({"api_key": ""})


async def test_check_asks_for_the_models(provider: Provider, fake: FakeProvider) -> None:
    fake.answer(http_response(200, {"data": []}))
    await provider.check()
    assert (fake.requests[0].method, fake.requests[0].path) == ("GET", "/v1/models")


# What is read


def event(type: str, **more: Any) -> str:
    return json.dumps({"type": type, **more})


def start(**usage: Any) -> str:
    return event("message_start", message={"id": "msg_1", "model": DATED, "usage": usage})


def block(index: int, type: str, **more: Any) -> str:
    return event("content_block_start", index=index, content_block={"type": type, **more})


def delta(index: int, type: str, **more: Any) -> str:
    return event("content_block_delta", index=index, delta={"type": type, **more})


def stop(index: int) -> str:
    return event("content_block_stop", index=index)


def ended(reason: str | None = "end_turn", **usage: Any) -> str:
    return event("message_delta", delta={"stop_reason": reason}, usage=usage)


STOP = event("message_stop")
BEGUN = sse(start(), block(0, "text", text=""), delta(0, "text_delta", text="Hel"))
SAID = BEGUN + sse(delta(0, "text_delta", text="lo!"), stop(0))
HELLO = [TextDelta("Hel"), TextDelta("lo!")]


async def test_a_stream_of_thoughts_text_and_calls_is_read(
    provider: Provider, fake: FakeProvider
) -> None:
    fake.answer(
        SSE_HEAD,
        sse(
            start(input_tokens=10, cache_creation_input_tokens=20, cache_read_input_tokens=30),
            event("ping"),
            block(0, "thinking", thinking="", signature=""),
            delta(0, "thinking_delta", thinking="Hm."),
            delta(0, "signature_delta", signature="c2ln"),
            stop(0),
            block(1, "redacted_thinking", data="c2ln"),
            stop(1),
            block(2, "text", text=""),
            delta(2, "text_delta", text=""),
            delta(2, "text_delta", text="I look."),
            delta(2, "citations_delta", citation={"type": "char_location"}),
            stop(2),
            block(3, "server_tool_use", id="srv_1", name="web_search", input={}),
            delta(3, "input_json_delta", partial_json='{"query": "x"}'),
            stop(3),
            block(4, "web_search_tool_result", tool_use_id="srv_1", content=[]),
            stop(4),
            block(5, "tool_use", id="toolu_1", name="weather", input={}),
            delta(5, "input_json_delta", partial_json=""),
            delta(5, "input_json_delta", partial_json='{"city": '),
            delta(5, "input_json_delta", partial_json='"Bonn"}'),
            stop(5),
            block(6, "tool_use", id="toolu_2", name="clock", input={}),
            stop(6),
            event("something_new", of={"which": ["nobody", "knows"]}),
            ended("tool_use", output_tokens=40, output_tokens_details={"thinking_tokens": 15}),
            STOP,
        ),
    )
    assert await collect(provider, ask()) == [
        UsageReport(Usage(60, cached_tokens=30)),
        ReasoningDelta("Hm."),
        TextDelta("I look."),
        ToolCallDelta(0, "toolu_1", "weather"),
        ToolCallDelta(0, arguments='{"city": '),
        ToolCallDelta(0, arguments='"Bonn"}'),
        ToolCallDelta(1, "toolu_2", "clock"),
        ToolCallDelta(1, arguments="{}"),
        UsageReport(Usage(60, 40, cached_tokens=30, reasoning_tokens=15)),
        Finish("tool_calls", DATED),
    ]


async def test_an_answer_in_one_piece_is_read_the_same(
    provider: Provider, fake: FakeProvider
) -> None:
    message = {
        "type": "message",
        "model": DATED,
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
            {"type": "text", "text": "I look."},
            {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bonn"}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 10, "output_tokens": 40, "cache_read_input_tokens": 0},
    }
    fake.always(http_response(200, message))
    for stream in (False, True):
        assert await collect(provider, ask(stream=stream)) == [
            ReasoningDelta("Hm."),
            TextDelta("I look."),
            ToolCallDelta(0, "toolu_1", "weather"),
            ToolCallDelta(0, arguments='{"city": "Bonn"}'),
            UsageReport(Usage(10, 40, cached_tokens=0)),
            Finish("tool_calls", DATED),
        ]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("pause_turn", "other"),
        ("something_new", "other"),
    ],
)
async def test_the_reason_to_stop_is_one_of_chatds_own(
    provider: Provider, fake: FakeProvider, told: str, reason: str
) -> None:
    fake.answer(SSE_HEAD, SAID, sse(ended(told), STOP))
    assert (await collect(provider, ask()))[-1] == Finish(reason, DATED)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "usage"),
    [
        (({}, {}), None),
        (({"input_tokens": 5, "output_tokens": 1}, {"output_tokens": 9}), Usage(5, 9)),
        (({"input_tokens": 5}, {"input_tokens": 7, "output_tokens": 9}), Usage(7, 9)),
        (
            (
                {"input_tokens": 5, "cache_read_input_tokens": 2},
                {"output_tokens": 9, "cache_read_input_tokens": None},
            ),
            Usage(7, 9, cached_tokens=2),
        ),
        (({"input_tokens": -1, "output_tokens": "many"}, {"output_tokens": 1.5}), Usage()),
    ],
)
async def test_usage_is_what_was_counted_last(
    provider: Provider, fake: FakeProvider, counts: Any, usage: Usage | None
) -> None:
    first, last = counts
    fake.answer(SSE_HEAD, sse(start(**first)), SAID, sse(ended(**last), STOP))
    reports = [e.usage for e in await collect(provider, ask()) if isinstance(e, UsageReport)]
    assert reports[-1:] == ([] if usage is None else [usage])


async def test_of_an_answer_that_is_broken_off_it_is_known_what_was_asked(
    provider: Provider, fake: FakeProvider
) -> None:
    begun = start(input_tokens=10, cache_read_input_tokens=5, output_tokens=1)
    fake.answer(SSE_HEAD, sse(begun), Hold())
    events = provider.stream(ask())
    assert await anext(events) == UsageReport(Usage(15, cached_tokens=5))
    await events.aclose()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param((sse(ended(), STOP),), id="both"),
        pytest.param((sse(ended(), STOP), Hold()), id="held-open-after-the-end"),
        pytest.param((sse(ended()),), id="no-message-stop"),
        pytest.param((sse(ended()), Hold()), id="held-open-after-the-reason"),
        pytest.param((sse(STOP),), id="no-reason"),
        pytest.param((sse(ended()), Pause(0.05), Reset()), id="reset-after-the-end"),
        pytest.param((sse(ended()), Flood(b": ping\n\n", pause=0.02)), id="pings-after-the-end"),
    ],
)
async def test_a_stream_with_any_kind_of_end_is_a_complete_answer(
    provider: Provider, fake: FakeProvider, end: tuple[Step, ...]
) -> None:
    fake.answer(SSE_HEAD, SAID, *end)
    assert await collect(provider, ask()) == [*HELLO, Finish("stop", DATED)]
    await fake.requests[0].closed_within(5)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        pytest.param((), Kind.INCOMPLETE, id="closed"),
        pytest.param((sse(ended(None)),), Kind.INCOMPLETE, id="without-a-reason"),
        pytest.param((Pause(0.1), Reset()), Kind.INCOMPLETE, id="reset"),
        pytest.param((sse("{not json"), Hold()), Kind.PROTOCOL, id="malformed"),
        pytest.param((sse("[1]"), Hold()), Kind.PROTOCOL, id="no-object"),
        pytest.param((sse("[" * 100_000), Hold()), Kind.PROTOCOL, id="too-deep"),
        pytest.param(
            (sse(event("error", error={"type": "overloaded_error", "message": TOLD})), Hold()),
            Kind.OVERLOADED,
            id="overloaded",
        ),
        pytest.param(
            (sse(event("error", error={"type": "rate_limit_error", "message": TOLD})), Hold()),
            Kind.RATE_LIMIT,
            id="rate-limit",
        ),
        pytest.param(
            (sse(event("error", error={"type": "api_error", "message": TOLD})), Hold()),
            Kind.OVERLOADED,
            id="api-error",
        ),
        pytest.param((sse({"error": TOLD}), Hold()), Kind.OVERLOADED, id="a-proxys-error"),
        pytest.param(
            (b"data: ", Flood(b"x" * 65536, times=200), Hold()), Kind.PROTOCOL, id="over-the-cap"
        ),
    ],
)
async def test_a_stream_that_breaks_off_gives_what_was_said_and_then_the_error(
    provider: Provider, fake: FakeProvider, end: tuple[Step, ...], kind: Kind
) -> None:
    fake.answer(SSE_HEAD, SAID, *end)
    got = []
    with pytest.raises(chatd.ProviderError) as raised:
        async for one in provider.stream(ask()):
            got.append(one)
    assert got == HELLO
    assert (raised.value.kind, raised.value.retryable, raised.value.reached_model) == (
        kind,
        True,
        True,
    )
    await fake.requests[0].closed_within(5)


NONSENSE: list[Any] = [None, 7, "x", [], {}, [None], {"type": None}, {"type": "text", "text": 7}]


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_what_makes_no_sense_beside_the_answer_is_passed_over(
    provider: Provider, fake: FakeProvider, nonsense: Any
) -> None:
    fake.answer(
        SSE_HEAD,
        sse(
            event("message_start", message=nonsense),
            event("content_block_start", index=nonsense, content_block=nonsense),
            event("content_block_start", content_block={"type": "tool_use_of_old", "id": nonsense}),
            event("content_block_delta", index=nonsense, delta=nonsense),
            event("content_block_delta", index=nonsense, delta={"type": "input_json_delta"}),
            event("content_block_stop", index=nonsense),
            event("message_delta", delta=nonsense, usage=nonsense),
            json.dumps({"type": nonsense}),
        ),
        SAID,
        sse(ended(), STOP),
    )
    events = [e for e in await collect(provider, ask()) if not isinstance(e, UsageReport)]
    assert events == [*HELLO, Finish("stop", DATED)]
    fake.answer(http_response(200, {"content": [nonsense], "stop_reason": "end_turn"}))
    assert await collect(provider, ask()) == [Finish("stop", None)]


@pytest.mark.parametrize(
    ("status", "type", "message", "kind", "retryable"),
    [
        (400, "invalid_request_error", "max_tokens: missing", Kind.INVALID_REQUEST, False),
        (
            400,
            "invalid_request_error",
            "prompt is too long: 208310 tokens > 200000 maximum",
            Kind.CONTEXT_LENGTH,
            False,
        ),
        (
            400,
            "invalid_request_error",
            "Your credit balance is too low to access the Anthropic API.",
            Kind.CREDIT,
            False,
        ),
        (401, "authentication_error", "invalid x-api-key", Kind.AUTHENTICATION, False),
        (402, "billing_error", "", Kind.CREDIT, False),
        (403, "permission_error", "", Kind.AUTHENTICATION, False),
        (404, "not_found_error", "model: claude-9", Kind.INVALID_REQUEST, False),
        (413, "request_too_large", "", Kind.INVALID_REQUEST, False),
        (429, "rate_limit_error", "", Kind.RATE_LIMIT, True),
        (500, "api_error", "", Kind.OVERLOADED, True),
        (504, "timeout_error", "", Kind.TIMEOUT, True),
        (529, "overloaded_error", "Overloaded", Kind.OVERLOADED, True),
    ],
)
async def test_an_error_of_the_api_is_of_its_kind(
    provider: Provider,
    fake: FakeProvider,
    status: int,
    type: str,
    message: str,
    kind: Kind,
    retryable: bool,
) -> None:
    words = f"{message} {TOLD} {KEY} {QUESTION}"
    fake.answer(http_response(status, {"type": "error", "error": {"type": type, "message": words}}))
    error = await failure(provider, ask())
    assert (error.kind, error.retryable, error.status) == (kind, retryable, status)
    assert TOLD in error.detail and type in error.detail
    assert KEY not in error.detail and "4711" not in error.detail


async def test_when_to_ask_again_is_read_from_the_apis_headers(
    provider: Provider, fake: FakeProvider
) -> None:
    error = {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}
    reset = {
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": "2000-01-01T00:00:00Z",
    }
    fake.answer(http_response(429, error, {"retry-after": "11", **reset}))
    fake.answer(http_response(429, error, reset))
    fake.answer(http_response(529, error, {"retry-after": "3"}))
    hints = [(await failure(provider, ask())).retry_after for _ in range(3)]
    assert hints == [11, 0, 3]


# As a whole


async def test_a_turn_through_anthropic_is_stored_with_what_it_took(
    serve: Serve, fake: FakeProvider
) -> None:
    served = await serve(f"""
storage: %(storage)s
providers:
  main: {{use: anthropic, api_key: "{KEY}", base_url: "{fake.url}"}}
models:
  - {{match: "*", ask: [main]}}
""")
    bot = await served.add_bot(model=MODEL, system_prompt="Answer briefly.")
    session = await served.session(bot)
    fake.answer(SSE_HEAD, sse(start(input_tokens=10)), SAID, sse(ended(output_tokens=4), STOP))
    answer = await served.chat(bot, session, QUESTION)
    assert (answer.status, answer.json["response"]) == (200, "Hello!")
    assert answer.json["model"] == DATED
    usage = answer.json["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["cost_usd"]) == (10, 4, None)
    turn = await served.runtime.services.storage.get_turn(answer.json["turn_id"], bot.id)
    assert turn is not None and (turn.provider, turn.finish_reason) == ("main", "stop")
    assert fake.requests[0].json["system"] == "Answer briefly."


def test_the_configuration_for_it_is_good_with_and_without_a_key(tmp_path: Path) -> None:
    config = os.path.relpath(ROOT / "config" / "anthropic.yaml", tmp_path)
    for env in ({}, {"ANTHROPIC_API_KEY": KEY}):
        checked = chatd_command("check", "--config", config, cwd=tmp_path, env=env)
        assert checked.returncode == 0, checked.stderr
