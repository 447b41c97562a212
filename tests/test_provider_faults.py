"""What providers do wrong, over real sockets: what the client sees of it and what is stored.

The first part goes through the whole server, the second asks a provider for streams.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from chatd_plugins.openai_compatible import open_openai_compatible
from tornado.ioloop import IOLoop

from chatd.domain import Chatbot, Message, TurnStatus, Usage
from chatd.errors import ProviderError, ProviderErrorKind
from chatd.provider import (
    Event,
    Finish,
    Provider,
    ProviderRequest,
    ReasoningDelta,
    Retries,
    TextDelta,
    Timeouts,
    UsageReport,
)
from chatd.routing import Router, Rule, Target, Trail
from chatd.storage import TurnRecord
from chatd.testing.fake_provider import (
    SSE_HEAD,
    FakeProvider,
    Flood,
    Hold,
    KeepAlive,
    Pause,
    Reset,
    Step,
    http_response,
    sse,
)
from chatd.testing.provider import collect, failure, text_of
from tests.conftest import Serve
from tests.support import Answer, Served

KEY = "sk-upstream-0123456789abcdef"
QUESTION = "Where is my parcel 4711?"
TOLD = "upstream-words-7f3a"
"""Stands in whatever the provider says of its failure."""

HTML = f"<!doctype html><title>Error</title><h1>nginx {TOLD}</h1>"
HTML_TYPE = {"Content-Type": "text/html"}
MODEL = "test/model"
CHAIN_MODEL = "chain/model"
CONFIG = """
storage: %(storage)s
providers:
  first:
    use: openai_compatible
    base_url: "FIRST/v1"
    api_key: "KEY"
    timeouts: {plain: PLAIN, first_token: FIRST_WORD}
    retries: {attempts: 2, base: 0.01}
  second:
    use: openai_compatible
    base_url: "SECOND/v1"
    timeouts: {plain: PLAIN, first_token: FIRST_WORD}
    retries: {attempts: 2, base: 0.01}
models:
  - {match: "chain/*", ask: [first, {provider: second, model: second/own-name}]}
  - {match: "*", ask: [first]}
"""
Kind = ProviderErrorKind


def answer(text: Any = "Hello!", **more: Any) -> bytes:
    """A good answer in one piece."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    return http_response(200, {"model": "answering/model", "choices": [choice], **more})


def error_body(code: Any = None, message: str = TOLD, **more: Any) -> dict[str, Any]:
    """What OpenAI and OpenRouter tell of a failure."""
    return {"error": {"message": message, "code": code, **more}}


@dataclass
class Chat:
    """A session of a server whose providers are the fakes."""

    served: Served
    bot: Chatbot
    session: str

    async def say(self, text: str = QUESTION) -> Answer:
        return await self.served.chat(self.bot, self.session, text)

    async def transcript(self) -> list[tuple[str, str]]:
        return await self.served.transcript(self.bot, self.session)

    async def turn(self) -> TurnRecord:
        """The last turn, as it is stored."""
        return await self.served.last_turn(self.bot, self.session)


Open = Callable[..., Awaitable[Chat]]


@pytest.fixture
def chat(
    serve: Serve,
    first: FakeProvider,
    second: FakeProvider,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Open]:
    """`await chat()` begins a session; afterwards the logs are looked through."""
    caplog.set_level("DEBUG")

    async def start(
        model: str = MODEL, plain: float = 20, first_token: float = 20, **settings: Any
    ) -> Chat:
        text = (
            CONFIG.replace("FIRST_WORD", str(first_token))
            .replace("FIRST", first.url)
            .replace("SECOND", second.url)
        )
        served = await serve(text.replace("KEY", KEY).replace("PLAIN", str(plain)))
        bot = await served.add_bot(model=model, **settings)
        return Chat(served, bot, await served.session(bot))

    yield start
    assert KEY not in caplog.text
    assert QUESTION not in caplog.text
    assert "<h1>" not in caplog.text


async def assert_failed(
    chat: Chat, got: Answer, status: int, code: str, *kinds: Kind, once: bool = False
) -> None:
    """The client is told `code` and nothing of the provider's; the question alone is stored.

    :param kinds: how each provider fails; with `once` none is asked again.
    """
    assert (got.status, got.json["status"], got.json["code"]) == (status, status, code)
    assert got.headers["Content-Type"].startswith("application/problem+json")
    for secret in (TOLD, KEY, "<h1>", "127.0.0.1", QUESTION):
        assert secret.encode() not in got.body
    assert await chat.transcript() == [("user", QUESTION)]
    turn = await chat.turn()
    assert (turn.status, turn.error_code, turn.reply) == (TurnStatus.FAILED, code, None)
    assert [attempt["error"] for attempt in turn.attempts] == [
        kind for each in kinds for kind in ((each,) if once else twice(each))
    ]


