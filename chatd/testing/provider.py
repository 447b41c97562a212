"""The contract of a provider, sentence by sentence, as tests that any implementation can run.

Needs pytest and pytest-tornasync. Subclass `ProviderConformance`, override `case`, run pytest::

    class TestMyProvider(ProviderConformance):
        @pytest.fixture
        def case(self):
            return ProviderCase(
                open=lambda: open_my_provider({"base_url": "http://127.0.0.1:4010/v1"}),
                question="Say hello.",
                answer="Hello!",
                answered_by="my/model-2026",
                usage=Usage(input_tokens=3, output_tokens=2),
            )

The answer must be the same each time, so give it a mock of the real service. A provider that
reaches its service over HTTP runs `HttpProviderConformance` too, which needs its address only
and brings its own faulty server.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import get_args

import pytest
from tornado.ioloop import IOLoop

from chatd.domain import Message, Usage
from chatd.errors import ProviderError, ProviderErrorKind
from chatd.provider import (
    Event,
    Finish,
    FinishReason,
    Provider,
    ProviderRequest,
    TextDelta,
    Timeouts,
    UsageReport,
)
from chatd.testing.fake_provider import SSE_HEAD, FakeProvider, Flood, Hold, Reset, http_response

Opener = Callable[[], Awaitable[Provider]]
PROMPT_SECONDS = 5.0
"""What "at once" and "does not hang" are held to; no more than a guard."""

HTML = "<!doctype html><title>Bad gateway</title><h1>nginx</h1>"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProviderCase:
    """A provider, a question, and everything that is to come of it.

    :param open: opens the provider; called once in each test.
    :param answer: the text of the answer to `question`.
    :param answered_by: `Finish.model`; `None` when the provider does not tell it.
    :param usage: the last report; `None` when the provider makes none.
    """

    open: Opener
    answer: str
    question: str = "Say hello."
    model: str = "test/model"
    answered_by: str | None = None
    usage: Usage | None = None

    def request(self, *, stream: bool) -> ProviderRequest:
        """Asks the question."""
        return ProviderRequest(self.model, [Message("user", self.question)], stream=stream)


class ProviderConformance:
    """Every test is one promise of `chatd.Provider`."""

    @pytest.fixture
    def case(self) -> ProviderCase:
        """Override this."""
        pytest.fail("override the fixture case")

    @pytest.fixture
    def provider(self, io_loop: IOLoop, case: ProviderCase) -> Iterator[Provider]:
        """The provider, closed after the test."""
        provider = io_loop.run_sync(lambda: _opened(case.open))
        yield provider
        io_loop.run_sync(provider.close)

    async def test_a_streamed_answer_ends_with_exactly_one_finish(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        events = await collect(provider, case.request(stream=True))
        assert [isinstance(event, Finish) for event in events] == [False] * (len(events) - 1) + [
            True
        ]

    async def test_a_plain_answer_ends_with_exactly_one_finish(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        events = await collect(provider, case.request(stream=False))
        assert [isinstance(event, Finish) for event in events] == [False] * (len(events) - 1) + [
            True
        ]

    async def test_a_streamed_answer_says_what_was_answered(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        assert text_of(await collect(provider, case.request(stream=True))) == case.answer

    async def test_a_plain_answer_says_the_same(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        assert text_of(await collect(provider, case.request(stream=False))) == case.answer

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_text_delta_is_never_empty(
        self, case: ProviderCase, provider: Provider, stream: bool
    ) -> None:
        events = await collect(provider, case.request(stream=stream))
        texts = [event.text for event in events if isinstance(event, TextDelta)]
        assert texts and all(texts)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_the_finish_names_the_model_that_answered_and_a_known_reason(
        self, case: ProviderCase, provider: Provider, stream: bool
    ) -> None:
        finish = (await collect(provider, case.request(stream=stream)))[-1]
        assert isinstance(finish, Finish)
        assert finish.model == case.answered_by
        assert finish.reason in get_args(FinishReason)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_the_last_usage_report_is_what_the_answer_took(
        self, case: ProviderCase, provider: Provider, stream: bool
    ) -> None:
        events = await collect(provider, case.request(stream=stream))
        reports = [event.usage for event in events if isinstance(event, UsageReport)]
        assert (reports[-1] if reports else None) == case.usage

    async def test_answers_to_requests_at_the_same_time_are_kept_apart(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        requests = [case.request(stream=i % 2 == 0) for i in range(8)]
        answers = await asyncio.gather(*(collect(provider, request) for request in requests))
        assert [text_of(events) for events in answers] == [case.answer] * 8

    async def test_closing_after_the_first_event_ends_at_once_and_leaves_no_task(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        before = asyncio.all_tasks()
        events = provider.stream(case.request(stream=True))
        async with asyncio.timeout(PROMPT_SECONDS):
            await anext(events)
            await events.aclose()
        await _until(lambda: asyncio.all_tasks() <= before, "a task goes on after the iterator")
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    async def test_closing_before_the_first_event_asks_nobody_and_ends(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        events = provider.stream(case.request(stream=True))
        async with asyncio.timeout(PROMPT_SECONDS):
            await events.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    async def test_the_provider_answers_after_a_stream_was_left(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        async with aclosing(provider.stream(case.request(stream=True))) as events:
            await anext(events)
        assert text_of(await collect(provider, case.request(stream=True))) == case.answer

    @pytest.mark.parametrize("stream", [True, False])
    async def test_cancelling_the_reader_ends_at_once(
        self, case: ProviderCase, provider: Provider, stream: bool
    ) -> None:
        reader = asyncio.create_task(collect(provider, case.request(stream=stream)))
        await asyncio.sleep(0)
        reader.cancel()
        done, _ = await asyncio.wait([reader], timeout=PROMPT_SECONDS)
        assert done == {reader}
        # One that never waits is done before it can be cancelled.
        assert reader.cancelled() or text_of(reader.result()) == case.answer

    async def test_check_returns_when_the_provider_is_there(
        self, case: ProviderCase, provider: Provider
    ) -> None:
        checking = asyncio.ensure_future(provider.check())
        done, _ = await asyncio.wait([checking], timeout=PROMPT_SECONDS)
        assert done == {checking} and checking.exception() is None

    async def test_closing_lets_go_of_every_socket(
        self, io_loop: IOLoop, case: ProviderCase
    ) -> None:
        before = _open_sockets()
        provider = await case.open()
        await collect(provider, case.request(stream=True))
        async with aclosing(provider.stream(case.request(stream=True))) as events:
            await anext(events)
        await provider.close()
        await _until(lambda: _open_sockets() <= before, "a socket stays open after close()")


class HttpProviderConformance:
    """What holds for every provider that asks over HTTP, whatever it says there.

    Override `open_at`::

        class TestMyProviderOverHttp(HttpProviderConformance):
            @pytest.fixture
            def open_at(self):
                return lambda url: open_my_provider({"base_url": url, "api_key": self.key})
    """

    key = "sk-conformance-0123456789"
    """Give this to the provider as its key, so that the tests can look for it."""

    @pytest.fixture
    def open_at(self) -> Callable[[str], Awaitable[Provider]]:
        """Override this: opens the provider for a service at an address like http://127.0.0.1:1."""
        pytest.fail("override the fixture open_at")

    @pytest.fixture
    def fake(self, io_loop: IOLoop) -> Iterator[FakeProvider]:
        """A service that is at fault."""
        fake = io_loop.run_sync(_started)
        yield fake
        io_loop.run_sync(fake.stop)

    @pytest.fixture
    def provider(
        self,
        io_loop: IOLoop,
        fake: FakeProvider,
        open_at: Callable[[str], Awaitable[Provider]],
    ) -> Iterator[Provider]:
        """The provider, asking `fake`."""
        provider = io_loop.run_sync(lambda: _opened(lambda: open_at(fake.url)))
        yield provider
        io_loop.run_sync(provider.close)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_nobody_there_is_a_connection_error(
        self, fake: FakeProvider, provider: Provider, stream: bool
    ) -> None:
        await fake.stop()
        error = await failure(provider, request(stream))
        assert error.kind is ProviderErrorKind.CONNECTION
        assert error.retryable and not error.reached_model

    async def test_check_raises_a_provider_error_when_nobody_is_there(
        self, fake: FakeProvider, provider: Provider
    ) -> None:
        await fake.stop()
        with pytest.raises(ProviderError):
            await asyncio.wait_for(provider.check(), PROMPT_SECONDS)

    async def test_check_raises_an_authentication_error_for_a_wrong_key(
        self, fake: FakeProvider, provider: Provider
    ) -> None:
        fake.always(http_response(401, f"no such key: {self.key}"))
        with pytest.raises(ProviderError) as raised:
            await asyncio.wait_for(provider.check(), PROMPT_SECONDS)
        assert raised.value.kind is ProviderErrorKind.AUTHENTICATION
        assert self.key not in str(raised.value)

    @pytest.mark.parametrize("kind", ["text/html", "application/json"])
    async def test_check_takes_nobody_elses_status_200_for_the_service(
        self, fake: FakeProvider, provider: Provider, kind: str
    ) -> None:
        for body in (HTML, "OK", '{"login": "/portal"}', '{"error": "no such page"}'):
            fake.answer(http_response(200, body, {"Content-Type": kind}))
            with pytest.raises(ProviderError) as raised:
                await asyncio.wait_for(provider.check(), PROMPT_SECONDS)
            assert "<h1>" not in str(raised.value)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_connection_reset_before_an_answer_is_an_error_to_retry(
        self, fake: FakeProvider, provider: Provider, stream: bool
    ) -> None:
        fake.answer(Reset())
        error = await failure(provider, request(stream))
        assert error.kind is ProviderErrorKind.CONNECTION and error.retryable

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, ProviderErrorKind.INVALID_REQUEST),
            (401, ProviderErrorKind.AUTHENTICATION),
            (402, ProviderErrorKind.CREDIT),
            (404, ProviderErrorKind.INVALID_REQUEST),
            (413, ProviderErrorKind.INVALID_REQUEST),
            (422, ProviderErrorKind.INVALID_REQUEST),
            (429, ProviderErrorKind.RATE_LIMIT),
            (500, ProviderErrorKind.OVERLOADED),
            (502, ProviderErrorKind.OVERLOADED),
            (503, ProviderErrorKind.OVERLOADED),
            (504, ProviderErrorKind.OVERLOADED),
            (524, ProviderErrorKind.OVERLOADED),
            (529, ProviderErrorKind.OVERLOADED),
        ],
    )
    @pytest.mark.parametrize("stream", [True, False])
    async def test_an_error_status_is_an_error_of_its_kind_and_asked_once(
        self,
        fake: FakeProvider,
        provider: Provider,
        status: int,
        kind: ProviderErrorKind,
        stream: bool,
    ) -> None:
        fake.always(http_response(status, HTML, {"Content-Type": "text/html"}))
        error = await failure(provider, request(stream))
        assert (error.kind, error.status) == (kind, status)
        # Retrying is not the provider's.
        assert len(fake.requests) == 1

    async def test_the_seconds_of_retry_after_are_read(
        self, fake: FakeProvider, provider: Provider
    ) -> None:
        fake.answer(http_response(429, b"", {"Retry-After": "7"}))
        assert (await failure(provider, request(True))).retry_after == 7

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_is_refused_and_the_other_host_is_not_asked(
        self, fake: FakeProvider, provider: Provider, status: int
    ) -> None:
        async with FakeProvider() as other:
            fake.always(http_response(status, b"", {"Location": f"{other.url}/elsewhere"}))
            await failure(provider, request(True))
            with pytest.raises(ProviderError):
                await asyncio.wait_for(provider.check(), PROMPT_SECONDS)
            assert other.connections == 0

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_page_with_status_200_is_no_answer(
        self, fake: FakeProvider, provider: Provider, stream: bool
    ) -> None:
        fake.answer(http_response(200, HTML, {"Content-Type": "text/html; charset=utf-8"}))
        error = await failure(provider, request(stream))
        assert error.kind is ProviderErrorKind.PROTOCOL
        assert "<h1>" not in str(error)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_an_answer_that_just_stops_is_an_error(
        self, fake: FakeProvider, provider: Provider, stream: bool
    ) -> None:
        fake.answer(http_response(200, b"", {"Content-Length": "1000"}))
        assert (await failure(provider, request(stream))).retryable

    async def test_a_body_without_an_end_is_not_read_for_ever(
        self, fake: FakeProvider, provider: Provider
    ) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
        fake.answer(head, Flood(b" " * 65536))
        error = await failure(provider, request(False), seconds=30)
        assert error.kind is ProviderErrorKind.PROTOCOL
        await fake.requests[0].closed_within(PROMPT_SECONDS)
        assert fake.requests[0].sent < 64 * 1024 * 1024

    @pytest.mark.parametrize("stream", [True, False])
    async def test_cancelling_while_waiting_for_the_answer_hangs_up(
        self, fake: FakeProvider, provider: Provider, stream: bool
    ) -> None:
        fake.answer(Hold())
        async with _reading(provider, request(stream)) as reader:
            asked = await fake.received()
            reader.cancel()
            await asked.closed_within(PROMPT_SECONDS)

    async def test_cancelling_in_mid_stream_hangs_up(
        self, fake: FakeProvider, provider: Provider
    ) -> None:
        fake.answer(SSE_HEAD, b": working on it\n\n", Hold())
        async with _reading(provider, request(True)) as reader:
            asked = await fake.received()
            reader.cancel()
            await asked.closed_within(PROMPT_SECONDS)

    async def test_a_service_that_does_not_take_up_the_connection_is_a_timeout(
        self, fake: FakeProvider, open_at: Callable[[str], Awaitable[Provider]]
    ) -> None:
        # It takes the bytes and never answers the TLS handshake.
        provider = await open_at(fake.url.replace("http:", "https:"))
        short = replace(request(True), timeouts=Timeouts(connect=0.2))
        error = await failure(provider, short)
        await provider.close()
        assert error.kind is ProviderErrorKind.TIMEOUT and not error.reached_model

    async def test_the_key_is_in_no_error(self, fake: FakeProvider, provider: Provider) -> None:
        said = f'{{"error": {{"message": "Incorrect API key provided: {self.key}", "code": 401}}}}'
        for status in (200, 401, 403, 500):
            fake.answer(http_response(status, said, {"Content-Type": "application/json"}))
            error = await failure(provider, request(False))
            assert self.key not in str(error) + error.detail + repr(error)
        sent = fake.requests[0]
        assert self.key in str(sent.headers) + sent.path + sent.body.decode()


