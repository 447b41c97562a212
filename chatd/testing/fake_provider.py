"""A provider's server that does as it is told: over a real socket, byte by byte.

It knows no wire format. A test gives it one script for each request, a list of what to send and
what to do to the connection, and reads afterwards what was asked and how the client hung up::

    async with FakeProvider() as fake:
        fake.answer(http_response(429, b"slow down", {"Retry-After": "7"}))
        fake.answer(SSE_HEAD, sse({"text": "Hel"}), Pause(0.1), Reset())
        ...
        assert fake.requests[0].json["stream"] is True
        await fake.requests[1].closed_within(5)

A connection is closed when its script is at its end, unless that ends in `KeepAlive()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Connection: close\r\n\r\n"
)
"""The head of an event stream that goes on until the connection is closed."""

HEAD_LIMIT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Pause:
    """Sends nothing for a while."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Flood:
    """Sends the same bytes over and over, as fast as they are taken, until the client hangs up.

    `times` bounds it; `pause` is waited after each.
    """

    data: bytes
    times: int | None = None
    pause: float = 0


@dataclass(frozen=True, slots=True)
class Hold:
    """Sends nothing and keeps the connection open until the client hangs up."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Breaks the connection with a TCP reset. What was sent just before may be lost with it."""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Last in a script: the next request is read from the same connection."""


Step = bytes | Pause | Flood | Hold | Reset | KeepAlive
"""What a script is made of; bytes are sent as they are."""


@dataclass(slots=True)
class Received:
    """One request as it came. `headers` has names in lower case.

    `connection` counts connections from 0, so that requests over the same one can be told.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int
    sent: int = 0
    """How many bytes were handed to the socket for this request."""
    _closed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def closed(self) -> bool:
        """Whether the connection is over: the script's end or the client has closed it."""
        return self._closed.is_set()

    async def closed_within(self, seconds: float) -> None:
        """Returns once the connection is over; raises `TimeoutError` when it goes on.

        After a `Hold` or an endless `Flood` it is the client that hung up.
        """
        async with asyncio.timeout(seconds):
            await self._closed.wait()


class FakeProvider:
    """Listens on a free port of 127.0.0.1 between `start` and `stop`, or in an `async with`.

    A request for which there is no script is answered with status 500 and listed in
    `unexpected`, so that a test can hold that there was none.
    """

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.unexpected: list[Received] = []
        self.connections = 0
        self._scripts: deque[Sequence[Step]] = deque()
        self._always: Sequence[Step] | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived = asyncio.Condition()
        self.port = 0

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, *steps: Step) -> None:
        """Adds the script for the next request that has none."""
        self._scripts.append(steps)

    def always(self, *steps: Step) -> None:
        """Sets the script for all requests for which `answer` gave none."""
        self._always = steps

    async def received(self, count: int = 1, seconds: float = 10) -> Received:
        """Waits for the request number `count` and returns it."""
        async with asyncio.timeout(seconds), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    async def start(self) -> None:
        """Listens."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=HEAD_LIMIT)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Closes everything."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.connections = self.connections, self.connections + 1
        task = asyncio.create_task(self._serve(reader, writer, number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        first = b""
        try:
            while request := await _read_request(reader, first, number):
                script = self._script(request)
                async with self._arrived:
                    self.requests.append(request)
                    self._arrived.notify_all()
                # A client that hangs up is seen as the end of what it sends.
                watch = asyncio.create_task(_watch(reader, request))
                try:
                    again = await _play(script, writer, request)
                except ConnectionError:
                    again = False
                finally:
                    watch.cancel()
                    await asyncio.wait([watch])
                if not again:
                    request._closed.set()
                    return
                first = b"" if watch.cancelled() else watch.result()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _script(self, request: Received) -> Sequence[Step]:
        if self._scripts:
            return self._scripts.popleft()
        if self._always is not None:
            return self._always
        self.unexpected.append(request)
        return (http_response(500, b"the test has no script for this request"),)


async def _read_request(
    reader: asyncio.StreamReader, first: bytes, connection: int
) -> Received | None:
    """The next request, or `None` when the client hangs up instead."""
    try:
        head = first + await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    request_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, path, _ = request_line.split(" ", 2)
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body, connection)


async def _watch(reader: asyncio.StreamReader, request: Received) -> bytes:
    """Waits for the client to hang up, or for the first byte of its next request."""
    try:
        byte = await reader.read(1)
    except ConnectionError:
        byte = b""
    if not byte:
        request._closed.set()
    return byte


async def _play(script: Sequence[Step], writer: asyncio.StreamWriter, request: Received) -> bool:
    """Does what a script says; returns whether the connection is to be used again."""
    for step in script:
        match step:
            case bytes():
                await _send(step, writer, request)
            case Pause(seconds):
                with contextlib.suppress(TimeoutError):
                    await request.closed_within(seconds)
            case Flood(data, times, pause):
                done = 0
                while done != times and not request.closed:
                    await _send(data, writer, request)
                    await asyncio.sleep(pause)
                    done += 1
            case Hold():
                await request._closed.wait()
            case Reset():
                _reset(writer)
                return False
            case KeepAlive():
                return True
    return False


async def _send(data: bytes, writer: asyncio.StreamWriter, request: Received) -> None:
    writer.write(data)
    request.sent += len(data)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    # To linger for no time means to close with a reset.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def http_response(
    status: int,
    body: bytes | str | Mapping[str, Any] = b"",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A whole response after which the connection is closed. A mapping is sent as JSON.

    `headers` are added to Content-Type, Content-Length and Connection, or replace them.
    """
    content_type = "text/plain; charset=utf-8"
    if isinstance(body, Mapping):
        body, content_type = json.dumps(body), "application/json"
    content = body.encode() if isinstance(body, str) else body
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = {
        "Content-Type": content_type,
        "Content-Length": str(len(content)),
        "Connection": "close",
        **(headers or {}),
    }
    head = f"HTTP/1.1 {status} {phrase}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    return head.encode("latin-1") + b"\r\n" + content


def sse(*events: Mapping[str, Any] | str) -> bytes:
    """Server-sent events, one for each argument; a mapping is sent as JSON."""
    texts = (e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in events)
    return "".join(f"data: {text}\n\n" for text in texts).encode()