def twice(kind: Kind) -> tuple[Kind, ...]:
    """What is recorded of a provider that fails like this whenever it is asked."""
    return (kind, kind) if ProviderError(kind, "").retryable else (kind,)


@pytest.mark.parametrize(
    ("upstream", "kind", "status", "code"),
    [
        (400, Kind.INVALID_REQUEST, 502, "provider_failed"),
        (401, Kind.AUTHENTICATION, 502, "provider_failed"),
        (402, Kind.CREDIT, 502, "provider_failed"),
        (403, Kind.AUTHENTICATION, 502, "provider_failed"),
        (404, Kind.INVALID_REQUEST, 502, "provider_failed"),
        (408, Kind.TIMEOUT, 504, "provider_timeout"),
        (413, Kind.INVALID_REQUEST, 502, "provider_failed"),
        (422, Kind.INVALID_REQUEST, 502, "provider_failed"),
        (429, Kind.RATE_LIMIT, 429, "rate_limited"),
        (500, Kind.OVERLOADED, 502, "provider_failed"),
        (502, Kind.OVERLOADED, 502, "provider_failed"),
        (503, Kind.OVERLOADED, 502, "provider_failed"),
        (504, Kind.OVERLOADED, 502, "provider_failed"),
        (524, Kind.OVERLOADED, 502, "provider_failed"),
        (529, Kind.OVERLOADED, 502, "provider_failed"),
    ],
)
async def test_an_error_status_fails_the_turn_and_tells_nothing_of_the_providers(
    chat: Open,
    first: FakeProvider,
    upstream: int,
    kind: Kind,
    status: int,
    code: str,
) -> None:
    told = error_body(message=f"{TOLD}: {KEY} said {QUESTION}")
    first.always(http_response(upstream, told))
    here = await chat()
    await assert_failed(here, await here.say(), status, code, kind)
    assert first.requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("error", "kind", "status", "code"),
    [
        (error_body(429), Kind.RATE_LIMIT, 429, "rate_limited"),
        (error_body("429"), Kind.RATE_LIMIT, 429, "rate_limited"),
        (error_body(502), Kind.OVERLOADED, 502, "provider_failed"),
        (error_body("server_error"), Kind.OVERLOADED, 502, "provider_failed"),
        (error_body(402), Kind.CREDIT, 502, "provider_failed"),
        (
            error_body(403, metadata={"reasons": ["violence"]}),
            Kind.MODERATION,
            502,
            "provider_failed",
        ),
        ({"error": TOLD}, Kind.OVERLOADED, 502, "provider_failed"),
        ({"error": {"message": TOLD}, "choices": []}, Kind.OVERLOADED, 502, "provider_failed"),
        (
            {"choices": [{"error": {"code": 502, "message": TOLD}, "message": {"content": "Hal"}}]},
            Kind.OVERLOADED,
            502,
            "provider_failed",
        ),
        (
            {"choices": [{"finish_reason": "error", "message": {"content": ""}}]},
            Kind.OVERLOADED,
            502,
            "provider_failed",
        ),
        (
            {
                "choices": [
                    {
                        "finish_reason": "stop",
                        "native_finish_reason": "error",
                        "message": {"content": ""},
                    }
                ]
            },
            Kind.OVERLOADED,
            502,
            "provider_failed",
        ),
    ],
)
async def test_status_200_with_an_error_is_the_error_it_is(
    chat: Open, first: FakeProvider, error: Any, kind: Kind, status: int, code: str
) -> None:
    first.always(http_response(200, error))
    here = await chat()
    await assert_failed(here, await here.say(), status, code, kind)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (http_response(200, {"choices": []}), Kind.INCOMPLETE),
        (http_response(200, {}), Kind.INCOMPLETE),
        (answer(""), Kind.EMPTY),
        (answer(None), Kind.EMPTY),
        (answer([]), Kind.EMPTY),
        (answer({"text": "?"}), Kind.EMPTY),
        (http_response(200, {"choices": [{"finish_reason": "stop"}]}), Kind.EMPTY),
        (http_response(200, {"choices": [None]}), Kind.EMPTY),
        (http_response(200, {"choices": "many"}), None),
    ],
)
async def test_an_answer_without_a_word_is_a_failure_not_an_empty_reply(
    chat: Open, first: FakeProvider, body: bytes, kind: Kind | None
) -> None:
    first.always(body)
    here = await chat()
    got = await here.say()
    kinds = (await here.turn()).attempts[0]["error"] if kind is None else kind
    assert kinds in (Kind.EMPTY, Kind.INCOMPLETE, Kind.PROTOCOL)
    await assert_failed(here, got, 502, "provider_failed", kinds)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(http_response(200, HTML, {"Content-Type": "application/json"}), id="not-json"),
        pytest.param(http_response(200, b'"yes"', {"Content-Type": "application/json"}), id="text"),
        pytest.param(http_response(200, b"[" * 100_000), id="deep"),
        pytest.param(http_response(200, b"\xff\xfe\x00"), id="bytes"),
        pytest.param(http_response(200, b""), id="nothing"),
        pytest.param(http_response(204, b""), id="no-content"),
    ],
)
async def test_what_is_no_answer_at_all_is_a_failure_of_the_protocol(
    chat: Open, first: FakeProvider, body: bytes
) -> None:
    first.always(body)
    here = await chat()
    await assert_failed(here, await here.say(), 502, "provider_failed", Kind.PROTOCOL)


