"""What a service does wrong, row by row, and what a client of chatd must see and storage keep.

A provider that asks over HTTP is put into a whole server, on SQLite and a free port, with a
service that misbehaves over raw sockets. Subclass `FaultConformance`, say how the provider is
configured and which wire format it reads, run pytest::

    class TestMyProvidersFaults(FaultConformance):
        use = "my_provider"
        wire = OpenAIWire()

        def settings(self, url):
            return {"base_url": url, "api_key": self.key}

The plugin must be installed, or lie in the folder `plugins`.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tornado.ioloop import IOLoop

from chatd.breaker import BreakerState
from chatd.domain import Chatbot, TurnStatus
from chatd.errors import ProviderErrorKind
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
)
from chatd.testing.served import Answer, Served, open_served
from chatd.testing.wire import MODEL, USAGE, WireFormat

_Kind = ProviderErrorKind

UPSTREAM = "upstream-words-7f3a"
"""Stands in whatever the service says of its failure."""

QUESTION = "Where is my parcel 4711?"
HTML = f"<!doctype html><title>Bad gateway</title><h1>nginx {UPSTREAM}</h1>"
HTML_TYPE = {"Content-Type": "text/html; charset=utf-8"}
ATTEMPTS = 2
GUARD_SECONDS = 20.0
"""What "ends at once" is held to; no more than a guard."""

CAP_BYTES = 64 * 1024 * 1024
"""What a service can send into the sockets' buffers and ours before it is hung up on."""


@dataclass
class Chat:
    """A session of a server whose providers ask the fakes."""

    served: Served
    bot: Chatbot
    session: str

    async def say(self, text: str = QUESTION, *, stream: bool = False) -> Answer:
        """Says something and reads the whole answer, whatever it is."""
        async with asyncio.timeout(GUARD_SECONDS):
            return await self.served.chat(self.bot, self.session, text, stream=stream)

    async def turn(self) -> TurnRecord:
        """The last turn, as it is stored."""
        return await self.served.last_turn(self.bot, self.session)

    async def failures(self) -> list[str | None]:
        """How each attempt of the last turn failed."""
        return [attempt["error"] for attempt in (await self.turn()).attempts]


Open = Callable[..., Awaitable[Chat]]


