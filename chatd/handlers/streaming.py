"""A reply over HTTP: whole, or as events, written as it comes and no faster than it is read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from typing import Any, Protocol

import orjson
from tornado.iostream import IOStream, StreamClosedError

from chatd.access import WidgetSession
from chatd.domain import Chatbot, TurnStatus, Usage, canonical_id
from chatd.errors import (
    InvalidRequest,
    MalformedRequest,
    NotFound,
    ProviderTimeout,
    SessionRequired,
)
from chatd.handlers.base import EVENT_STREAM, ApiHandler, Parameter, send_now
from chatd.handlers.problems import problem_body
from chatd.reply import Reply, TurnResult
from chatd.turns import Started

HEARTBEAT_SECONDS = 15.0
"""How long a stream is silent before a comment says that it lives; routers give up after 55 s."""

SLOW_READER_SECONDS = 30.0
"""How long a reader may leave one write unread before it is dropped."""

MAX_WRITE_CHARS = 8 * 1024
"""The most of a reply that is written at once: 48 KiB when every character is escaped."""

SEND_BUFFER_BYTES = 64 * 1024
"""What the system may hold for one reader (Linux doubles it): with a write, below 256 KiB."""

RUN_STRIDE = 10**10
"""How far apart the ids of a turn's runs are, more than any reply needs."""

MAX_EVENT_ID = 2**53 - 1
"""JavaScript's largest whole number."""

IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "header",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    "Makes it safe to send the request again: the same key with the same body, in the same session, "
    "joins the running turn or replays its stored result.",
)
USER_TOKEN = Parameter(
    "X-User-Token",
    "header",
    {"type": "string"},
    "Who the visitor is, signed by the server of the site; where the chatbot requires it, and for "
    "a session that was begun with one.",
)
LAST_EVENT_ID = Parameter(
    "Last-Event-ID",
    "header",
    {"type": "string", "pattern": "^[0-9]{0,16}$"},
    "The id of the last event that you have; the stream goes on after it.",
)


class Format(Protocol):
    """A wire format: makes bytes of a reply, as much of it as there is."""

    headers: Mapping[str, str]
    is_done: bool

    def advance(self) -> bytes:
        """What is new since the last call, bounded; empty when nothing is."""


class UIMessageStream:
    """The AI SDK's UI message stream, version 1, as server-sent events with ids.

    The ids of a turn grow: 1 is the start, 2 the text's start, `4n` the delta that ends at
    character `n`, `4n + 1` the text's end and `4n + 3` the last event. So a reader that says
    which it has goes on exactly there, whoever answers it. Another run of the turn begins
    `RUN_STRIDE` later, and a reader of an earlier run from its start.

    :param after: the id of the last event that the reader has; 0 for none.
    :param private: whether the reader may know what the turn cost and who answered.
    :param request_id: what an error names, for the log.
    """

    headers: Mapping[str, str] = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "X-Accel-Buffering": "no",
        "x-vercel-ai-ui-message-stream": "v1",
    }

    def __init__(self, reply: Reply, *, after: int, private: bool, request_id: str) -> None:
        self.is_done = False
        self._reply = reply
        self._private = private
        self._request_id = request_id
        self._base = (reply.run - 1) * RUN_STRIDE
        after -= self._base
        self._after = after if 0 < after < RUN_STRIDE and _is_of(after, reply) else 0
        # What another process says may not be known yet, so neither whether the id is of it.
        self._is_unsure = reply.result is None and not reply.is_known
        self._go_on(self._after)

    def _go_on(self, after: int) -> None:
        """Goes on after an event of this run; from the start after 0."""
        self._place, event = divmod(after, 4)
        self._began = after >= 1
        self._text_began = after >= 2 and after != 3
        self._text_ended = self._place > 0 and event == 1
        self._ended = event == 3

    def advance(self) -> bytes:
        reply, events = self._reply, []
        if self._is_unsure and (reply.result is not None or reply.is_known):
            self._is_unsure = False
            if self._after and not _is_of(self._after, reply):
                self._go_on(0)
        if not self._began:
            self._began = True
            events.append(b":\n\n")
            metadata = {"turn_id": reply.turn_id, "session_id": reply.session_id}
            start = {"type": "start", "messageId": reply.turn_id, "messageMetadata": metadata}
            events.append(self._event(1, start))
        result = reply.result
        if text := reply.text_from(self._place, MAX_WRITE_CHARS):
            if not self._text_began:
                self._text_began = True
                events.append(self._event(2, {"type": "text-start", "id": "0"}))
            self._place += len(text)
            delta = {"type": "text-delta", "id": "0", "delta": text}
            events.append(self._event(4 * self._place, delta))
        elif result is not None and not self.is_done:
            self.is_done = True
            # A text that began and whose words were lost ends after its start all the same.
            last = self._place or int(self._text_began)
            if self._text_began and not (self._text_ended or self._ended):
                events.append(self._event(4 * last + 1, {"type": "text-end", "id": "0"}))
            if not self._ended:
                events.append(self._event(4 * last + 3, self._end(result)))
            events.append(b"data: [DONE]\n\n")
        return b"".join(events)

    def _event(self, number: int, value: Mapping[str, Any]) -> bytes:
        return b"id: %d\ndata: %b\n\n" % (self._base + number, orjson.dumps(value))

    def _end(self, result: TurnResult) -> dict[str, Any]:
        if result.status is TurnStatus.STOPPED:
            return {"type": "abort", "reason": "stopped"}
        if result.error is not None:
            problem = problem_body(result.error, self._request_id)
            return {"type": "error", "errorText": problem["detail"], "code": problem["code"]}
        return {
            "type": "finish",
            "finishReason": (result.finish_reason or "other").replace("_", "-"),
            "messageMetadata": {
                **outcome(result, private=self._private),
                "session_id": self._reply.session_id,
            },
        }