def request(stream: bool) -> ProviderRequest:
    """Asks something."""
    return ProviderRequest("test/model", [Message("user", "Say hello.")], stream=stream)


async def collect(
    provider: Provider, request: ProviderRequest, seconds: float = 3 * PROMPT_SECONDS
) -> list[Event]:
    """All events of an answer; raises `TimeoutError` when it does not end."""
    async with asyncio.timeout(seconds), aclosing(provider.stream(request)) as events:
        return [event async for event in events]


async def failure(
    provider: Provider, request: ProviderRequest, seconds: float = 3 * PROMPT_SECONDS
) -> ProviderError:
    """The error in which a request ends."""
    with pytest.raises(ProviderError) as raised:
        await collect(provider, request, seconds)
    return raised.value


def text_of(events: list[Event]) -> str:
    """What an answer says."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@asynccontextmanager
async def _reading(
    provider: Provider, request: ProviderRequest
) -> AsyncIterator[asyncio.Task[list[Event]]]:
    reader = asyncio.create_task(collect(provider, request))
    try:
        yield reader
    finally:
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader


async def _opened(open: Opener) -> Provider:
    return await open()


async def _started() -> FakeProvider:
    fake = FakeProvider()
    await fake.start()
    return fake


async def _until(true: Callable[[], bool], otherwise: str) -> None:
    """Waits until something is so."""
    end = time.monotonic() + PROMPT_SECONDS
    while not true():
        assert time.monotonic() < end, otherwise
        await asyncio.sleep(0.01)


def _open_sockets() -> set[int]:
    """The numbers of this process's open sockets."""
    numbers: set[int] = set()
    for number in range(min(os.sysconf("SC_OPEN_MAX"), 4096)):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                numbers.add(number)
    return numbers