async def test_a_body_packed_to_become_huge_is_not_unpacked(
    chat: Open, first: FakeProvider, caplog: pytest.LogCaptureFixture
) -> None:
    bomb = gzip.compress(b" " * 64 * 1024 * 1024)
    first.always(http_response(200, bomb, {"Content-Encoding": "gzip"}))
    here = await chat()
    await assert_failed(here, await here.say(), 502, "provider_failed", Kind.PROTOCOL)
    assert first.requests[0].headers["accept-encoding"] == "identity"
    assert "Content-Encoding gzip" in caplog.text


async def test_a_reply_of_a_megabyte_is_shown_and_stored_whole(
    chat: Open, first: FakeProvider
) -> None:
    reply = "é" * 1024 * 1024
    first.always(answer(reply))
    here = await chat()
    assert (await here.say()).json["response"] == reply
    assert (await here.transcript())[1] == ("assistant", reply)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param((Reset(),), id="reset-before-headers"),
        pytest.param((), id="closed-before-headers"),
        pytest.param((b"HTTP/1.1 200 OK\r\nContent-Ty", Reset()), id="in-mid-headers"),
        pytest.param((answer()[:-10],), id="in-mid-body"),
        pytest.param((answer()[:-10], Pause(0.05), Reset()), id="reset-in-mid-body"),
        pytest.param((b"220 smtp.example ESMTP\r\n\r\n",), id="another-protocol"),
        pytest.param((b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",), id="bad-length"),
        pytest.param(
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",), id="bad-chunk"
        ),
        pytest.param((b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",), id="long-header"),
    ],
)
async def test_a_connection_that_breaks_is_a_failure_of_the_connection(
    chat: Open, first: FakeProvider, script: tuple[Step, ...]
) -> None:
    first.always(*script)
    here = await chat()
    await assert_failed(here, await here.say(), 502, "provider_failed", Kind.CONNECTION)


async def test_nobody_there_is_a_failure_of_the_connection(chat: Open, first: FakeProvider) -> None:
    here = await chat()
    await first.stop()
    await assert_failed(here, await here.say(), 502, "provider_failed", Kind.CONNECTION)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param((Hold(),), id="no-headers"),
        pytest.param((answer()[:-10], Hold()), id="stalls-in-the-body"),
        pytest.param(
            (http_response(200, b"{", {"Content-Length": "9999"}), Flood(b" ", pause=0.02)),
            id="trickles-for-ever",
        ),
        pytest.param((SSE_HEAD, Flood(b": PROCESSING\n\n", pause=0.02)), id="comments-for-ever"),
    ],
)
async def test_an_answer_that_never_ends_is_a_timeout_and_the_provider_is_hung_up_on(
    chat: Open, first: FakeProvider, script: tuple[Step, ...]
) -> None:
    first.always(*script)
    here = await chat(plain=0.5)
    began = time.monotonic()
    got = await here.say()
    assert time.monotonic() - began < 10
    assert (got.status, got.json["code"]) == (504, "provider_timeout")
    assert await here.transcript() == [("user", QUESTION)]
    assert (await here.turn()).status is TurnStatus.FAILED
    await first.requests[0].closed_within(5)