def _is_of(event: int, reply: Reply) -> bool:
    """Whether a reader of this run may have this event, as far as can be told."""
    place, kind = divmod(event, 4)
    if reply.result is None and reply.is_known:
        return (kind == 0 or event in (1, 2)) and place <= reply.length
    if reply.result is None or reply.result.error is not None:
        # Words that were streamed may have been lost with their process.
        return True
    if kind == 0 or event in (1, 2):
        return place <= reply.length
    return place == reply.length and kind != 2


def outcome(result: TurnResult, *, private: bool) -> dict[str, Any]:
    """What is told of a turn beside its reply."""
    told: dict[str, Any] = {
        "turn_id": result.turn_id,
        "finish_reason": result.finish_reason,
        "history_truncated": result.history_truncated,
        "stored": result.stored,
    }
    if private:
        told["model"] = result.model
        told["usage"] = told_usage(result.usage)
    return told


def told_usage(usage: Usage) -> dict[str, Any]:
    """What a turn took, for who holds the API key."""
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost_usd": usage.cost_usd,
    }


class _Writer:
    """Writes what a format makes of a reply, one write after the other."""

    def __init__(self, handler: ApiHandler, reply: Reply, format: Format) -> None:
        self._handler = handler
        self._reply = reply
        self._format = format
        self._loop = asyncio.get_running_loop()
        connection: Any = handler.request.connection
        self._connection: IOStream = connection.stream
        self._is_chunked = handler.request.version == "HTTP/1.1"
        self._began = False
        self._woken = False
        self._flushing = False
        self._written = self._loop.time()
        self._ended: asyncio.Future[bool] = self._loop.create_future()

    async def run(self) -> bool:
        """Writes to the end; False when the reader went away before it, or was too slow."""
        self._reply.add_reader(self._wake)
        self._handler.on_gone = self._leave
        if self._handler.is_gone:
            self._leave()
        self._timer = self._loop.call_later(HEARTBEAT_SECONDS, self._tick)
        try:
            self._pump()
            return await self._ended
        finally:
            self._timer.cancel()
            self._leave()
            self._reply.remove_reader(self._wake)
            self._handler.on_gone = None

    def _leave(self) -> None:
        if not self._ended.done():
            self._ended.set_result(False)

    def _wake(self) -> None:
        # Once for all that comes in one read from upstream.
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._woken = False
        while not self._flushing and not self._ended.done():
            if data := self._format.advance():
                self._write(data)
            elif self._format.is_done:
                self._ended.set_result(True)
            else:
                return

    def _write(self, data: bytes) -> None:
        self._written = self._loop.time()
        flushed = self._send(data) if self._began else self._begin(data)
        if flushed is None:
            return
        if not flushed.done():
            self._flushing = True
            flushed.add_done_callback(self._flushed)
        elif flushed.exception() is not None:
            self._leave()

    def _begin(self, data: bytes) -> asyncio.Future[None]:
        """Writes the response's head as well."""
        self._began = True
        self._handler.write(data)
        return self._handler.flush()

    def _send(self, data: bytes) -> asyncio.Future[None] | None:
        """Writes more of the body; None when the system has taken all of it.

        Tornado's own ways cost several times as much as the system does.
        """
        connection = self._connection
        if connection.closed():
            self._leave()
            return None
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        sent = send_now(connection, data)
        return connection.write(memoryview(data)[sent:]) if sent < len(data) else None

    def _flushed(self, flushed: asyncio.Future[None]) -> None:
        self._flushing = False
        if flushed.cancelled() or flushed.exception() is not None:
            self._leave()
        else:
            self._pump()

    def _tick(self) -> None:
        if self._ended.done():
            return
        silent = self._loop.time() - self._written
        if self._flushing and silent >= SLOW_READER_SECONDS:
            self._connection.close()
            self._leave()
            return
        if not self._flushing and silent >= HEARTBEAT_SECONDS:
            self._write(b":\n\n")
        wait = max(0.1, HEARTBEAT_SECONDS - silent % HEARTBEAT_SECONDS)
        self._timer = self._loop.call_later(wait, self._tick)


