"""What providers over HTTP have in common: connections that died, hints to wait, words for a log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chatd_plugins.openai_compatible import open_openai_compatible
from chatd_plugins.openrouter import open_openrouter
from tornado.ioloop import IOLoop

from chatd.domain import Message
from chatd.errors import ProviderError
from chatd.errors import ProviderErrorKind as Kind
from chatd.provider import Provider, ProviderRequest
from chatd.registry import load_registry
from chatd.testing import HttpProviderConformance
from chatd.testing.fake_provider import (
    SSE_HEAD,
    FakeProvider,
    KeepAlive,
    Pause,
    Reset,
    Step,
    http_response,
    sse,
)
from chatd.testing.provider import collect, failure, text_of
from tests.conftest import Serve
from tests.test_docs import plugin_files

KEY = "sk-upstream-0123456789abcdef"
QUESTION = "Where is my parcel 4711?"
ASKED = ProviderRequest("test/model", [Message("user", QUESTION)])
ANSWER = {"choices": [{"finish_reason": "stop", "message": {"content": "Hello!"}}]}
KEPT = http_response(200, ANSWER, {"Connection": "keep-alive"})


@pytest.fixture
def provider(io_loop: IOLoop, fake: FakeProvider) -> Iterator[Provider]:
    """`openai_compatible`, asking the fake."""
    provider = io_loop.run_sync(
        lambda: open_openai_compatible({"base_url": f"{fake.url}/v1", "api_key": KEY})
    )
    yield provider
    io_loop.run_sync(provider.close)


@pytest.fixture
def openrouter(io_loop: IOLoop, fake: FakeProvider) -> Iterator[Provider]:
    provider = io_loop.run_sync(lambda: open_openrouter({"base_url": fake.url, "api_key": KEY}))
    yield provider
    io_loop.run_sync(provider.close)


# Connections


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "death", [pytest.param((), id="closed"), pytest.param((Reset(),), id="reset")]
)
async def test_a_request_on_a_kept_connection_that_died_is_sent_again_on_a_new_one(
    provider: Provider, fake: FakeProvider, death: tuple[Step, ...], stream: bool
) -> None:
    request = ProviderRequest(ASKED.model, ASKED.messages, stream=stream)
    fake.answer(KEPT, KeepAlive())
    await collect(provider, request)
    fake.answer(*death)
    fake.answer(KEPT, KeepAlive())
    assert text_of(await collect(provider, request)) == "Hello!"
    assert [asked.connection for asked in fake.requests] == [0, 0, 1]
    assert fake.requests[2].body == fake.requests[1].body


async def test_it_is_sent_again_once_and_not_on_another_kept_connection(
    provider: Provider, fake: FakeProvider
) -> None:
    fake.always(Pause(0.05), KEPT, KeepAlive())
    await asyncio.gather(*(collect(provider, ASKED) for _ in range(3)))
    assert fake.connections == 3
    fake.always(Reset())
    error = await failure(provider, ASKED)
    assert error.kind is Kind.CONNECTION and error.retryable
    assert len(fake.requests) == 5
    assert fake.connections == 4


async def test_a_large_request_is_sent_again_whole(provider: Provider, fake: FakeProvider) -> None:
    large = ProviderRequest(ASKED.model, [Message("user", "x" * 2**20)])
    fake.answer(KEPT, KeepAlive())
    await collect(provider, ASKED)
    fake.answer()
    fake.answer(KEPT)
    assert text_of(await collect(provider, large)) == "Hello!"
    assert fake.requests[2].json["messages"][0]["content"] == "x" * 2**20


@pytest.mark.parametrize(
    "death", [pytest.param((), id="closed"), pytest.param((Reset(),), id="reset")]
)
async def test_a_request_on_a_new_connection_is_not_sent_again(
    provider: Provider, fake: FakeProvider, death: tuple[Step, ...]
) -> None:
    fake.always(*death)
    error = await failure(provider, ASKED)
    assert error.kind is Kind.CONNECTION and error.retryable
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param((b"HTTP/1.1 200 OK\r\nContent-Ty",), id="in-the-headers"),
        pytest.param((SSE_HEAD,), id="after-the-headers"),
        pytest.param((SSE_HEAD, sse({"choices": []}), Pause(0.05), Reset()), id="in-the-body"),
        pytest.param((KEPT[:-10],), id="in-mid-body"),
    ],
)
async def test_once_an_answer_has_begun_the_request_is_not_sent_again(
    provider: Provider, fake: FakeProvider, begun: tuple[Step, ...]
) -> None:
    fake.answer(KEPT, KeepAlive())
    await collect(provider, ASKED)
    fake.answer(*begun)
    await failure(provider, ASKED)
    assert [asked.connection for asked in fake.requests] == [0, 0]
    assert fake.unexpected == []


async def test_an_error_status_on_a_kept_connection_is_not_sent_again(
    provider: Provider, fake: FakeProvider
) -> None:
    fake.answer(KEPT, KeepAlive())
    await collect(provider, ASKED)
    fake.answer(http_response(503))
    assert (await failure(provider, ASKED)).kind is Kind.OVERLOADED
    assert len(fake.requests) == 2


# Errors


def told(code: Any, message: str = "no", **metadata: Any) -> dict[str, Any]:
    """An error as OpenRouter tells it."""
    return {"error": {"code": code, "message": message, "metadata": metadata}}


@pytest.mark.parametrize(
    ("status", "body", "kind", "retryable"),
    [
        (401, told(401, "User not found."), Kind.AUTHENTICATION, False),
        (402, told(402, "Insufficient credits"), Kind.CREDIT, False),
        (403, told(403, reasons=["violence"], flagged_input="x"), Kind.MODERATION, False),
        (403, told(403, error_type="content_policy_violation"), Kind.MODERATION, False),
        (403, told(403, "Key limit exceeded"), Kind.AUTHENTICATION, False),
        (400, told(400, error_type="context_length_exceeded"), Kind.CONTEXT_LENGTH, False),
        (400, told(400, error_type="invalid_request"), Kind.INVALID_REQUEST, False),
        (404, told(404, "No endpoints found"), Kind.INVALID_REQUEST, False),
        (413, told(413), Kind.INVALID_REQUEST, False),
        (422, told(422), Kind.INVALID_REQUEST, False),
        (408, told(408), Kind.TIMEOUT, True),
        (429, told(429, error_type="rate_limit_exceeded"), Kind.RATE_LIMIT, True),
        (429, {"error": {"code": "insufficient_quota", "message": "no"}}, Kind.CREDIT, False),
        (500, told(500), Kind.OVERLOADED, True),
        (502, told(502, error_type="provider_unavailable"), Kind.OVERLOADED, True),
        (503, told(503), Kind.OVERLOADED, True),
        (524, told(524), Kind.OVERLOADED, True),
        (529, told(529, error_type="provider_overloaded"), Kind.OVERLOADED, True),
        (307, {}, Kind.PROTOCOL, False),
    ],
)
@pytest.mark.parametrize("mid_stream", [False, True])
async def test_an_error_is_of_its_kind_and_says_whether_it_is_worth_asking_again(
    openrouter: Provider,
    fake: FakeProvider,
    status: int,
    body: dict[str, Any],
    kind: Kind,
    retryable: bool,
    mid_stream: bool,
) -> None:
    if mid_stream:
        if not body:
            return
        choice = {"delta": {"content": ""}, "finish_reason": "error"}
        fake.answer(SSE_HEAD, sse({"id": "gen-1", "choices": [choice], **body}))
    else:
        fake.answer(http_response(status, body))
    error = await failure(openrouter, ASKED)
    assert (error.kind, error.retryable) == (kind, retryable)


async def test_when_to_ask_again_is_told_with_the_error(
    openrouter: Provider, fake: FakeProvider
) -> None:
    body = told(429, retry_after_seconds=17, headers={"Retry-After": "18"})
    fake.answer(http_response(429, body, {"Retry-After": "19"}))
    fake.answer(http_response(429, body))
    fake.answer(http_response(200, told(429, retry_after_seconds=17)))
    fake.answer(SSE_HEAD, sse(told(503, "Please try again in 20ms")))
    fake.answer(http_response(402, told(402, retry_after_seconds=17)))
    hints = [(await failure(openrouter, ASKED)).retry_after for _ in range(5)]
    assert hints == [19, 18, 17, 0.02, None]


async def test_an_error_in_a_list_of_one_is_read(provider: Provider, fake: FakeProvider) -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3.5s"}
    error = {"code": 429, "message": "Quota exceeded", "details": [info]}
    body = json.dumps([{"error": error}])
    fake.answer(http_response(429, body, {"Content-Type": "application/json"}))
    failed = await failure(provider, ASKED)
    assert (failed.kind, failed.retry_after) == (Kind.RATE_LIMIT, 3.5)
    assert "Quota exceeded" in failed.detail


async def test_the_operators_log_has_the_words_of_the_service_behind_openrouter(
    serve: Serve, fake: FakeProvider, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(f"""