class FaultConformance:
    """Each test is something that services have been seen to do."""

    use: ClassVar[str]
    """The name that the provider is offered under."""
    wire: ClassVar[WireFormat]
    plugins: ClassVar[Path | None] = None
    """A folder of plugins to load, where the provider is not installed."""
    key: ClassVar[str] = "sk-conformance-0123456789"

    def settings(self, url: str) -> Mapping[str, Any]:
        """The provider's settings for a service at an address like http://127.0.0.1:1. Override."""
        pytest.fail("override settings")

    @pytest.fixture
    def first(self, io_loop: IOLoop) -> Iterator[FakeProvider]:
        """The service that is at fault."""
        yield from _running(io_loop)

    @pytest.fixture
    def second(self, io_loop: IOLoop) -> Iterator[FakeProvider]:
        """The next in the chain."""
        yield from _running(io_loop)

    @pytest.fixture
    def chat(
        self,
        io_loop: IOLoop,
        tmp_path: Path,
        first: FakeProvider,
        second: FakeProvider,
        caplog: pytest.LogCaptureFixture,
    ) -> Iterator[Open]:
        """`await chat()` serves and begins a session; afterwards the logs are looked through."""
        stack = AsyncExitStack()
        caplog.set_level("DEBUG")

        async def start(
            *, chain: bool = False, breaker: Mapping[str, float] | None = None, **timeouts: float
        ) -> Chat:
            common = {
                "use": self.use,
                "timeouts": timeouts,
                "retries": {"attempts": ATTEMPTS, "base": 0.01},
                "breaker": breaker or {"requests": 1000},
            }
            config = {
                "storage": {"use": "sqlite", "path": str(tmp_path / "chatd.db")},
                "providers": {
                    "first": {**common, **self.settings(first.url)},
                    "second": {**common, **self.settings(second.url)},
                },
                "models": [{"match": "*", "ask": ["first", *(["second"] if chain else [])]}],
                "plugins": {"folder": str(self.plugins)} if self.plugins else {},
            }
            # A JSON document is a YAML document.
            path = tmp_path / "chatd.yaml"
            path.write_text(json.dumps(config))
            served = await open_served(path, stack)
            bot = await served.add_bot()
            return Chat(served, bot, await served.session(bot))

        yield start
        io_loop.run_sync(stack.aclose, timeout=30)
        for secret in (self.key, QUESTION, "<h1>"):
            assert secret not in caplog.text, "a log holds what none may"

    def stream(self, *steps: Step) -> tuple[Step, ...]:
        """A script of a stream that has begun."""
        return (SSE_HEAD, self.wire.start(), *steps)

    def hello(self, text: str = "Hello!", model: str = MODEL) -> tuple[Step, ...]:
        """A script of a good answer."""
        return (SSE_HEAD, self.wire.start(model=model), self.wire.said(text), self.wire.end())

    # No answer, or none in time

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("how", ["silence", "comments", "start and comments"])
    async def test_1_comments_for_ever_are_no_token(
        self, chat: Open, first: FakeProvider, second: FakeProvider, how: str, stream: bool
    ) -> None:
        comments = Flood(b": PROCESSING\n\n", pause=0.02)
        first.always(
            *{
                "silence": (Hold(),),
                "comments": (SSE_HEAD, comments),
                "start and comments": self.stream(comments),
            }[how]
        )
        second.always(*self.hello("From the second."))
        here = await chat(chain=True, first_token=0.3)
        _assert_said(await here.say(stream=stream), "From the second.", stream)
        assert await here.failures() == [_Kind.TIMEOUT, None]
        await first.requests[0].closed_within(GUARD_SECONDS)
        assert (len(first.requests), len(second.requests)) == (1, 1)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_1_without_anybody_else_it_is_a_timeout(
        self, chat: Open, first: FakeProvider, stream: bool
    ) -> None:
        first.always(SSE_HEAD, Flood(b": PROCESSING\n\n", pause=0.02))
        here = await chat(first_token=0.3, plain=0.3)
        await _assert_failed(here, stream, 504, "provider_timeout", _Kind.TIMEOUT)

    async def test_18_a_stream_that_stalls_is_kept_as_far_as_it_came(
        self, chat: Open, first: FakeProvider, second: FakeProvider
    ) -> None:
        first.always(*self.stream(self.wire.said("Half an ans"), Hold()))
        here = await chat(chain=True, idle=0.3)
        await _assert_broken(here, "Half an ans", "provider_timeout", _Kind.TIMEOUT)
        await first.requests[0].closed_within(GUARD_SECONDS)
        assert second.requests == []

    async def test_18_comments_do_not_put_off_the_idle_timeout(
        self, chat: Open, first: FakeProvider
    ) -> None:
        comments = Flood(b": keep-alive\n\n", pause=0.02)
        first.always(*self.stream(self.wire.said("Half an ans"), comments))
        here = await chat(idle=0.3)
        await _assert_broken(here, "Half an ans", "provider_timeout", _Kind.TIMEOUT)

    async def test_19_a_trickle_is_ended_by_the_total_deadline(
        self, chat: Open, first: FakeProvider
    ) -> None:
        first.always(*self.stream(Flood(self.wire.said("x"), pause=0.1)))
        here = await chat(total=0.8)
        got = await here.say(stream=True)
        assert got.status == 200 and _error_of(got) == "provider_timeout"
        turn = await here.turn()
        assert turn.status is TurnStatus.INTERRUPTED and set(turn.reply or "") == {"x"}
        await first.requests[0].closed_within(GUARD_SECONDS)

    # Ends

    @pytest.mark.parametrize("stream", [False, True])
    async def test_2_a_body_that_stays_open_after_the_end_is_not_waited_for(
        self, chat: Open, first: FakeProvider, stream: bool
    ) -> None:
        first.always(*self.hello(), Hold())
        here = await chat()
        _assert_said(await here.say(stream=stream), "Hello!", stream)
        await first.requests[0].closed_within(GUARD_SECONDS)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_3_an_answer_that_just_stops_is_interrupted(
        self, chat: Open, first: FakeProvider, second: FakeProvider, stream: bool
    ) -> None:
        first.always(*self.stream(self.wire.said("Half an ans")))
        here = await chat(chain=True)
        if stream:
            await _assert_broken(here, "Half an ans", "provider_failed", _Kind.INCOMPLETE)
        else:
            got = await here.say()
            assert (got.json["response"], got.json["finish_reason"]) == (
                "Half an ans",
                "interrupted",
            )
        assert (len(first.requests), len(second.requests)) == (1, 0)

    async def test_4_other_ends_are_as_good(self, chat: Open, first: FakeProvider) -> None:
        here = await chat()
        for name, end in self.wire.ends().items():
            first.answer(*self.stream(self.wire.said("Hello!"), end))
            got = await here.say(stream=True)
            assert (_text_of(got), _error_of(got)) == ("Hello!", None), name
            assert (await here.turn()).status is TurnStatus.COMPLETED, name

    async def test_9_usage_is_recorded_once(self, chat: Open, first: FakeProvider) -> None:
        here = await chat()
        for script in ((self.wire.whole("Hello!"),), self.hello()):
            first.answer(*script)
            await here.say()
            usage = (await here.turn()).usage
            assert (usage.input_tokens, usage.output_tokens, usage.cost_usd) == (
                USAGE.input_tokens,
                USAGE.output_tokens,
                None,
            )

    # Failures that are told

    async def test_5_a_failure_told_before_the_first_token_is_tried_again(
        self, chat: Open, first: FakeProvider
    ) -> None:
        here = await chat()
        for name, (failure, kind) in self.wire.failures(UPSTREAM).items():
            first.answer(*self.stream(failure))
            first.answer(*self.hello())
            got = await here.say(stream=True)
            assert (_text_of(got), _error_of(got)) == ("Hello!", None), name
            assert await here.failures() == [kind, None], name
            _assert_nothing_told(self.key, got)

    async def test_5_a_failure_told_after_the_first_token_keeps_what_was_said(
        self, chat: Open, first: FakeProvider, second: FakeProvider
    ) -> None:
        here = await chat(chain=True)
        for name, (failure, kind) in self.wire.failures(UPSTREAM).items():
            first.answer(*self.stream(self.wire.said("Half an ans"), failure, Hold()))
            code = "rate_limited" if kind is _Kind.RATE_LIMIT else "provider_failed"
            await _assert_broken(here, "Half an ans", code, kind)
            assert second.requests == [], name

    @pytest.mark.parametrize("stream", [False, True])
    async def test_6_an_error_with_status_200_is_an_error(
        self, chat: Open, first: FakeProvider, stream: bool
    ) -> None:
        _, body = self.wire.error(_Kind.OVERLOADED, UPSTREAM)
        first.always(http_response(200, body))
        here = await chat()
        kinds = [_Kind.OVERLOADED] * ATTEMPTS
        await _assert_failed(here, stream, 502, "provider_failed", *kinds)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_7_an_answer_without_a_word_is_no_success(
        self, chat: Open, first: FakeProvider, stream: bool
    ) -> None:
        bodies = [self.stream(body) for body in self.wire.empties().values()]
        here = await chat()
        for script in [*bodies, (self.wire.whole(""),)]:
            first.always(*script)
            before = len(first.requests)
            await _assert_failed(here, stream, 502, "provider_failed")
            assert len(first.requests) - before == ATTEMPTS

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("kind", [_Kind.AUTHENTICATION, _Kind.CREDIT])
    async def test_15_a_dead_key_is_not_tried_again_and_told_to_the_operator(
        self,
        chat: Open,
        first: FakeProvider,
        second: FakeProvider,
        caplog: pytest.LogCaptureFixture,
        kind: ProviderErrorKind,
        stream: bool,
    ) -> None:
        status, body = self.wire.error(kind, f"{UPSTREAM}: no money for {self.key}: {QUESTION}")
        first.always(http_response(status, body))
        second.always(*self.hello("From the second."))
        here = await chat(chain=True)
        got = await here.say(stream=stream)
        _assert_said(got, "From the second.", stream)
        _assert_nothing_told(self.key, got)
        assert await here.failures() == [kind, None]
        assert len(first.requests) == 1
        [line] = [r.getMessage() for r in caplog.records if "first failed" in r.getMessage()]
        assert kind in line and UPSTREAM in line and self.key not in line

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("status", [400, 404, 413, 422])
    async def test_16_what_is_wrong_with_the_request_is_not_tried_again(
        self, chat: Open, first: FakeProvider, status: int, stream: bool
    ) -> None:
        _, body = self.wire.error(_Kind.INVALID_REQUEST, UPSTREAM)
        first.always(http_response(status, body))
        here = await chat()
        await _assert_failed(here, stream, 502, "provider_failed", _Kind.INVALID_REQUEST)

    async def test_16_a_history_that_is_too_long_is_shortened_once(
        self, chat: Open, first: FakeProvider
    ) -> None:
        here = await chat()
        first.answer(*self.hello("One."))
        first.answer(*self.hello("Two."))
        assert (await here.say("Say one.")).status == 200
        assert (await here.say("Say two.")).status == 200
        status, body = self.wire.error(_Kind.CONTEXT_LENGTH, UPSTREAM)
        first.answer(http_response(status, body))
        first.answer(*self.hello("It fits."))
        got = await here.say()
        assert (got.json["response"], got.json["history_truncated"]) == ("It fits.", True)
        asked = [received.body.decode() for received in first.requests]
        assert "Say one." in asked[2] and "Say one." not in asked[3]
        assert QUESTION in asked[3]

    async def test_16_what_stays_too_long_is_the_clients_to_mend(
        self, chat: Open, first: FakeProvider, second: FakeProvider
    ) -> None:
        status, body = self.wire.error(_Kind.CONTEXT_LENGTH, UPSTREAM)
        first.always(http_response(status, body))
        here = await chat(chain=True)
        await _assert_failed(here, False, 422, "invalid_request", _Kind.CONTEXT_LENGTH)
        assert second.requests == []

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("status", [408, 500, 502, 503, 504, 524, 529])
    async def test_17_what_may_pass_is_tried_again_and_then_asked_of_the_next(
        self, chat: Open, first: FakeProvider, second: FakeProvider, status: int, stream: bool
    ) -> None:
        first.always(http_response(status, HTML, HTML_TYPE))
        second.always(*self.hello("From the second."))
        here = await chat(chain=True)
        got = await here.say(stream=stream)
        _assert_said(got, "From the second.", stream)
        _assert_nothing_told(self.key, got)
        kind = _Kind.TIMEOUT if status == 408 else _Kind.OVERLOADED
        assert await here.failures() == [*[kind] * ATTEMPTS, None]
        assert (await here.turn()).provider == "second"

    # Waiting

    @pytest.mark.parametrize("date", [False, True])
    @pytest.mark.parametrize(("kind", "code"), [(429, "rate_limited"), (503, "overloaded")])
    async def test_14_an_hour_is_not_waited_for_and_told_in_bounds(
        self, chat: Open, first: FakeProvider, kind: int, code: str, date: bool
    ) -> None:
        later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
        first.always(http_response(kind, b"", {"Retry-After": later if date else "3600"}))
        here = await chat()
        got = await here.say()
        assert (got.status, got.json["code"], got.headers["Retry-After"]) == (kind, code, "60")
        assert len(first.requests) == 1

    async def test_14_a_second_is_waited_for(self, chat: Open, first: FakeProvider) -> None:
        status, body = self.wire.error(_Kind.RATE_LIMIT, UPSTREAM)
        first.answer(http_response(status, body, {"Retry-After": "1"}))
        first.answer(*self.hello())
        here = await chat()
        before = asyncio.get_running_loop().time()
        _assert_said(await here.say(), "Hello!", False)
        assert asyncio.get_running_loop().time() - before >= 1

    # Bytes

    async def test_10_a_line_of_a_megabyte_is_read_whole(
        self, chat: Open, first: FakeProvider
    ) -> None:
        text = "wörd " * 200_000
        first.always(*self.hello(text))
        here = await chat()
        assert (await here.say()).json["response"] == text
        assert (await here.turn()).reply == text

    async def test_10_a_line_over_the_cap_is_an_error_and_memory_bounded(
        self, chat: Open, first: FakeProvider
    ) -> None:
        first.always(*self.stream(b'data: {"x": "', Flood(b"x" * 65536)))
        here = await chat()
        await _assert_failed(here, True, 502, "provider_failed", *[_Kind.PROTOCOL] * ATTEMPTS)
        assert first.requests[0].sent < CAP_BYTES

    @pytest.mark.parametrize("change", ["as it is", "crlf", "cr", "bom"])
    async def test_10_a_stream_cut_anywhere_is_read_right(
        self, chat: Open, first: FakeProvider, change: str
    ) -> None:
        data = self.wire.start() + self.wire.said("Grüße 🎈") + self.wire.end()
        data = {
            "as it is": data,
            "crlf": data.replace(b"\n", b"\r\n"),
            "cr": data.replace(b"\n", b"\r"),
            "bom": b"\xef\xbb\xbf" + data,
        }[change]
        pieces: list[Step] = []
        for place in range(len(data)):
            # Each byte by itself where a character or a line can be cut, else some at once.
            pieces.append(data[place : place + 1])
            if data[place] in b"\r\n" or data[place] >= 0x80:
                pieces.append(Pause(0.002))
        first.always(SSE_HEAD, *pieces)
        here = await chat()
        _assert_said(await here.say(stream=True), "Grüße 🎈", True)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_11_a_chunk_that_is_not_json_is_an_error(
        self, chat: Open, first: FakeProvider, stream: bool
    ) -> None:
        first.always(*self.stream(b'data: {"choices": [{"delta"\n\n', Hold()))
        here = await chat()
        kinds = [_Kind.PROTOCOL] * ATTEMPTS
        await _assert_failed(here, stream, 502, "provider_failed", *kinds)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("status", [200, 403, 502])
    async def test_11_a_page_is_an_error_and_reaches_no_client(
        self, chat: Open, first: FakeProvider, status: int, stream: bool
    ) -> None:
        first.always(http_response(status, HTML, HTML_TYPE))
        here = await chat()
        kind = {200: _Kind.PROTOCOL, 403: _Kind.AUTHENTICATION, 502: _Kind.OVERLOADED}[status]
        kinds = [kind] * (1 if status == 403 else ATTEMPTS)
        await _assert_failed(here, stream, 502, "provider_failed", *kinds)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_23_a_small_body_does_not_become_a_huge_one(
        self, chat: Open, first: FakeProvider, stream: bool
    ) -> None:
        bomb = gzip.compress(b" " * CAP_BYTES)
        kind = "text/event-stream" if stream else "application/json"
        first.always(http_response(200, bomb, {"Content-Encoding": "gzip", "Content-Type": kind}))
        here = await chat()
        kinds = [_Kind.PROTOCOL] * ATTEMPTS
        await _assert_failed(here, stream, 502, "provider_failed", *kinds)

    async def test_23_a_body_without_an_end_is_not_read_for_ever(
        self, chat: Open, first: FakeProvider
    ) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
        first.always(head, Flood(b" " * 65536))
        here = await chat()
        await _assert_failed(here, False, 502, "provider_failed", *[_Kind.PROTOCOL] * ATTEMPTS)
        for received in first.requests:
            await received.closed_within(GUARD_SECONDS)
            assert received.sent < CAP_BYTES

    # Connections

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("when", ["before headers", "before the first token"])
    async def test_12_a_reset_before_the_first_token_is_tried_again(
        self, chat: Open, first: FakeProvider, when: str, stream: bool
    ) -> None:
        early: tuple[Step, ...] = (Reset(),)
        first.answer(*(early if when == "before headers" else self.stream(Pause(0.05), Reset())))
        first.answer(*self.hello())
        here = await chat()
        _assert_said(await here.say(stream=stream), "Hello!", stream)
        assert len(await here.failures()) == len(first.requests) == 2

    async def test_12_a_reset_in_mid_stream_keeps_what_was_said(
        self, chat: Open, first: FakeProvider, second: FakeProvider
    ) -> None:
        first.always(*self.stream(self.wire.said("Half an ans"), Pause(0.1), Reset()))
        here = await chat(chain=True)
        await _assert_broken(here, "Half an ans", "provider_failed", _Kind.INCOMPLETE)
        assert second.requests == []

    async def test_13_a_kept_connection_that_died_is_not_the_clients_matter(
        self, chat: Open, first: FakeProvider
    ) -> None:
        kept = self.wire.whole("One.").replace(b"Connection: close", b"Connection: keep-alive")
        first.answer(kept, KeepAlive())
        first.answer(Reset())
        first.answer(*self.hello("Two."))
        here = await chat()
        assert (await here.say("Say one.")).json["response"] == "One."
        assert (await here.say("Say two.")).json["response"] == "Two."
        connections = [received.connection for received in first.requests]
        assert connections == [0, 0, 1]
        assert await here.failures() == [None]

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    async def test_20_a_redirect_is_refused_and_the_key_stays_here(
        self, chat: Open, first: FakeProvider, second: FakeProvider, status: int, stream: bool
    ) -> None:
        first.always(http_response(status, b"", {"Location": f"{second.url}/v1/elsewhere"}))
        here = await chat()
        await _assert_failed(here, stream, 502, "provider_failed", _Kind.PROTOCOL)
        assert second.connections == 0

    # Health and names

    async def test_21_one_that_fails_each_time_is_left_alone(
        self, chat: Open, first: FakeProvider, second: FakeProvider
    ) -> None:
        first.always(http_response(503, b""))
        second.always(*self.hello())
        breaker = {"requests": 4, "open_seconds": 60}
        here = await chat(chain=True, breaker=breaker)
        for _ in range(6):
            _assert_said(await here.say(), "Hello!", False)
        assert (len(first.requests), len(second.requests)) == (4, 6)
        states = here.served.runtime.router.states()
        assert states[("first", here.bot.model)] is BreakerState.OPEN

    @pytest.mark.parametrize("stream", [False, True])
    async def test_22_the_model_that_answered_is_recorded(
        self, chat: Open, first: FakeProvider, stream: bool
    ) -> None:
        first.always(*self.hello(model="other/model-2026"))
        here = await chat()
        await here.say(stream=stream)
        turn = await here.turn()
        assert turn.model == "other/model-2026"
        assert turn.attempts[0]["model"] == here.bot.model


