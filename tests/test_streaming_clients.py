"""Streams as clients read them: the AI SDK, one that is cut off anywhere, and one that is too slow."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream

from chatd.domain import Chatbot, TurnStatus
from chatd.handlers import streaming
from chatd.testing.fake_provider import SSE_HEAD, FakeProvider, Flood, Hold, Pause, sse
from tests.conftest import Serve
from tests.support import ECHO_CONFIG, KEY, Served

ROOT = Path(__file__).parent.parent
READER = ROOT / "tests" / "clients" / "ai_sdk.mjs"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}

WORDS = (
    'Straße "quoted" \\ back\nslash 漢字 🏳️‍🌈 naïve\ttab 👩‍👩‍👧 \u2028 line 𝄞 clef, é è, '
    "one two three four five six seven eight nine ten\r\nend 🎉"
)
SLOW_CONFIG = ECHO_CONFIG.replace(
    '{use: echo, reply: "You said: {message}"}',
    '{use: echo, reply: "You said: {message}", word_seconds: WORD}',
)
FAKE_CONFIG = """
storage: %(storage)s
providers:
  main:
    use: openai_compatible
    base_url: "FAKE/v1"
models:
  - {match: "*", ask: [main]}
"""
FINISH = sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, "[DONE]")


def says(*texts: str) -> bytes:
    """Upstream's events, one for each text."""
    return sse(*({"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts))


@pytest.fixture
def fake(io_loop: IOLoop) -> Iterator[FakeProvider]:
    provider = FakeProvider()
    io_loop.run_sync(provider.start)
    yield provider
    io_loop.run_sync(provider.stop)


async def serve_fake(serve: Serve, fake: FakeProvider) -> Served:
    return await serve(FAKE_CONFIG.replace("FAKE", fake.url))


# The AI SDK


async def ai_sdk(served: Served, path: str = "/api/chat", **task: Any) -> Any:
    """What the AI SDK's client makes of a chat; it must not warn of anything."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(READER),
        json.dumps({"api": served.url + path, **task}),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 1, lines
    return json.loads(lines[0])


def chat_body(bot: Chatbot, session: str, text: str, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": text}]
    known = {"api_key": KEY, "assistant_id": bot.id, "session_id": session}
    return {**known, "type": "message", "messages": said, "stream": True, **more}


async def test_the_ai_sdk_reads_a_clients_stream(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    got = await ai_sdk(served, body=chat_body(bot, session, WORDS))
    assert got["text"] == f"You said: {WORDS}"
    assert got["errors"] == []
    assert set(got["types"]) == {"start", "text-start", "text-delta", "text-end", "finish"}
    message = got["message"]
    told = message["metadata"]
    assert message["role"] == "assistant"
    assert message["id"] == told["turn_id"]
    assert told["session_id"] == session
    assert (told["model"], told["finish_reason"]) == ("echo", "stop")
    tokens = {"input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"}
    assert set(told["usage"]) == tokens | {"cost_usd"}
    assert told["stored"] is True
    assert await served.transcript(bot, session) == [("user", WORDS), ("assistant", got["text"])]


async def test_the_ai_sdk_reads_a_widgets_stream_which_does_not_tell_what_it_cost(
    served: Served,
) -> None:
    bot = await served.add_bot()
    begun = await served.post("/api/chat/widget/session", {"chatbot_id": bot.id})
    session = begun.json["session_id"]
    body = {"session_id": session, "message": WORDS, "stream": True}
    got = await ai_sdk(served, "/api/chat/widget", body=body)
    assert (got["text"], got["errors"]) == (f"You said: {WORDS}", [])
    told = got["message"]["metadata"]
    assert told["session_id"] == session
    assert not {"model", "usage"} & set(told)


async def test_the_ai_sdk_raises_what_fails_in_mid_stream(serve: Serve, fake: FakeProvider) -> None:
    fake.always(SSE_HEAD, says("Half of "), sse({"error": {"message": "secret", "code": 500}}))
    served = await serve_fake(serve, fake)
    bot = await served.add_bot()
    session = await served.session(bot)
    got = await ai_sdk(served, body=chat_body(bot, session, "Hi"))
    assert got["text"] == "Half of "
    assert len(got["errors"]) == 1
    assert got["errors"][0].endswith(".")
    assert "secret" not in got["errors"][0]
    assert "Type validation failed" not in got["errors"][0]


@pytest.mark.parametrize("widget", [False, True])
async def test_the_ai_sdk_reads_a_stopped_turn_as_aborted(serve: Serve, widget: bool) -> None:
    served = await serve(SLOW_CONFIG.replace("WORD", "0.05"))
    bot = await served.add_bot()
    session = await served.session(bot)
    text = "word " * 1000
    if widget:
        begun = await served.post("/api/chat/widget/session", {"chatbot_id": bot.id})
        session = begun.json["session_id"]
        path, headers = "/api/chat/widget", {"Authorization": f"Bearer {session}"}
        body = {"session_id": session, "message": text, "stream": True}
    else:
        path, headers, body = "/api/chat", AUTHORIZED, chat_body(bot, session, text)
    stop = {"url": f"{served.url}{path}/turns/TURN/stop", "after": 20}
    got = await ai_sdk(served, path, headers=headers, body=body, stop=stop)
    assert got["errors"] == []
    assert got["types"][-2:] == ["text-end", "abort"]
    assert f"You said: {text}".startswith(got["text"])
    assert await served.transcript(bot, session) == [("user", text), ("assistant", got["text"])]


@pytest.mark.parametrize("widget", [False, True])
async def test_the_ai_sdk_resumes_the_running_turn_and_finds_none_afterwards(
    serve: Serve, fake: FakeProvider, widget: bool
) -> None:
    served = await serve_fake(serve, fake)
    bot = await served.add_bot()
    fake.always(SSE_HEAD, says("So "), Pause(3), says("far 🎉"), FINISH)
    if widget:
        begun = await served.post("/api/chat/widget/session", {"chatbot_id": bot.id})
        session = begun.json["session_id"]
        path, headers = "/api/chat/widget", {"Authorization": f"Bearer {session}"}
        resume = f"{served.url}/api/chat/widget/stream"
        body = {"session_id": session, "message": "Hi", "stream": True}
    else:
        session = await served.session(bot)
        path, headers = "/api/chat", AUTHORIZED
        resume = f"{served.url}/api/chat/session/{session}/stream"
        body = chat_body(bot, session, "Hi")
    async with served.http.post(served.url + path, json=body) as first:
        assert b'"So "' in await read_until(first.content, b'"So "')
        # The page is loaded anew: its connection is gone, the turn is not.
        first.close()
    got = await ai_sdk(served, path, headers=headers, resume=resume)
    assert (got["text"], got["errors"]) == ("So far 🎉", [])
    assert got["types"][0] == "start"
    assert got["types"][-1] == "finish"
    got = await ai_sdk(served, path, headers=headers, resume=resume)
    assert got["streamed"] is False


async def read_until(content: Any, part: bytes) -> bytes:
    """What comes, up to where `part` was seen."""
    got = b""
    async with asyncio.timeout(20):
        while part not in got:
            chunk = await content.readany()
            assert chunk, got
            got += chunk
    return got


# A connection that is cut


@dataclass
class Stream:
    """What came of a stream over a bare socket, up to where it was cut."""

    raw: bytes = b""

    @cached_property
    def body(self) -> bytes:
        """The chunks, joined; the last one may have come in part."""
        _, _, rest = self.raw.partition(b"\r\n\r\n")
        body = b""
        while b"\r\n" in rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            body += rest[:length]
            rest = rest[length + 2 :]
        return body

    @cached_property
    def events(self) -> list[tuple[int, Any]]:
        """Id and value of each event that came whole."""
        found = re.findall(rb"id: (\d+)\ndata: (.*)\n\n", self.body)
        return [(int(number), json.loads(value)) for number, value in found]

    @property
    def is_whole(self) -> bool:
        return self.body.endswith(b"data: [DONE]\n\n")


async def read_stream(served: Served, request: bytes, limit: int | None = None) -> Stream:
    """Sends a request and reads `limit` bytes of what comes, or all of it, and hangs up."""
    address = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(request)
    stream = Stream()
    async with asyncio.timeout(30):
        while limit is None or len(stream.raw) < limit:
            data = await reader.read(65536 if limit is None else limit - len(stream.raw))
            if not data:
                break
            stream.raw += data
    writer.transport.abort()
    return stream


def a_post(body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /api/chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def events_of(turn: str, after: int | None = None) -> bytes:
    """Asks for a turn's events after the one that is known."""
    known = "" if after is None else f"Last-Event-ID: {after}\r\n"
    return (
        f"GET /api/chat/turns/{turn}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: Bearer {KEY}\r\n{known}\r\n"
    ).encode()


def text_of(events: list[tuple[int, Any]]) -> str:
    return "".join(value["delta"] for _, value in events if value["type"] == "text-delta")


def assert_goes_on(before: Stream, after: Stream, text: str) -> None:
    """Two parts of a stream make a whole one: every event once, in order, to the end."""
    assert after.is_whole
    events = before.events + after.events
    numbers = [number for number, _ in events]
    assert numbers == sorted(set(numbers))
    assert text_of(events) == text
    types = [value["type"] for _, value in events]
    assert types[:2] == ["start", "text-start"]
    assert types[-2:] == ["text-end", "finish"]
    assert set(types[2:-2]) == {"text-delta"}
    assert types.count("text-start") == 1


def last_id(stream: Stream) -> int | None:
    return stream.events[-1][0] if stream.events else None


async def test_a_stream_that_is_cut_after_any_byte_goes_on_where_it_was_cut(serve: Serve) -> None:
    served = await serve(SLOW_CONFIG.replace("WORD", "0.001"))
    bot = await served.add_bot()
    session = await served.session(bot)
    whole = await read_stream(served, a_post(chat_body(bot, session, WORDS)))
    text = f"You said: {WORDS}"
    assert_goes_on(Stream(), whole, text)
    assert len(whole.events) > 25
    turn = whole.events[0][1]["messageId"]
    # Of the ended turn, event by event as it came while it ran.
    gate = asyncio.Semaphore(20)
    resumed: dict[int | None, Stream] = {}

    async def cut(position: int) -> None:
        before = Stream(whole.raw[:position])
        known = last_id(before)
        if known not in resumed:
            async with gate:
                resumed[known] = await read_stream(served, events_of(turn, known))
        assert_goes_on(before, resumed[known], text)

    await asyncio.gather(*(cut(position) for position in range(len(whole.raw) + 1)))
    assert len(resumed) == len(whole.events) + 1


async def test_a_connection_that_is_cut_after_any_byte_of_an_ended_turn_is_resumed(
    served: Served,
) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    said = WORDS[:40]
    first = await read_stream(served, a_post(chat_body(bot, session, said)))
    turn = first.events[0][1]["messageId"]
    whole = await read_stream(served, events_of(turn))
    assert_goes_on(Stream(), whole, f"You said: {said}")
    gate = asyncio.Semaphore(20)

    async def cut(position: int) -> None:
        async with gate:
            before = await read_stream(served, events_of(turn), position)
            assert len(before.raw) == position
            after = await read_stream(served, events_of(turn, last_id(before)))
        assert_goes_on(before, after, f"You said: {said}")

    await asyncio.gather(*(cut(position) for position in range(len(whole.raw))))


async def test_a_connection_that_is_cut_while_the_turn_runs_is_resumed(serve: Serve) -> None:
    served = await serve(SLOW_CONFIG.replace("WORD", "0.02"))
    bot = await served.add_bot()
    text = f"You said: {WORDS}"

    async def cut(position: int) -> None:
        session = await served.session(bot)
        before = await read_stream(served, a_post(chat_body(bot, session, WORDS)), position)
        if before.events:
            turn = before.events[0][1]["messageId"]
            after = await read_stream(served, events_of(turn, last_id(before)))
        else:
            # Nothing is known but the session: the turn that runs in it is asked for.
            path = f"GET /api/chat/session/{session}/stream HTTP/1.1\r\n"
            head = f"{path}Host: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n\r\n"
            after = await read_stream(served, head.encode())
        assert_goes_on(before, after, text)
        assert await served.transcript(bot, session) == [("user", WORDS), ("assistant", text)]

    for start in range(300, 3000, 750):
        await asyncio.gather(*(cut(position) for position in range(start, start + 750, 25)))


# Readers that are too slow


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(streaming, "SLOW_READER_SECONDS", 1.0)


@pytest.fixture
def server_streams(monkeypatch: pytest.MonkeyPatch) -> list[IOStream]:
    """The streams of the server's connections that answer with events, in their order."""
    streams: list[IOStream] = []
    bound = streaming.TurnHandler._bound_buffer

    def noting(handler: streaming.TurnHandler) -> None:
        bound(handler)
        connection: Any = handler.request.connection
        streams.append(connection.stream)

    monkeypatch.setattr(streaming.TurnHandler, "_bound_buffer", noting)
    return streams


@pytest.mark.alone
@pytest.mark.usefixtures("short_patience")
async def test_who_does_not_read_costs_little_and_is_dropped_and_the_turn_goes_on(
    serve: Serve, fake: FakeProvider, server_streams: list[IOStream]
) -> None:
    piece = '"é🎉\n' * 2048
    fake.always(SSE_HEAD, Flood(says(piece), times=400, pause=0.001), FINISH)
    served = await serve_fake(serve, fake)
    bot = await served.add_bot()
    session = await served.session(bot)
    address = urlsplit(served.url)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((address.hostname, address.port))
        lazy.sendall(a_post(chat_body(bot, session, "Hi")))
        await fake.received()
        ours = await server_stream(server_streams)
        held = 0
        other = asyncio.create_task(
            read_stream(
                served,
                f"GET /api/chat/session/{session}/stream HTTP/1.1\r\nHost: x\r\n"
                f"Connection: close\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode(),
            )
        )
        async with asyncio.timeout(30):
            while not ours.closed():
                system = ours.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                held = max(held, len(ours._write_buffer) + system)
                await asyncio.sleep(0.01)
        assert 0 < held < 256 * 1024
        got = await other
    assert got.is_whole
    assert text_of(got.events) == piece * 400
    turn = got.events[0][1]["messageId"]
    record = await served.runtime.services.storage.get_turn(turn, bot.id)
    assert record is not None
    assert (record.status, record.reply) == (TurnStatus.COMPLETED, piece * 400)


async def server_stream(streams: list[IOStream]) -> IOStream:
    """The first of them, once it is there."""
    async with asyncio.timeout(10):
        while not streams:
            await asyncio.sleep(0.01)
    return streams[0]


@pytest.mark.alone
@pytest.mark.usefixtures("short_patience")
async def test_who_reads_slowly_but_reads_gets_it_all(serve: Serve, fake: FakeProvider) -> None:
    piece = "x" * 50_000
    fake.always(SSE_HEAD, says(*([piece] * 20)), FINISH)
    served = await serve_fake(serve, fake)
    bot = await served.add_bot()
    session = await served.session(bot)
    address = urlsplit(served.url)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((address.hostname, address.port))
        slow.setblocking(False)
        slow.sendall(a_post(chat_body(bot, session, "Hi")))
        stream = Stream()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            while data := await loop.sock_recv(slow, 16384):
                stream.raw += data
                await asyncio.sleep(0.01)
    assert stream.is_whole
    assert text_of(stream.events) == piece * 20


# Silence and haste


@pytest.mark.usefixtures("short_patience")
async def test_a_stream_begins_before_the_provider_says_anything_and_shows_that_it_lives(
    serve: Serve, fake: FakeProvider
) -> None:
    fake.always(SSE_HEAD, Hold())
    served = await serve_fake(serve, fake)
    bot = await served.add_bot()
    session = await served.session(bot)
    body = chat_body(bot, session, "Hi")
    async with served.http.post(f"{served.url}/api/chat", json=body) as response:
        assert response.status == 200
        assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Cache-Control"] == "no-store"
        assert "Content-Encoding" not in response.headers
        got = await read_until(response.content, b'"type":"start"')
        assert got.startswith(b":\n\n")
        async with asyncio.timeout(20):
            while got.count(b"\n:\n\n") < 3:
                got += await response.content.readany()
        assert got.count(b"data:") == 1
        turn = json.loads(got.split(b"data: ")[1].split(b"\n")[0])["messageId"]
        stopped = await served.post(f"/api/chat/turns/{turn}/stop", headers=AUTHORIZED)
        assert stopped.json["status"] == "stopped"
        rest = await response.content.read()
    assert b'"type":"abort"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_what_the_provider_sends_at_once_goes_out_as_one_event(
    serve: Serve, fake: FakeProvider
) -> None:
    first, second = [f"a{n} " for n in range(50)], [f"b{n} " for n in range(50)]
    fake.always(SSE_HEAD, says(*first), Pause(0.5), says(*second) + FINISH)
    served = await serve_fake(serve, fake)
    bot = await served.add_bot()
    got = await read_stream(served, a_post(chat_body(bot, await served.session(bot), "Hi")))
    deltas = [value["delta"] for _, value in got.events if value["type"] == "text-delta"]
    assert deltas == ["".join(first), "".join(second)]