async def test_an_error_whose_body_never_ends_is_told_by_its_status(
    chat: Open, first: FakeProvider
) -> None:
    first.always(http_response(429, b"", {"Content-Length": "1000"}), Hold())
    here = await chat()
    await assert_failed(here, await here.say(), 429, "rate_limited", Kind.RATE_LIMIT)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ((http_response(500, HTML, HTML_TYPE),), Kind.OVERLOADED),
        ((http_response(401, error_body()),), Kind.AUTHENTICATION),
        ((http_response(429, error_body()),), Kind.RATE_LIMIT),
        ((http_response(200, error_body(502)),), Kind.OVERLOADED),
        ((http_response(200, HTML, HTML_TYPE),), Kind.PROTOCOL),
        ((answer(""),), Kind.EMPTY),
        ((Reset(),), Kind.CONNECTION),
    ],
)
async def test_when_the_first_provider_fails_the_second_answers(
    chat: Open, first: FakeProvider, second: FakeProvider, script: tuple[Step, ...], kind: Kind
) -> None:
    first.always(*script)
    second.answer(answer("Hello from the second!", model="second/dated-name"))
    here = await chat(model=CHAIN_MODEL)
    got = await here.say()
    assert (got.status, got.json["response"]) == (200, "Hello from the second!")
    assert got.json["model"] == "second/dated-name"
    assert first.requests[0].json["model"] == CHAIN_MODEL
    assert second.requests[0].json["model"] == "second/own-name"
    assert second.requests[0].json["messages"] == first.requests[-1].json["messages"]
    # The first one's key is not the second one's.
    assert "authorization" not in second.requests[0].headers
    turn = await here.turn()
    assert (turn.status, turn.provider) == (TurnStatus.COMPLETED, "second")
    assert turn.model == "second/dated-name"
    assert len(first.requests) == len(twice(kind))
    assert [(a["provider"], a["model"], a["error"]) for a in turn.attempts] == [
        *[("first", CHAIN_MODEL, kind)] * len(first.requests),
        ("second", "second/own-name", None),
    ]


async def test_when_all_providers_fail_the_last_failure_is_told(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(429, error_body()))
    second.always(http_response(503, HTML, HTML_TYPE))
    here = await chat(model=CHAIN_MODEL)
    got = await here.say()
    await assert_failed(here, got, 502, "provider_failed", Kind.RATE_LIMIT, Kind.OVERLOADED)


CONTEXT_LENGTH = [
    http_response(
        400,
        error_body(
            "context_length_exceeded",
            "This model's maximum context length is 8192 tokens. However, your messages "
            f"resulted in 9001 tokens. {TOLD}",
        ),
    ),
    http_response(400, error_body(400, f"prompt is too long: 9001 tokens > 8192 maximum {TOLD}")),
    http_response(
        400,
        {
            "object": "error",
            "message": f"This model's maximum context length is 8192 tokens. {TOLD}",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    http_response(
        400,
        error_body(
            400,
            f"the request exceeds the available context size, try increasing it {TOLD}",
            type="exceed_context_size_error",
        ),
    ),
    http_response(200, error_body(400, f"Input exceeds the context window. {TOLD}")),
]


@pytest.mark.parametrize("script", CONTEXT_LENGTH)
async def test_a_conversation_too_long_for_the_model_is_the_clients_to_mend(
    chat: Open, first: FakeProvider, second: FakeProvider, script: bytes
) -> None:
    first.always(script)
    here = await chat(model=CHAIN_MODEL)
    got = await here.say()
    await assert_failed(here, got, 422, "invalid_request", Kind.CONTEXT_LENGTH)
    assert "too long" in got.json["detail"]
    # It would be as long for the next provider.
    assert second.requests == []


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"Retry-After": "1"}, "1"),
        ({"Retry-After": format_datetime(datetime.now(UTC) - timedelta(hours=1), True)}, "5"),
        ({"Retry-After": "0"}, "5"),
        ({"Retry-After": "soon"}, "5"),
        ({"Retry-After": "-1"}, "5"),
        ({"Retry-After": "9" * 400}, "5"),
        ({}, "5"),
    ],
)
async def test_the_client_is_told_to_wait_but_never_for_long(
    chat: Open, first: FakeProvider, header: dict[str, str], told: str
) -> None:
    first.always(http_response(429, error_body(), header))
    here = await chat()
    got = await here.say()
    assert (got.status, got.headers["Retry-After"]) == (429, told)