storage: %(storage)s
providers:
  main: {{use: openrouter, api_key: "{KEY}", base_url: "{fake.url}"}}
models:
  - {{match: "*", ask: [main]}}
""")
    raw = {
        "error": {"message": f"The prompt “{QUESTION}” of sk-acme-0123456789abcdef is a duplicate"}
    }
    fake.always(
        http_response(
            400, told(400, "Provider returned error", provider_name="Acme", raw=json.dumps(raw))
        )
    )
    bot = await served.add_bot()
    answer = await served.chat(bot, await served.session(bot), QUESTION)
    assert answer.status == 502 and b"Acme" not in answer.body
    [line] = [r.getMessage() for r in caplog.records if r.name == "chatd.routing"]
    assert "main" in line and "Acme" in line and "is a duplicate" in line
    assert "4711" not in caplog.text and "sk-" not in caplog.text


@pytest.mark.parametrize(
    "data",
    [
        '{"choices": [{"delta": {"content": "Hi"}}], "usage": {"prompt_tokens": NaN, "cost": NaN}}',
        '{"choices": [{"delta": {"content": "Hi"}}], "usage": {"cost": 1e999}}',
        '{"choices": [{"delta": {"content": "Hi"}}], "usage": {"prompt_tokens": 1'
        + "0" * 40
        + "}}",
    ],
)
async def test_numbers_that_json_has_not_do_no_harm(
    provider: Provider, fake: FakeProvider, data: str
) -> None:
    fake.answer(SSE_HEAD, sse(data, "[DONE]"))
    assert text_of(await collect(provider, ASKED)) == "Hi"


async def test_half_a_character_in_a_chunk_is_kept_for_the_other_half(
    provider: Provider, fake: FakeProvider
) -> None:
    chunks = [json.dumps({"choices": [{"delta": {"content": half}}]}) for half in "\ud83d\ude00"]
    fake.answer(SSE_HEAD, sse(*chunks, "[DONE]"))
    assert text_of(await collect(provider, ASKED)) == "\ud83d\ude00"


@pytest.mark.parametrize(
    "models",
    [
        {"object": "list", "data": [{"id": "a/b", "object": "model"}]},
        {"data": [], "has_more": False, "first_id": None},
        {"object": "list", "data": None},
        [{"id": "a/b"}],
    ],
)
async def test_check_knows_the_lists_of_models_that_services_give(
    provider: Provider, fake: FakeProvider, models: Any
) -> None:
    fake.answer(http_response(200, json.dumps(models), {"Content-Type": "text/plain"}))
    await provider.check()
    assert (fake.requests[0].method, fake.requests[0].path) == ("GET", "/v1/models")


@pytest.mark.parametrize("told", [{}, {"data": {}}, {"data": "a/b"}, "a/b", None, 7])
async def test_check_says_when_somebody_else_seems_to_answer(
    provider: Provider, fake: FakeProvider, told: Any
) -> None:
    fake.answer(http_response(200, json.dumps(told)))
    with pytest.raises(ProviderError) as raised:
        await provider.check()
    assert (raised.value.kind, raised.value.retryable) == (Kind.PROTOCOL, False)
    assert raised.value.detail.startswith("HTTP 200 at /models")
    assert raised.value.detail.endswith("check base_url")


async def test_check_says_of_an_error_with_status_200_what_it_is(
    provider: Provider, fake: FakeProvider
) -> None:
    fake.answer(http_response(200, {"error": {"code": 401, "message": "No such key"}}))
    with pytest.raises(ProviderError, match="No such key") as raised:
        await provider.check()
    assert raised.value.kind is Kind.AUTHENTICATION


# Providers of others


@pytest.fixture
def open_parrot(tmp_path: Path) -> Callable[[str], Awaitable[Provider]]:
    """The provider over HTTP that the page on plugins shows."""
    (tmp_path / "parrot.py").write_text(plugin_files()["parrot.py"])
    offer = load_registry(tmp_path).providers["parrot"]
    return lambda url: offer.open({"url": url, "key": TestParrotOverHttp.key})


class TestParrotOverHttp(HttpProviderConformance):
    @pytest.fixture
    def open_at(
        self, open_parrot: Callable[[str], Awaitable[Provider]]
    ) -> Callable[[str], Awaitable[Provider]]:
        return open_parrot


async def test_the_provider_that_the_page_shows_answers(
    open_parrot: Callable[[str], Awaitable[Provider]], fake: FakeProvider
) -> None:
    provider = await open_parrot(fake.url)
    fake.answer(http_response(200, {"bird": "parrot"}))
    await provider.check()
    fake.answer(SSE_HEAD, sse({"says": "Hel"}, {"says": "lo!"}, {"done": True}))
    fake.answer(http_response(200, {"says": "Hello!", "done": True}))
    fake.answer(SSE_HEAD, sse({"says": "Hel"}, {"squawk": {"message": "no", "code": 429}}))
    fake.answer(SSE_HEAD, sse({"says": "Hel"}))
    assert [text_of(await collect(provider, ASKED)) for _ in range(2)] == ["Hello!", "Hello!"]
    kinds = [(await failure(provider, ASKED)).kind for _ in range(2)]
    await provider.close()
    assert kinds == [Kind.RATE_LIMIT, Kind.INCOMPLETE]
    assert [asked.path for asked in fake.requests] == ["/perch", *["/talk"] * 4]