class TurnHandler(ApiHandler):
    """A handler that answers with turns: for a client with its key, or for a widget's visitor."""

    @property
    def private(self) -> bool:
        """Whether the caller may know what a turn cost and who answered: a visitor may not."""
        return self.operation is not None and self.operation.auth != "widget"

    async def caller(self) -> tuple[Chatbot, str | None]:
        """Whose turns these are: a chatbot's, by its key; for a widget those of its own session.

        Raises `InvalidApiKey`; for a widget `SessionRequired`, and what `widget_session` does.
        """
        access = self.services.access
        if self.private:
            chatbot = await access.client_by_key(self.api_key({}))
            return self.serve_chatbot(chatbot, check_origin=False), None
        if (token := self.bearer()) is None:
            raise SessionRequired
        session_id = canonical_id(token) or ""
        return (await self.widget_session(session_id)).chatbot, session_id

    async def widget_session(self, session_id: str, user_token: str | None = None) -> WidgetSession:
        """A widget's session, whose visitor it is that asks.

        Raises `NotFound`, `OriginNotAllowed` or `IdentityRequired`.

        :param user_token: else the header `X-User-Token` counts.
        """
        access = self.services.access
        session = await access.widget_session(session_id)
        self.serve_chatbot(session.chatbot, check_origin=True)
        access.require_visitor(
            session, user_token or self.given_headers.get(USER_TOKEN.name.lower())
        )
        return session

    async def caller_in(self, session_id: str | None) -> tuple[Chatbot, str]:
        """Whose session this is, and the session: the path's, or a widget's own."""
        chatbot, own = await self.caller()
        session = own or canonical_id(session_id or "")
        if session is None:
            raise NotFound("This chatbot has no session with this id.")
        return chatbot, session

    def idempotency_key(self) -> str | None:
        """The header `Idempotency-Key`. Raises `InvalidRequest`."""
        key = self.given_headers.get("idempotency-key")
        if key is not None and not (
            1 <= len(key) <= 255 and all("!" <= char <= "~" for char in key)
        ):
            raise InvalidRequest("Idempotency-Key must be 1 to 255 visible ASCII characters.")
        return key

    def last_event_id(self) -> int:
        """The header `Last-Event-ID`; 0 without one. Raises `MalformedRequest`."""
        text = self.given_headers.get("last-event-id", "")
        if not text:
            return 0
        if not (
            text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= MAX_EVENT_ID
        ):
            raise MalformedRequest("Last-Event-ID must be the id of an event of this stream.")
        return int(text)

    def tell_replayed(self, started: Started) -> None:
        """Says in a header that a turn was there before."""
        if started.replayed:
            self.set_header("Idempotency-Replayed", "true")

    async def whole(self, started: Started) -> TurnResult:
        """How the turn ended, once it has. Raises its error when there is nothing to show."""
        self.tell_replayed(started)
        reply = started.reply

        def reader() -> None:
            """Counts as one who reads."""

        def gone() -> None:
            reply.remove_reader(reader)
            self.services.turns.left(reply)

        reply.add_reader(reader)
        self.on_gone = gone
        if self.is_gone:
            gone()
        assert self.chatbot is not None
        try:
            if not started.replayed:
                return (await reply.ended()).require()
            # A turn that was there before may be a stream's, which may take longer.
            async with asyncio.timeout(self.services.turns.timeouts(self.chatbot).plain):
                return (await reply.ended()).require()
        except TimeoutError:
            raise ProviderTimeout from None
        finally:
            reply.remove_reader(reader)
            # It knows this handler, which would stay until cycles are looked for.
            self.on_gone = None

    async def events(self, reply: Reply, *, after: int = 0, private: bool) -> None:
        """Answers with the reply's events, from after the one that the reader has."""
        format = UIMessageStream(reply, after=after, private=private, request_id=self.request_id)
        await self.stream(reply, format)

    async def stream(self, reply: Reply, format: Format) -> None:
        """Answers with what `format` makes of the reply, as it comes.

        Raises `NotAcceptable` for a GET whose client does not take that.
        """
        if self.is_read_only:
            self.require_acceptable(EVENT_STREAM)
        for name, value in format.headers.items():
            self.set_header(name, value)
        if self.request.method == "HEAD":
            # Sent now, since at the end they would tell a length, which the stream has none of.
            await self.flush()
            return
        self._bound_buffer()
        if await self._written(_Writer(self, reply, format)):
            with contextlib.suppress(StreamClosedError):
                await self.finish()
            if self.request.version == "HTTP/1.0":
                # Its end is the connection's, also for a client that asked to keep that.
                connection: Any = self.request.connection
                connection.stream.close()
        else:
            self.services.turns.left(reply)

    async def _written(self, writer: _Writer) -> bool:
        metrics = self.services.metrics
        metrics.open_streams += 1
        try:
            return await writer.run()
        finally:
            metrics.open_streams -= 1

    def _bound_buffer(self) -> None:
        connection = getattr(self.request.connection, "stream", None)
        if (raw := getattr(connection, "socket", None)) is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
