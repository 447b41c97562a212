"""Clients that are slow, greedy or lie about where they are, over bare sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from tornado.netutil import bind_sockets

from chatd.connections import ClientServer, ClientStream
from tests.conftest import Serve
from tests.support import KEY, Served

CONFIG = """
server: {header_timeout: %s, body_timeout: %s, keep_alive_seconds: %s, unread_seconds: %s, %s}
storage: %%(storage)s
providers: {main: {use: echo, word_seconds: %s}}
models: [{match: "*", ask: [main]}]
limits: {sessions_per_ip: 1/minute}
"""
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def config(
    *,
    headers: float = 20,
    body: float = 20,
    idle: float = 20,
    unread: float = 60,
    more: str = "",
    word: float = 0,
) -> str:
    """A configuration with these limits, in seconds."""
    return CONFIG % (headers, body, idle, unread, more, word)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(served: Served, source: str = "127.0.0.1") -> AsyncIterator[Streams]:
    """A connection from one of this machine's own addresses."""
    address = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(
        address.hostname, address.port, local_addr=(source, 0)
    )
    try:
        yield reader, writer
    finally:
        writer.close()


async def trickle(writer: asyncio.StreamWriter, pieces: bytes = b"x" * 1000) -> None:
    """Sends a byte at a time, for as long as somebody takes it."""
    try:
        for i in range(len(pieces)):
            writer.write(pieces[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0.1)
    except ConnectionError:
        pass


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What is read until the server closes the connection."""
    found = b""
    async with asyncio.timeout(10):
        try:
            while piece := await reader.read(65536):
                found += piece
        except ConnectionError:
            pass
    return found


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The next answer: its status and body."""
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        return int(head.split()[1]), await reader.readexactly(length)


@pytest.mark.parametrize("sent", [b"", b"GET /he"])
async def test_headers_that_never_end_are_dropped(serve: Serve, sent: bytes) -> None:
    served = await serve(config(headers=0.5))
    async with connected(served) as (reader, writer):
        writer.write(sent)
        assert await ends(reader) == b""


async def test_headers_that_trickle_are_dropped_however_often_a_byte_comes(serve: Serve) -> None:
    served = await serve(config(headers=0.5))
    async with connected(served) as (reader, writer):
        writer.write(HEALTH + b"X-A: ")
        trickling = asyncio.create_task(trickle(writer))
        assert await ends(reader) == b""
        trickling.cancel()


async def test_a_second_request_has_no_more_time_for_its_headers_than_the_first(
    serve: Serve,
) -> None:
    served = await serve(config(headers=0.5, idle=30))
    async with connected(served) as (reader, writer):
        writer.write(HEALTH + b"\r\n")
        assert (await answer(reader))[0] == 200
        # A pause between two requests is another matter.
        await asyncio.sleep(2)
        writer.write(HEALTH + b"\r\n")
        assert (await answer(reader))[0] == 200
        writer.write(HEALTH + b"X-A: ")
        trickling = asyncio.create_task(trickle(writer))
        assert await ends(reader) == b""
        trickling.cancel()


async def test_a_connection_without_a_next_request_is_closed_in_the_end(serve: Serve) -> None:
    served = await serve(config(idle=0.5))
    async with connected(served) as (reader, writer):
        writer.write(HEALTH + b"\r\n")
        assert (await answer(reader))[0] == 200
        assert await ends(reader) == b""


@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
async def test_a_body_that_trickles_is_dropped(serve: Serve, framing: bytes) -> None:
    served = await serve(config(body=0.5))
    async with connected(served) as (reader, writer):
        writer.write(b"POST /api/chat HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        trickling = asyncio.create_task(trickle(writer, b"1\r\nx\r\n" * 100))
        assert await ends(reader) == b""
        trickling.cancel()


async def test_an_answer_that_nobody_reads_does_not_wait_for_ever(serve: Serve) -> None:
    served = await serve(config(unread=0.5))
    asset = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    whole = len((await served.get("/docs/assets/swagger-ui-bundle.js")).body)
    async with connected(served) as (reader, writer):
        writer.write(asset * 20)
        await asyncio.sleep(3)
        assert len(await ends(reader)) < 20 * whole


async def test_an_answer_that_takes_long_is_not_dropped(serve: Serve) -> None:
    served = await serve(config(headers=0.5, body=0.5, idle=0.5, unread=0.5, word=0.3))
    bot = await served.add_bot()
    said = await served.chat(bot, await served.session(bot), "one two three four five six")
    assert said.status == 200


async def test_what_is_sent_while_a_request_is_answered_waits_outside(serve: Serve) -> None:
    """Requests that come ahead of their turn are answered in order, and not read into memory."""
    served = await serve(config(word=0.5))
    bot = await served.add_bot()
    body = {"assistant_id": bot.id, "api_key": KEY, "session_id": await served.session(bot)}
    said = [{"role": "user", "content": "one two"}]
    content = json.dumps({**body, "type": "m", "messages": said}).encode()
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    turn = head + f"Content-Length: {len(content)}\r\n\r\n".encode() + content
    address = urlsplit(served.url)
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        # So that no more than a little is on its way.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        client.setblocking(False)
        await loop.sock_connect(client, (address.hostname, address.port))
        await loop.sock_sendall(client, turn)
        await asyncio.sleep(0.2)
        flood = asyncio.create_task(loop.sock_sendall(client, (HEALTH + b"\r\n") * 1_000_000))
        found = b""
        async with asyncio.timeout(20):
            while found.count(b"HTTP/1.1 200") < 3:
                found += await loop.sock_recv(client, 65536)
                assert not flood.done(), "40 MB were taken before the first answer"
        assert found.index(b"You said: one two") < found.index(b'"status"')
        flood.cancel()


async def test_nothing_is_left_of_a_connection_that_was_closed(serve: Serve) -> None:
    served = await serve(config())
    gc.collect()
    before = streams_alive()
    gc.disable()
    try:
        for _ in range(20):
            async with connected(served) as (reader, writer):
                writer.write(HEALTH + b"Connection: close\r\n\r\n")
                await ends(reader)
        await asyncio.sleep(0.1)
        assert streams_alive() <= before + 1
    finally:
        gc.enable()


def streams_alive() -> int:
    """How many connections of clients are in memory, open or not."""
    return sum(isinstance(each, ClientStream) for each in gc.get_objects())


async def test_a_connection_that_waits_when_the_server_stops_is_answered(serve: Serve) -> None:
    runtime = (await serve(config())).runtime
    server = ClientServer(runtime.application, runtime.services.config)
    (listening,) = bind_sockets(0, "127.0.0.1")
    server.add_sockets([listening])
    # The system takes it by itself; the event loop has had no chance to.
    with socket.create_connection(listening.getsockname()) as client:
        server.stop()
        client.sendall(HEALTH + b"\r\n")
        client.setblocking(False)
        async with asyncio.timeout(5):
            found = await asyncio.get_running_loop().sock_recv(client, 65536)
        assert found.startswith(b"HTTP/1.1 200 ")
    await server.close_all_connections()


async def test_one_address_has_so_many_connections_and_others_have_theirs(serve: Serve) -> None:
    served = await serve(config(more="max_connections_per_address: 2"))
    async with connected(served) as (first, hangs_up), connected(served) as (second, _):
        for _ in range(2):
            async with connected(served) as (third, writer):
                writer.write(HEALTH + b"\r\n")
                status, body = await answer(third)
                problem = json.loads(body)
                assert (status, problem["status"], problem["code"]) == (429, 429, "rate_limited")
                assert "At most 2 connections" in problem["detail"] and problem["request_id"]
                assert await ends(third) == b""
        async with connected(served, "127.0.0.2") as (reader, writer):
            writer.write(HEALTH + b"\r\n")
            assert (await answer(reader))[0] == 200
        hangs_up.close()
        await ends(first)
        await asyncio.sleep(0.1)
        async with connected(served) as (reader, writer):
            writer.write(HEALTH + b"\r\n")
            assert (await answer(reader))[0] == 200
        assert not second.at_eof()


async def test_the_server_has_so_many_connections(serve: Serve) -> None:
    served = await serve(config(more="max_connections: 2"))
    async with (
        connected(served),
        connected(served, "127.0.0.2"),
        connected(served, "127.0.0.3") as (reader, writer),
    ):
        writer.write(HEALTH + b"\r\n")
        status, body = await answer(reader)
        assert (status, json.loads(body)["code"]) == (503, "overloaded")


async def test_behind_a_proxy_the_requests_of_each_client_are_counted(serve: Serve) -> None:
    more = "trusted_proxies: 1, max_connections_per_address: 1, allowed_origins: ['https://a.b']"
    served = await serve(config(more=more, word=0.2))
    bot = await served.add_bot()
    session = await served.session(bot)
    mine = {"X-Forwarded-For": "spoofed, 192.0.2.1"}
    body = {"api_key": "test-key-0123456789abcdef", "assistant_id": bot.id, "type": "m"}
    body |= {"session_id": session, "messages": [{"role": "user", "content": "a b c d e"}]}
    running = asyncio.create_task(served.post("/api/chat", body, headers=mine))
    await asyncio.sleep(0.5)
    origin = {"Origin": "https://a.b"}
    refused = await served.get("/health", headers={**mine, **origin})
    assert (refused.status, refused.json["code"]) == (429, "rate_limited")
    assert refused.headers["Access-Control-Allow-Origin"] == "https://a.b"
    other = {"X-Forwarded-For": "192.0.2.1, 192.0.2.2"}
    assert (await served.get("/health", headers=other)).status == 200
    assert (await running).status == 200
    assert (await served.get("/health", headers=mine)).status == 200


# What is too much


@pytest.mark.parametrize(
    ("head", "body", "status", "code"),
    [
        (b"X: 1\r\n" * 5000, b"", 431, "headers_too_large"),
        (b"X: " + b"a" * 17_000 + b"\r\n", b"", 431, "headers_too_large"),
        (b"Content-Length: 65537\r\n", b" " * 65537, 413, "body_too_large"),
        (
            b"Transfer-Encoding: chunked\r\n",
            b"8000\r\n" + b" " * 32768 + b"\r\n8001\r\n" + b" " * 32769 + b"\r\n0\r\n\r\n",
            413,
            "body_too_large",
        ),
        (
            b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 70\r\n",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n'.ljust(70),
            415,
            "unsupported_media_type",
        ),
    ],
)
async def test_too_much_is_refused_with_a_problem(
    served: Served, head: bytes, body: bytes, status: int, code: str
) -> None:
    async with connected(served) as (reader, writer):
        writer.write(b"POST /api/chat HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n" + body)
        told, problem = await answer(reader)
        assert (told, json.loads(problem)["code"]) == (status, code)


async def test_who_asks_whether_to_send_a_body_that_is_small_enough_is_told_to(
    served: Served,
) -> None:
    async with connected(served) as (reader, writer):
        head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        writer.write(head + b"Content-Length: 2\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(b"{}")
        assert (await answer(reader))[0] == 422


# Where a client is


@pytest.mark.parametrize(
    ("trusted", "first", "second", "status"),
    [
        # No proxy is trusted: nothing that a client says counts.
        (0, b"X-Real-Ip: 192.0.2.1", b"X-Real-Ip: 192.0.2.2", 429),
        (0, b"X-Scheme: https", b"X-Forwarded-Proto: https", 429),
        (0, b"X-Forwarded-For: 192.0.2.1", b"Forwarded: for=192.0.2.2", 429),
        # One is: its address counts, and still no other header.
        (1, b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-For: 192.0.2.2", 200),
        (
            1,
            b"X-Forwarded-For: 192.0.2.1\r\nX-Real-Ip: 192.0.2.8",
            b"X-Forwarded-For: 192.0.2.1\r\nX-Real-Ip: 192.0.2.9",
            429,
        ),
        # Headers that stand several times are one list.
        (
            1,
            b"X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-For: 192.0.2.1",
            b"X-Forwarded-For: 192.0.2.8\r\nX-Forwarded-For: 192.0.2.1",
            429,
        ),
        (
            2,
            b"X-Forwarded-For: 192.0.2.7, 192.0.2.1\r\nX-Forwarded-For: 10.0.0.1",
            b"X-Forwarded-For: 192.0.2.8, 192.0.2.1\r\nX-Forwarded-For: 10.0.0.2",
            429,
        ),
        # Ports are not addresses; what is no address is the proxy's own.
        (1, b"X-Forwarded-For: [2001:db8::1]:1", b"X-Forwarded-For: [2001:db8::2]:2", 429),
        (1, b"X-Forwarded-For: 192.0.2.1:1", b"X-Forwarded-For: 192.0.2.1:2", 429),
        (1, b"X-Forwarded-For: 192.0.2.1, \xff", b"X-Forwarded-For: 192.0.2.2, ()", 429),
    ],
)
async def test_a_client_is_counted_where_trusted_proxies_say_it_is(
    serve: Serve, trusted: int, first: bytes, second: bytes, status: int
) -> None:
    served = await serve(config(more=f"trusted_proxies: {trusted}"))
    bot = await served.add_bot()
    body = json.dumps({"chatbot_id": bot.id}).encode()
    head = b"POST /api/chat/widget/session HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
    told = []
    async with connected(served) as (reader, writer):
        for claim in (first, second):
            writer.write(head % len(body) + claim + b"\r\n\r\n" + body)
            told.append((await answer(reader))[0])
    assert told == [200, status]