async def test_what_cannot_be_stored_is_taken_out_of_a_reply(
    chat: Open, first: FakeProvider
) -> None:
    first.always(answer("He\0llo \ud83d!"))
    here = await chat()
    got = await here.say()
    assert got.json["response"] == "Hello \ufffd!"
    assert (await here.transcript())[1] == ("assistant", "Hello \ufffd!")


async def test_a_character_cut_in_two_by_the_provider_is_whole_again(
    chat: Open, first: FakeProvider
) -> None:
    first.always(
        SSE_HEAD, sse(json.dumps(delta("Hi \ud83d")), json.dumps(delta("\ude00 there")), finished())
    )
    here = await chat()
    assert (await here.say()).json["response"] == "Hi 😀 there"


async def test_a_provider_that_asks_for_time_is_overloaded(chat: Open, first: FakeProvider) -> None:
    first.always(http_response(503, error_body(), {"Retry-After": "3600"}))
    here = await chat()
    got = await here.say()
    await assert_failed(here, got, 503, "overloaded", Kind.OVERLOADED, once=True)
    assert got.headers["Retry-After"] == "60"


async def test_a_model_that_the_first_provider_does_not_have_is_asked_of_the_second(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(404, error_body(404, "No such model")))
    second.answer(answer("Hello from the second!"))
    here = await chat(model=CHAIN_MODEL)
    assert (await here.say()).json["response"] == "Hello from the second!"


async def test_a_failed_turns_question_is_in_the_transcript_and_not_in_the_next_context(
    chat: Open, first: FakeProvider
) -> None:
    here = await chat(system_prompt="Be kind.")
    first.answer(answer("One."))
    first.answer(http_response(400))
    first.answer(answer("Three."))
    assert (await here.say("Say one.")).status == 200
    assert (await here.say("Say two.")).status == 502
    assert (await here.say("Say three.")).status == 200
    assert await here.transcript() == [
        ("user", "Say one."),
        ("assistant", "One."),
        ("user", "Say two."),
        ("user", "Say three."),
        ("assistant", "Three."),
    ]
    assert first.requests[2].json["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Say one."},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Say three."},
    ]


@pytest.mark.parametrize(("usage", "truncated"), [(None, False), ({"prompt_tokens": 9000}, True)])
async def test_what_a_provider_counts_mends_the_estimate_of_a_token(
    chat: Open, first: FakeProvider, usage: Any, truncated: bool
) -> None:
    # 200 tokens are 800 characters by the estimate, and about 300 by what is counted here.
    first.always(answer("ho", usage=usage))
    here = await chat(context_tokens=200)
    for _ in range(10):
        last = await here.say("hi, hello")
    assert last.json["history_truncated"] is truncated


@pytest.mark.parametrize(
    ("named", "recorded"),
    [
        ("other/model-2026", "other/model-2026"),
        ("", MODEL),
        (None, MODEL),
        (7, MODEL),
        ("a\0b", MODEL),
        ("a\ud800b", MODEL),
        ("x" * 100_000, MODEL),
    ],
)
async def test_the_model_that_answered_is_recorded(
    chat: Open, first: FakeProvider, named: Any, recorded: str
) -> None:
    first.always(answer(model=named))
    here = await chat()
    assert (await here.say()).json["model"] == recorded
    assert (await here.turn()).model == recorded


@pytest.mark.parametrize(
    ("usage", "recorded"),
    [
        (None, Usage()),
        ([], Usage()),
        ({"prompt_tokens": 3, "completion_tokens": 0}, Usage(3, 0)),
        ({"prompt_tokens": -1, "completion_tokens": 1.5, "cost": "free"}, Usage()),
        ({"prompt_tokens": True, "completion_tokens": 10**30, "cost": True}, Usage()),
        ({"cost": 10**400}, Usage()),
        ({"cost": 0}, Usage(cost_usd=0.0)),
        ({"prompt_tokens_details": 1, "completion_tokens_details": None}, Usage()),
    ],
)
async def test_usage_that_makes_no_sense_is_recorded_as_unknown(
    chat: Open, first: FakeProvider, usage: Any, recorded: Usage
) -> None:
    first.always(answer(usage=usage))
    here = await chat()
    assert (await here.say()).status == 200
    assert (await here.turn()).usage == recorded


