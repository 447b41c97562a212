"""Connections of clients: how many there may be, and how slow they may be."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from socket import SHUT_WR, socket
from typing import Any, cast

import orjson
from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    ParseBodyConfig,
    ParseMultipartConfig,
    RequestStartLine,
    ResponseStartLine,
    set_parse_body_config,
)
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.iostream import IOStream
from tornado.netutil import add_accept_handler
from tornado.web import Application

from chatd.config import ServerConfig
from chatd.errors import RateLimited, RequestError
from chatd.handlers.problems import TooManyConnections, problem_body, problem_of, retry_after
from chatd.headers import usual
from chatd.limits import counted_address

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 1024 * 1024
"""What Tornado reads of headers before it hangs up; handlers refuse far less, in words."""

SWEEP_SECONDS = 1.0
"""How often connections are looked at; they are closed so much later at most."""

SPARE_FILES = 128
"""Open files that are left for storage, providers and logs."""

MOST_WAITING = 128
"""Connections that the system takes before they are asked for (Tornado's `bind_sockets`)."""

TELL_SECONDS = 60.0
"""How often the log says at most that clients are turned away."""


class _Listening:
    """The event loop, as a stream uses it, which goes on listening while a request is answered.

    Tornado stops to listen to a client as soon as its request has come, and begins again when it
    was read: eight calls of the system for each request. Here it is stopped when something comes
    that is not asked for, which few clients send.
    """

    READ = IOLoop.READ
    WRITE = IOLoop.WRITE
    ERROR = IOLoop.ERROR

    def __init__(self, loop: IOLoop) -> None:
        self._loop = loop
        self._wanted = 0
        self._listens = 0
        self._handler: Callable[[Any, int], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_handler(self, fd: int, handler: Callable[[Any, int], None], events: int) -> None:
        """As the loop's."""
        self._handler = handler
        self._wanted = self._listens = events
        self._loop.add_handler(fd, self._on_events, events)

    def update_handler(self, fd: int, events: int) -> None:
        """As the loop's; that nothing is to be read any more is not told to the system yet."""
        self._wanted = events
        if events | (self._listens & self.READ) != self._listens:
            self._listens = events
            self._loop.update_handler(fd, events)

    def remove_handler(self, fd: Any) -> None:
        """As the loop's."""
        self._loop.remove_handler(fd)
        # It is the stream's, which would stay until cycles are looked for.
        self._handler = None

    def _on_events(self, fd: Any, events: int) -> None:
        if events & self.READ and not self._wanted & self.READ:
            self._listens = self._wanted
            self._loop.update_handler(fd, self._wanted)
            events &= ~self.READ
        if events and self._handler is not None:
            self._handler(fd, events)


class _Connection(HTTP1Connection):
    """Tornado's, with a shorter way to read the head of the usual request."""

    def _parse_headers(self, data: bytes) -> tuple[str, HTTPHeaders]:
        return usual(data) or super()._parse_headers(data)


class ClientStream(IOStream):
    """A client's connection, which knows until when it has to say or take something.

    :param on_closed: called once, when it is closed by either side.
    """

    def __init__(
        self, connection: socket, address: str, on_closed: Callable[[ClientStream], None]
    ) -> None:
        self.address = address
        self.header_timeout = math.inf
        self.due = math.inf
        """When it is closed unless a request is whole in its headers by then."""
        self.body_due = math.inf
        """When it is closed unless the body of its request is whole by then."""
        self.counted: str | None = None
        """The address that it is counted under."""
        self.is_crowding = False
        """Whether the request on it is one too many of its client's."""
        self.has_served = False
        self.unread_since: float | None = None
        self._on_closed = on_closed
        super().__init__(connection)
        self.io_loop = cast("IOLoop", _Listening(self.io_loop))
        # What is written is whole, and a token waits for nothing.
        super().set_nodelay(True)

    def set_nodelay(self, value: bool) -> None:
        """Changes nothing: Tornado asks the system for it twice for each request."""

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        count = super().read_from_fd(buf)
        if count and self.due < math.inf:
            # From its first byte on, a request has as long as the first one has.
            self.due = min(self.due, time.monotonic() + self.header_timeout)
        return count

    def close_fd(self) -> None:
        super().close_fd()
        self._on_closed(self)


class _Heard(HTTPMessageDelegate):
    """Sees when the headers of a request are there."""

    def __init__(
        self, inner: HTTPMessageDelegate, stream: ClientStream, server: ClientServer
    ) -> None:
        self._inner = inner
        self._stream = stream
        self._server = server

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        self._server.heard(self._stream, headers)
        return self._inner.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._inner.data_received(chunk)

    def finish(self) -> None:
        self._stream.body_due = math.inf
        self._inner.finish()

    def on_connection_close(self) -> None:
        self._inner.on_connection_close()


class ClientServer(HTTPServer):
    """Tornado's server, with limits to how many connections there are and how slow.

    Behind trusted proxies the peer is a proxy: then the requests of each client are counted, by the
    address that the proxies give, and one too many is answered with a 429. Without, connections
    are counted when they come, and closed at once. `apply` may be called again at any time.
    """

    def initialize(self, application: Application, settings: ServerConfig) -> None:  # type: ignore[override]
        # Nothing here takes forms; bodies are JSON.
        set_parse_body_config(ParseBodyConfig(multipart=ParseMultipartConfig(enabled=False)))
        # The limits that count are the handlers', which say so in the answer.
        super().initialize(
            application, xheaders=False, max_body_size=2**62, max_header_size=MAX_HEADER_BYTES
        )
        # Those of Tornado make a task or a timer for each request.
        self.conn_params.header_timeout = self.conn_params.body_timeout = None
        self.on_refused: Callable[[], None] | None = None
        """Called for each connection, and each request of a crowding client, that is turned away."""
        self._accepting: list[tuple[socket, Callable[[], None]]] = []
        self._streams: set[ClientStream] = set()
        self._by_address: Counter[str] = Counter()
        self._told_at = -math.inf
        self._sweeper = PeriodicCallback(self._sweep, SWEEP_SECONDS * 1000)
        self.apply(settings)

    def apply(self, settings: ServerConfig) -> None:
        """Takes on other settings, for all connections from their next request on."""
        self._settings = settings
        self._most = min(settings.max_connections, _room_for_files(settings.max_connections))

    def serve_with(self, application: Application) -> None:
        """Lets another application answer the requests that come from now on."""
        self.request_callback = application

    # Accepting

    def add_sockets(self, sockets: Iterable[socket]) -> None:
        for listening in sockets:
            self._accepting.append((listening, add_accept_handler(listening, self._accepted)))
        self._sweeper.start()

    def stop(self) -> None:
        """Takes no more connections, but those that the system has taken for it already."""
        for listening, remove in self._accepting:
            remove()
            with contextlib.suppress(OSError):
                for _ in range(MOST_WAITING):
                    self._accepted(*listening.accept())
            listening.close()
        self._accepting.clear()

    async def close_all_connections(self) -> None:
        self._sweeper.stop()
        await super().close_all_connections()

    def _accepted(self, connection: socket, address: Any) -> None:
        peer = address[0] if isinstance(address, tuple) else ""
        counted = None if self._settings.trusted_proxies else counted_address(peer, "", 0)
        if len(self._streams) >= self._most:
            self._turn_away(connection, TooManyConnections(retry_after=1))
            return
        if counted is not None and self._is_full(counted):
            self._turn_away(connection, self._too_many())
            return
        stream = ClientStream(connection, peer, self._closed)
        stream.header_timeout = self._settings.header_timeout
        stream.due = time.monotonic() + stream.header_timeout
        self._streams.add(stream)
        self._count(stream, counted)
        self.handle_stream(stream, address)

    def _is_full(self, counted: str) -> bool:
        return self._by_address[counted] >= self._settings.max_connections_per_address

    def _too_many(self) -> RateLimited:
        most = self._settings.max_connections_per_address
        return RateLimited(
            f"At most {most} connections are taken from one address. Close some of them.",
            retry_after=1,
        )

    def _turn_away(self, connection: socket, error: RequestError) -> None:
        """Answers before anything was asked, and hangs up."""
        self._tell(error)
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.send(_refusal(error))
            connection.shutdown(SHUT_WR)
            # What came and was not read would make the system take the answer back.
            connection.recv(65536)
        connection.close()

    def _tell(self, error: RequestError) -> None:
        if self.on_refused is not None:
            self.on_refused()
        now = time.monotonic()
        if now - self._told_at > TELL_SECONDS:
            self._told_at = now
            log.warning("clients are turned away: %s", error.detail)

    def _count(self, stream: ClientStream, counted: str | None) -> None:
        """Counts a connection under another address than until now, or under none."""
        if (before := stream.counted) is not None:
            self._by_address[before] -= 1
            if not self._by_address[before]:
                del self._by_address[before]
        stream.counted = counted
        if counted is not None:
            self._by_address[counted] += 1

    def _closed(self, stream: ClientStream) -> None:
        self._streams.discard(stream)
        self._count(stream, None)

    # Serving

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        stream: ClientStream = request_conn.stream  # type: ignore[attr-defined]
        if stream.has_served:
            stream.header_timeout = self._settings.header_timeout
            stream.due = time.monotonic() + self._settings.keep_alive_seconds
            self._release(stream)
        stream.has_served = True
        # Tornado makes it, and of no other class.
        request_conn.__class__ = _Connection
        return _Heard(super().start_request(server_conn, request_conn), stream, self)

    def _release(self, stream: ClientStream) -> None:
        """The request before was answered; behind proxies, its client's place is free."""
        stream.is_crowding = False
        if self._settings.trusted_proxies:
            self._count(stream, None)

    def heard(self, stream: ClientStream, headers: HTTPHeaders) -> None:
        """The headers of a request on this connection are there."""
        stream.due = math.inf
        stream.body_due = time.monotonic() + self._settings.body_timeout
        if trusted := self._settings.trusted_proxies:
            forwarded = headers.get("X-Forwarded-For", "")
            counted = counted_address(stream.address, forwarded, trusted)
            stream.is_crowding = self._is_full(counted)
            if stream.is_crowding:
                self._tell(self._too_many())
            else:
                self._count(stream, counted)

    def _sweep(self) -> None:
        """Closes connections that are too slow: in asking, or in taking what is answered."""
        now = time.monotonic()
        for stream in list(self._streams):
            if not stream.writing():
                stream.unread_since = None
            elif stream.unread_since is None:
                stream.unread_since = now
            unread = now - (stream.unread_since or now)
            late = now >= min(stream.due, stream.body_due)
            if late or unread > self._settings.unread_seconds:
                stream.close()


def _refusal(error: RequestError) -> bytes:
    """A whole answer, for who was not heard."""
    problem = problem_of(error)
    request_id = uuid.uuid4().hex
    body = orjson.dumps(problem_body(error, request_id))
    head = (
        f"HTTP/1.1 {problem.status} {problem.title}\r\n"
        "Content-Type: application/problem+json\r\n"
        f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id}\r\n"
        f"Retry-After: {retry_after(error) or '1'}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _room_for_files(wanted: int) -> int:
    """How many connections the system lets this process open, after asking it for enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, soft - SPARE_FILES)