def _running(io_loop: IOLoop) -> Iterator[FakeProvider]:
    fake = FakeProvider()
    io_loop.run_sync(fake.start)
    yield fake
    io_loop.run_sync(fake.stop)


def _events(got: Answer) -> list[dict[str, Any]]:
    """The events of a streamed answer."""
    assert got.headers["Content-Type"].startswith("text/event-stream"), got.body
    lines = [line[6:] for line in got.body.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def _text_of(got: Answer) -> str:
    return "".join(event.get("delta", "") for event in _events(got))


def _error_of(got: Answer) -> str | None:
    """The code of the error in which a streamed answer ends."""
    last = _events(got)[-1]
    return str(last["code"]) if last["type"] == "error" else None


def _assert_said(got: Answer, text: str, stream: bool) -> None:
    """The client has a whole answer."""
    assert got.status == 200, got.body
    if stream:
        assert (_text_of(got), _error_of(got)) == (text, None)
    else:
        assert (got.json["response"], got.json["finish_reason"]) == (text, "stop")


def _assert_nothing_told(key: str, got: Answer) -> None:
    """Nothing of the service's own words is in the answer."""
    for secret in (UPSTREAM, key, "<h1>", "127.0.0.1"):
        assert secret.encode() not in got.body


async def _assert_failed(
    here: Chat, stream: bool, status: int, code: str, *kinds: ProviderErrorKind
) -> None:
    """The client is told `code`, the question alone is stored, each attempt failed as said."""
    got = await here.say(stream=stream)
    if stream:
        assert got.status == 200 and _error_of(got) == code and _text_of(got) == ""
    else:
        assert (got.status, got.json["code"]) == (status, code)
        assert got.headers["Content-Type"].startswith("application/problem+json")
    _assert_nothing_told(FaultConformance.key, got)
    assert (await here.served.transcript(here.bot, here.session))[-1] == ("user", QUESTION)
    turn = await here.turn()
    assert (turn.status, turn.error_code, turn.reply) == (TurnStatus.FAILED, code, None)
    if kinds:
        assert [attempt["error"] for attempt in turn.attempts] == list(kinds)


async def _assert_broken(here: Chat, text: str, code: str, kind: ProviderErrorKind) -> None:
    """A streamed answer that broke off: what was said is shown and kept, and the error told."""
    got = await here.say(stream=True)
    assert (_text_of(got), _error_of(got)) == (text, code)
    _assert_nothing_told(FaultConformance.key, got)
    turn = await here.turn()
    assert (turn.status, turn.reply, turn.error_code) == (TurnStatus.INTERRUPTED, text, code)
    assert [attempt["error"] for attempt in turn.attempts] == [kind]