@pytest.mark.parametrize(
    ("told", "recorded"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "tool_calls"),
        ("function_call", "tool_calls"),
        ("eos", "other"),
        (None, "stop"),
    ],
)
async def test_the_finish_reason_is_one_of_chatds_own(
    chat: Open, first: FakeProvider, told: Any, recorded: str
) -> None:
    choice = {"finish_reason": told, "message": {"content": "Hello!"}}
    first.always(http_response(200, {"choices": [choice]}))
    here = await chat()
    assert (await here.say()).json["finish_reason"] == recorded


async def test_a_stream_that_was_not_asked_for_is_read_all_the_same(
    chat: Open, first: FakeProvider
) -> None:
    first.always(SSE_HEAD, sse(delta("Hel"), delta("lo!"), finished(), "[DONE]"))
    here = await chat()
    assert (await here.say()).json["response"] == "Hello!"


async def test_text_in_parts_is_put_together(chat: Open, first: FakeProvider) -> None:
    first.always(answer([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}, 7]))
    here = await chat()
    assert (await here.say()).json["response"] == "Hello!"


# Streams, asked of the provider itself.


def delta(text: str, **more: Any) -> dict[str, Any]:
    """A chunk with some text."""
    return {"model": MODEL, "choices": [{"index": 0, "delta": {"content": text}}], **more}


def finished(reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    """A chunk with a finish reason."""
    return {"model": MODEL, "choices": [{"delta": {}, "finish_reason": reason}], **more}


HELLO = [TextDelta("Hel"), TextDelta("lo!")]
SAID = sse(delta("Hel"), delta("lo!"))
STREAM = ProviderRequest(MODEL, [Message("user", QUESTION)], stream=True)


@pytest.fixture
def provider(io_loop: IOLoop, first: FakeProvider) -> Iterator[Provider]:
    """`openai_compatible`, asking the first fake."""
    yield from opened(io_loop, first)


@pytest.fixture
def other(io_loop: IOLoop, second: FakeProvider) -> Iterator[Provider]:
    """`openai_compatible`, asking the second fake."""
    yield from opened(io_loop, second)


def opened(io_loop: IOLoop, fake: FakeProvider) -> Iterator[Provider]:
    provider = io_loop.run_sync(
        lambda: open_openai_compatible({"base_url": f"{fake.url}/v1", "api_key": KEY})
    )
    yield provider
    io_loop.run_sync(provider.close)


async def broken_off(events: Any) -> tuple[list[Event], ProviderError]:
    """What came of a stream before the error in which it ends, and that error."""
    got: list[Event] = []
    with pytest.raises(ProviderError) as raised:
        async with asyncio.timeout(20), aclosing(events):
            async for event in events:
                got.append(event)
    return got, raised.value


@pytest.mark.parametrize(
    "end",
    [
        pytest.param((sse(finished(None), "[DONE]"),), id="done-with-an-empty-reason"),
        pytest.param(
            (sse(finished(), finished("length"), finished("length"), "[DONE]"),), id="thrice"
        ),
        pytest.param((sse(finished()), Pause(0.05), Reset()), id="reset-after-the-end"),
        pytest.param((sse(finished()), Hold()), id="held-open-after-the-reason"),
        pytest.param(
            (sse(finished()), Flood(b": keep-alive\n\n", pause=0.02)), id="comments-after-the-end"
        ),
    ],
)
async def test_a_stream_with_any_kind_of_end_is_a_complete_answer(
    provider: Provider, first: FakeProvider, end: tuple[Step, ...]
) -> None:
    first.answer(SSE_HEAD, SAID, *end)
    began = time.monotonic()
    assert await collect(provider, STREAM) == [*HELLO, Finish("stop", MODEL)]
    assert time.monotonic() - began < 5
    await first.requests[0].closed_within(5)


async def test_an_end_in_a_chunked_body_that_is_cut_is_a_complete_answer(
    provider: Provider, first: FakeProvider
) -> None:
    body = SAID + sse(finished())
    first.answer(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"%x\r\n%b\r\n" % (len(body), body),
    )
    assert (await collect(provider, STREAM))[-1] == Finish("stop", MODEL)


async def test_a_connection_whose_answer_was_read_to_its_end_is_used_again(
    provider: Provider, first: FakeProvider
) -> None:
    body = SAID + sse(finished(), "[DONE]")
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    first.always(head.encode(), body, KeepAlive())
    await collect(provider, STREAM)
    await collect(provider, STREAM)
    assert [request.connection for request in first.requests] == [0, 0]


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        pytest.param((Pause(0.1), Reset()), Kind.INCOMPLETE, id="reset"),
        pytest.param((sse(finished())[:-1],), Kind.INCOMPLETE, id="in-the-last-event"),
        pytest.param((sse("{not json"), Hold()), Kind.PROTOCOL, id="malformed"),
        pytest.param((sse('["a", "list"]'), Hold()), Kind.PROTOCOL, id="no-object"),
        pytest.param((sse("[" * 100_000), Hold()), Kind.PROTOCOL, id="too-deep"),
        pytest.param((sse(HTML), Hold()), Kind.PROTOCOL, id="html"),
        pytest.param((sse(error_body("server_error")), Hold()), Kind.OVERLOADED, id="word-code"),
        pytest.param(
            (
                sse({**error_body(502), "choices": [{"delta": {}, "finish_reason": "error"}]}),
                Hold(),
            ),
            Kind.OVERLOADED,
            id="openrouter-mid-stream",
        ),
        pytest.param((sse(finished("error")), Hold()), Kind.OVERLOADED, id="reason-error"),
        pytest.param(
            (Flood(b"data: " + b"x" * 65536 + b"\n", times=200), Hold()),
            Kind.PROTOCOL,
            id="over-the-cap-in-many-lines",
        ),
    ],
)
async def test_a_stream_that_breaks_off_gives_what_was_said_and_then_the_error(
    provider: Provider, first: FakeProvider, end: tuple[Step, ...], kind: Kind
) -> None:
    first.answer(SSE_HEAD, SAID, *end)
    events, error = await broken_off(provider.stream(STREAM))
    assert events == HELLO
    assert (error.kind, error.reached_model) == (kind, True)
    assert len(str(error)) <= 300
    await first.requests[0].closed_within(5)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([finished(), {"choices": [], "usage": "USAGE"}], id="empty-choices"),
        pytest.param([finished(), finished(None, usage="USAGE")], id="an-empty-choice"),
        pytest.param([finished(usage="USAGE")], id="with-the-reason"),
        pytest.param([finished(), {"usage": "USAGE"}], id="no-choices"),
        pytest.param(
            [finished(usage={"prompt_tokens": 1}), {"choices": [], "usage": "USAGE"}], id="twice"
        ),
    ],
)
async def test_usage_is_told_once_wherever_it_stands(
    provider: Provider, first: FakeProvider, chunks: list[dict[str, Any]]
) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "cost": 0.25}
    parts = [
        json.loads(json.dumps(chunk).replace('"USAGE"', json.dumps(usage))) for chunk in chunks
    ]
    first.answer(SSE_HEAD, SAID, sse(*parts), Pause(0.05), sse("[DONE]"))
    report = UsageReport(Usage(5, 2, cost_usd=0.25))
    assert await collect(provider, STREAM) == [*HELLO, report, Finish("stop", MODEL)]


