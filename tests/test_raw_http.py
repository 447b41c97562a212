"""Bytes that no client library would send, over a bare socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import pytest
from tornado.web import RequestHandler

from chatd.handlers.base import ApiHandler
from tests.support import Served

HOST = b"Host: x\r\n"


async def exchange(served: Served, request: bytes, *, closes: bool = False) -> bytes:
    """What comes back for `request`: all of it when the server `closes`, else the first part."""
    address = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(request)
    try:
        async with asyncio.timeout(20):
            return await reader.read(-1 if closes else 65536)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        (b"GET /%ff%fe HTTP/1.1", b"", 404),
        (b"GET /docs/assets/..%2f..%2f__init__.py HTTP/1.1", b"", 404),
        (b"GET /docs/assets/../../setup.py HTTP/1.1", b"", 404),
        (b"GET /docs/assets/%ff HTTP/1.1", b"", 400),
        (b"GET http://other.example/nothing HTTP/1.1", b"", 404),
        (b"OPTIONS * HTTP/1.1", b"", 404),
        (b"CONNECT /api/chat HTTP/1.1", b"", 405),
        (b"TRACE /api/chat HTTP/1.1", b"", 405),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1", b"", 404),
        (b"POST /api/chat HTTP/1.1", b"X-API-Key: \xe9\r\nContent-Length: 2\r\n\r\n{}", 422),
        (
            b"POST /api/chat HTTP/1.1",
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 2\r\n\r\n{}",
            415,
        ),
        (
            b"POST /api/chat HTTP/1.1",
            b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 4\r\n\r\na=%f",
            415,
        ),
    ],
)
async def test_odd_requests_are_answered_with_a_problem(
    served: Served, request_line: bytes, headers: bytes, status: int
) -> None:
    end = b"" if b"\r\n\r\n" in headers else b"\r\n"
    answer = await exchange(served, request_line + b"\r\n" + HOST + headers + end)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"Content-Type: application/problem+json\r\n" in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_a_400_and_the_end_of_the_connection(
    served: Served, request_bytes: bytes
) -> None:
    answer = await exchange(served, request_bytes, closes=True)
    assert answer.startswith(b"HTTP/1.1 400 ")


async def test_a_length_that_is_no_number_is_not_taken_for_one(served: Served) -> None:
    request = b"POST /api/chat HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\n"
    answer = await exchange(served, request + b"Content-Length: \xb2\r\n\r\n", closes=True)
    assert b"HTTP/1.1 400 " in answer
    assert b" 500 " not in answer


@pytest.mark.parametrize("size", [2_000_000, 20_000_000])
async def test_a_body_far_over_the_limit_is_refused_and_the_refusal_can_be_read(
    served: Served, size: int
) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    address = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head % size)
    sending = asyncio.create_task(_send(writer, size))
    answer = await reader.read()
    await sending
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in answer


async def _send(writer: asyncio.StreamWriter, size: int) -> None:
    try:
        for _ in range(0, size, 100_000):
            writer.write(b" " * 100_000)
            await writer.drain()
    except ConnectionError:
        pass


async def test_who_asks_before_sending_too_much_is_told_before(served: Served) -> None:
    answer = await exchange(
        served,
        b"POST /api/chat HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        b"Content-Length: 70000\r\n\r\n",
        closes=True,
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close\r\n" in answer
    assert b"100" not in answer.splitlines()[0]


async def test_many_requests_go_over_one_connection_errors_among_them(served: Served) -> None:
    address = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    for path, status in [(b"/health", 200), (b"/nothing", 404), (b"/api/chat", 405)] * 3:
        writer.write(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
    writer.close()


def test_a_handler_is_cleared_as_tornado_clears_it() -> None:
    """`ApiHandler.clear` is in the place of Tornado's, whose next version may set more."""

    class Cleared(ApiHandler):
        def initialize(self, **arguments: Any) -> None:
            """Nothing that is not Tornado's."""

    def state(clear: Callable[[ApiHandler], None]) -> dict[str, Any]:
        handler = Cleared.__new__(Cleared)
        clear(handler)
        return {name: value for name, value in vars(handler).items() if name != "_headers"}

    assert state(ApiHandler.clear) == state(RequestHandler.clear)
    handler = Cleared.__new__(Cleared)
    handler.clear()
    date = parsedate_to_datetime(handler._headers["Date"])
    assert abs((date - datetime.now(UTC)).total_seconds()) < 60


@pytest.mark.parametrize("type", [b"application/json", b"application/json; charset=utf-8"])
@pytest.mark.parametrize(("size", "status"), [(0, 422), (50_000, 422), (2_000_000, 413)])
async def test_a_body_reads_the_same_whole_and_in_pieces(
    served: Served, type: bytes, size: int, status: int
) -> None:
    body = b'{"assistant_id": "' + b"x" * size + b'"}'
    head = b"POST /api/chat/session HTTP/1.1\r\n" + HOST + b"Content-Type: " + type + b"\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    answers = [await exchange(served, request) for request in (whole, chunked)]
    assert {int(answer.split()[1]) for answer in answers} == {status}, answers
    problems = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    for problem in problems:
        del problem["request_id"]
    assert problems[0] == problems[1]


async def test_an_answer_says_when_its_connection_ends(served: Served) -> None:
    request = b"GET /health HTTP/1.1\r\n" + HOST
    kept = await exchange(served, request + b"\r\n")
    closed = await exchange(served, request + b"Connection: close\r\n\r\n", closes=True)
    assert kept.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nConnection:" not in kept
    assert b"\r\nConnection: close\r\n" in closed
    names = [line.split(b":")[0] for line in kept.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]]
    # The same headers, whoever put them together.
    assert {*names, b"Connection"} == {
        line.split(b":")[0] for line in closed.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    }


async def test_an_answer_larger_than_the_system_takes_at_once_comes_whole(served: Served) -> None:
    """And what is asked for after it comes after it."""
    asset = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\n" + HOST + b"\r\n"
    health = b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    found = await exchange(served, asset * 2 + health, closes=True)
    first = found.partition(b"\r\n\r\n")
    length = int(first[0].lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert length > 1_000_000
    once, rest = first[2][:length], first[2][length:]
    second = rest.partition(b"\r\n\r\n")
    assert second[2][:length] == once
    assert second[2][length:].startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("path", "framing", "body"),
    [
        (b"GET /health", b"Content-Length: x\r\n", b""),
        (b"POST /api/chat", b"Content-Length: 5, 6\r\n", b""),
        (b"POST /api/chat", b"Transfer-Encoding: gzip\r\n", b""),
        (b"POST /api/chat", b"Content-Type: text/plain\r\nContent-Length: 100\r\n", b"{"),
        (b"POST /api/chat", b"Transfer-Encoding: chunked\r\n", b"5\r\n{"),
    ],
)
async def test_a_request_that_does_not_come_to_its_end_leaves_nothing_and_is_the_clients_fault(
    served: Served, path: bytes, framing: bytes, body: bytes
) -> None:
    requests = served.runtime.services.metrics.requests.values
    before = dict(requests)
    address = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(path + b" HTTP/1.1\r\n" + HOST + framing + b"\r\n" + body)
    writer.write_eof()
    async with asyncio.timeout(20):
        assert (await reader.read())[:13] in (b"", b"HTTP/1.1 400 ")
        writer.close()
        while requests == before or any("_execute" in repr(task) for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)
    method, route = path.decode().split()
    counted = {labels for labels, count in requests.items() if count > before.get(labels, 0)}
    assert counted == {(route, method, "400")}