async def test_a_stream_without_usage_reports_none(provider: Provider, first: FakeProvider) -> None:
    first.answer(SSE_HEAD, SAID, sse(finished(usage=None), "[DONE]"))
    assert not [e for e in await collect(provider, STREAM) if isinstance(e, UsageReport)]


async def test_an_event_of_several_data_lines_is_one_chunk(
    provider: Provider, first: FakeProvider
) -> None:
    lines = json.dumps(delta("Hello!"), indent=1).splitlines()
    event = "".join(f"data: {line}\n" for line in lines).encode() + b"\n"
    first.answer(SSE_HEAD, event, sse(finished(), "[DONE]"))
    assert text_of(await collect(provider, STREAM)) == "Hello!"


async def test_what_a_stream_says_beside_its_text_is_passed_over(
    provider: Provider, first: FakeProvider
) -> None:
    first.answer(
        SSE_HEAD,
        b": OPENROUTER PROCESSING\n\nevent: ping\ndata: {}\n\n",
        sse(
            {"choices": None},
            {"choices": [None]},
            {"choices": [{"delta": None}]},
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": None, "tool_calls": []}}]},
            {"choices": [{"delta": {"reasoning": "Hm."}}]},
            {"choices": [{"delta": {"reasoning_content": "So."}}]},
        ),
        SAID,
        sse(finished(), "[DONE]"),
    )
    thoughts = [ReasoningDelta("Hm."), ReasoningDelta("So.")]
    assert await collect(provider, STREAM) == [*thoughts, *HELLO, Finish("stop", MODEL)]


async def test_the_name_that_answered_is_the_last_one_told(
    provider: Provider, first: FakeProvider
) -> None:
    renamed = finished(model="other/model-2026")
    first.answer(SSE_HEAD, SAID, sse(renamed, {"model": "", "choices": []}, "[DONE]"))
    assert (await collect(provider, STREAM))[-1] == Finish("stop", "other/model-2026")


async def test_an_answer_in_one_piece_to_a_request_for_a_stream_is_taken(
    provider: Provider, first: FakeProvider
) -> None:
    first.answer(answer())
    assert await collect(provider, STREAM) == [
        TextDelta("Hello!"),
        Finish("stop", "answering/model"),
    ]


async def test_what_was_said_is_in_no_error(provider: Provider, first: FakeProvider) -> None:
    first.answer(http_response(400, error_body(message=f"bad: {QUESTION} {KEY} {'x' * 9000}")))
    error = await failure(provider, STREAM)
    assert QUESTION not in error.detail and KEY not in error.detail
    assert len(error.detail) <= 300


async def test_an_error_is_one_line_that_can_be_logged(
    provider: Provider, first: FakeProvider
) -> None:
    first.answer(http_response(500, error_body(message="a\nb\0c\ud800d\x1b[31m")))
    detail = (await failure(provider, STREAM)).detail
    assert detail.isprintable() and "a b c d" in detail


# Deadlines and the order of providers are the router's.


def chain(*providers: Provider, **timeouts: float) -> Router:
    names = ("first", "second")
    targets = [
        Target(name, provider, Timeouts(**timeouts), retries=Retries(attempts=1))
        for name, provider in zip(names, providers, strict=False)
    ]
    return Router([Rule("*", tuple(targets))])


@pytest.mark.parametrize(
    "script",
    [
        pytest.param((SSE_HEAD, Hold()), id="silence"),
        pytest.param(
            (SSE_HEAD, Flood(sse({"choices": [{"delta": {"content": ""}}]}), pause=0.02)),
            id="empty-chunks",
        ),
    ],
)
async def test_what_is_no_token_does_not_put_off_the_first_token_timeout(
    provider: Provider, other: Provider, first: FakeProvider, second: FakeProvider, script: Any
) -> None:
    first.answer(*script)
    second.answer(SSE_HEAD, SAID, sse(finished(), "[DONE]"))
    trail = Trail()
    router = chain(provider, other, first_token=0.3)
    async with asyncio.timeout(10), aclosing(router.stream(STREAM, trail)) as events:
        assert text_of([event async for event in events]) == "Hello!"
    assert [attempt.error for attempt in trail.attempts] == [Kind.TIMEOUT, None]
    await first.requests[0].closed_within(5)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        pytest.param((Reset(),), Kind.CONNECTION, id="reset"),
        pytest.param((SSE_HEAD, Pause(0.05), Reset()), Kind.INCOMPLETE, id="reset-after-headers"),
        pytest.param((SSE_HEAD,), Kind.INCOMPLETE, id="closed"),
        pytest.param((SSE_HEAD, sse(error_body(503))), Kind.OVERLOADED, id="error"),
        pytest.param((SSE_HEAD, sse(finished(), "[DONE]")), Kind.EMPTY, id="no-word"),
        pytest.param((SSE_HEAD, sse("{")), Kind.PROTOCOL, id="malformed"),
    ],
)
async def test_before_the_first_word_the_next_provider_is_asked(
    provider: Provider,
    other: Provider,
    first: FakeProvider,
    second: FakeProvider,
    script: tuple[Step, ...],
    kind: Kind,
) -> None:
    first.answer(*script)
    second.answer(SSE_HEAD, SAID, sse(finished(), "[DONE]"))
    trail = Trail()
    async with aclosing(chain(provider, other).stream(STREAM, trail)) as events:
        assert text_of([event async for event in events]) == "Hello!"
    assert [attempt.error for attempt in trail.attempts] == [kind, None]


async def test_closing_a_routed_stream_hangs_up_on_the_provider(
    provider: Provider, first: FakeProvider
) -> None:
    first.answer(SSE_HEAD, SAID, Hold())
    events = chain(provider).stream(STREAM, Trail())
    assert await anext(events) == HELLO[0]
    await events.aclose()
    await first.requests[0].closed_within(5)
