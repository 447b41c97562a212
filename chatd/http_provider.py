"""A provider whose service answers over HTTP: all of it but the words of one wire format."""

from __future__ import annotations

import asyncio
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakSet

import aiohttp
import orjson

from chatd.domain import Usage
from chatd.errors import ProviderError, ProviderErrorKind
from chatd.http_errors import cleaned, kind_of, retry_hint, sentences
from chatd.pacing import PacedStream, pacer
from chatd.provider import (
    Event,
    Finish,
    FinishReason,
    ProviderRequest,
    TextDelta,
    ToolCallDelta,
    UsageReport,
)
from chatd.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder
from chatd.tracing import outgoing

MAX_BODY_BYTES = MAX_EVENT_BYTES
"""The largest answer in one piece that is read."""

LARGE_BODY = 2**20
"""Bytes from which a body is sent in pieces, so that the event loop is not kept from others."""

END_GRACE_SECONDS = 0.5
"""How long the end of the body is waited for once the answer is whole: usage often comes after
the finish reason, and a connection read to its end can be used again."""

DONE_GRACE_SECONDS = 0.02
"""The same after the last event there is: the end is there or it is not sent."""

ERROR_BODY_SECONDS = 2.0
"""How long the body of an error is waited for; the status alone tells enough."""

CHECK_CONNECT_SECONDS = 5.0
"""How long `check` waits for a connection."""

GET_SECONDS = 10.0
"""How long `get` waits for its whole answer."""

_Kind = ProviderErrorKind
_JSON = "application/json"
_was_used: ContextVar[bool] = ContextVar("was_used", default=False)
"""Whether the connection of the request that was sent last had been used before."""

_NAME = re.compile(r"[ -~]{1,200}")
_NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_SHOWN = (TextDelta, ToolCallDelta)
_DIED = (
    aiohttp.ServerDisconnectedError,
    aiohttp.ClientOSError,
    aiohttp.ClientConnectionResetError,
)


class ServiceError(Exception):
    """Raised by an `HttpAnswer` for a failure that stands in the answer itself.

    :param error: what the service says of it, as it is parsed: an object or a sentence.
    """

    def __init__(self, error: Any) -> None:
        super().__init__("the service told of a failure")
        self.error = error


class HttpAnswer(ABC):
    """One answer, as far as it has come: how a wire format is read.

    `chunk` and `whole` give the events of what comes, and note in the attributes what they learn
    of the end. What is no part of an answer they pass over; for a failure that they are told they
    raise `ServiceError`, for what the format does not allow `ProviderError`.
    """

    def __init__(self) -> None:
        self.is_whole = False
        """Whether nothing of the answer is missing; a body that ends before it is an error."""
        self.is_done = False
        """Whether nothing follows at all, not even usage."""
        self.reason: FinishReason = "stop"
        self.model: str | None = None
        self.usage: Usage | None = None

    @abstractmethod
    def chunk(self, data: bytes) -> Iterable[Event]:
        """The events of one server-sent event, given its data."""

    @abstractmethod
    def whole(self, value: dict[str, Any]) -> Iterable[Event]:
        """The events of an answer in one piece, given its JSON; an object."""

    def begin(self, headers: Mapping[str, str]) -> Iterable[Event]:
        """The events before any of the answer, given the headers; none, if not overridden."""
        return ()

    def end(self) -> Iterable[Event]:
        """The last events. Raises `ProviderError` when the answer is not whole."""
        if not self.is_whole:
            raise ProviderError(
                _Kind.INCOMPLETE, "the answer stopped without an end", reached_model=True
            )
        if self.usage is not None:
            yield UsageReport(self.usage)
        yield Finish(self.reason, self.model)

    def named(self, model: Any) -> None:
        """Takes the model's name, if it is one."""
        if model != self.model and isinstance(model, str) and _NAME.fullmatch(model):
            self.model = model

    @staticmethod
    def json(data: bytes) -> dict[str, Any]:
        """A chunk's JSON; an object. Raises `ProviderError`."""
        try:
            value = _loads(data)
        except (ValueError, RecursionError):
            raise ProviderError(
                _Kind.PROTOCOL, "a chunk that is not JSON", reached_model=True
            ) from None
        return value if isinstance(value, dict) else _object(value)

    @staticmethod
    def count(value: Any) -> int | None:
        """A count of tokens, if it is one."""
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
        return value if good else None

    @staticmethod
    def dollars(value: Any) -> float | None:
        """What something cost, if it makes sense."""
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if good and 0 <= value < 2**53 else None


def _payload(data: bytes) -> aiohttp.Payload:
    """JSON as a body, with its type; what says of a body what it is, aiohttp need not look for."""
    if len(data) >= LARGE_BODY:
        return aiohttp.BytesIOPayload(io.BytesIO(data), content_type=_JSON)
    return aiohttp.BytesPayload(data, content_type=_JSON)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProviderError(_Kind.PROTOCOL, "JSON that is not an object", reached_model=True)
    return value


def _loads(data: bytes) -> Any:
    """A document's value, also of what orjson refuses and others take: half a character, NaN."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


def _json_bytes(value: Any) -> bytes:
    """A value as JSON, also one that orjson refuses: a number of more than 64 bits."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value).encode()


class HttpProvider(ABC):
    """`chatd.Provider` for a service that takes a POST of JSON and answers with JSON or events.

    A wire format says what is sent (`body`) and how the answer is read (`answer`). The rest is
    here: deadlines of connecting, bounds on what is read, errors of their kinds without secrets
    or what was said, no redirects, nothing compressed.

    :param base_url: the address before `path` and `check_path`.
    :param headers: sent with every request.
    :param secrets: strings that must not come out in an error.
    """

    path: ClassVar[str]
    """Where questions are posted."""

    check_path: ClassVar[str]
    """What answers with 200, and JSON that `checks_out`, when the service takes the key."""

    def __init__(
        self, base_url: str, *, headers: Mapping[str, str], secrets: Sequence[str] = ()
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._secrets = tuple(secret for secret in secrets if secret)
        self._http = _session(headers, _Connector())
        # Each of its requests has a connection of its own.
        self._unpooled = _session(headers, aiohttp.TCPConnector(limit=0, force_close=True))

    @abstractmethod
    def body(self, request: ProviderRequest) -> Mapping[str, Any]:
        """The request's JSON. Raises `ProviderError` for what cannot be said in this format."""

    @abstractmethod
    def answer(self) -> HttpAnswer:
        """Reads one answer."""

    async def close(self) -> None:
        await self._http.close()
        await self._unpooled.close()

    def checks_out(self, told: Any) -> bool:
        """Whether the JSON at `check_path` is the service's, and no portal's or other server's.

        If not overridden: whether it is a list of models, as OpenAI and Anthropic give it.
        """
        # Ollama has null for no models, Together the list itself.
        models = told.get("data", told) if isinstance(told, dict) else told
        return isinstance(models, list) or (isinstance(told, dict) and models is None)

    async def check(self) -> None:
        told = await self.get(self.check_path)
        if isinstance(told, dict) and told.get("error"):
            raise self._told(told["error"], None, None, {})
        if not self.checks_out(told):
            raise ProviderError(
                _Kind.PROTOCOL,
                f"HTTP 200 at {self.check_path} with JSON that is not this service's: check base_url",
                status=200,
                retryable=False,
            )

    async def get(self, path: str, *, seconds: float = GET_SECONDS) -> Any:
        """The JSON at `path`. Raises `ProviderError`, also when it takes more than `seconds`."""
        try:
            async with (
                asyncio.timeout(seconds),
                await self._send("GET", path, None, CHECK_CONNECT_SECONDS) as response,
            ):
                await self._raise_for_status(response, None)
                return await self._json(response)
        except TimeoutError:
            raise ProviderError(_Kind.TIMEOUT, f"no answer in {seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._translated(error, started=False) from error

    async def stream(self, request: ProviderRequest) -> AsyncGenerator[Event, None]:
        answer, started = self.answer(), False
        try:
            async with await self._send(
                "POST", self.path, self.body(request), request.timeouts.connect
            ) as response:
                await self._raise_for_status(response, request)
                for event in answer.begin(response.headers):
                    yield event
                if response.content_type == "text/event-stream":
                    decoder = SSEDecoder()
                    with PacedStream(pacer()) as paced:
                        pieces = _Pieces(response, answer, paced)
                        while piece := await pieces.next():
                            chunks = decoder.feed(piece)
                            for event in _read(answer, chunks, joined=pieces.have_waited):
                                started = True
                                pieces.is_shown = pieces.is_shown or isinstance(event, _SHOWN)
                                yield event
                else:
                    for event in answer.whole(_object(await self._json(response))):
                        yield event
            for event in answer.end():
                yield event
        except EventTooLarge as error:
            raise ProviderError(_Kind.PROTOCOL, str(error), reached_model=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._translated(error, started=started) from error
        except ServiceError as error:
            raise self._told(error.error, None, request, {}, reached_model=True) from None

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, connect: float
    ) -> aiohttp.ClientResponse:
        """The answer's head. Sent again on a new connection if a kept one had died meanwhile."""
        data = None if body is None else _json_bytes(body)
        _was_used.set(False)
        try:
            return await self._request(self._http, method, path, data, connect)
        except _DIED as error:
            if not _was_used.get() or _has_begun(error):
                raise
        return await self._request(self._unpooled, method, path, data, connect)

    async def _request(
        self,
        http: aiohttp.ClientSession,
        method: str,
        path: str,
        data: bytes | None,
        connect: float,
    ) -> aiohttp.ClientResponse:
        return await http.request(
            method,
            self._base_url + path,
            data=None if data is None else _payload(data),
            headers=outgoing.get(),
            # A redirect would take the key to another host.
            allow_redirects=False,
            timeout=_timeout(connect),
        )

    async def _json(self, response: aiohttp.ClientResponse) -> Any:
        text = await _body(response)
        try:
            return _loads(text)
        except (ValueError, RecursionError):
            raise ProviderError(
                _Kind.PROTOCOL,
                f"HTTP {response.status} with {response.content_type} that is not JSON",
                status=response.status,
                reached_model=response.status < 300,
            ) from None

    async def _raise_for_status(
        self, response: aiohttp.ClientResponse, request: ProviderRequest | None
    ) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.status < 300 and encoding in ("identity", ""):
            return
        if response.status < 300:
            raise ProviderError(_Kind.PROTOCOL, f"unasked Content-Encoding {encoding[:32]}")
        if response.status < 400:
            raise ProviderError(
                _Kind.PROTOCOL,
                f"HTTP {response.status}: a redirect, which is not followed: check base_url",
                status=response.status,
                retryable=False,
            )
        try:
            async with asyncio.timeout(ERROR_BODY_SECONDS):
                body = await self._json(response)
        except (ProviderError, aiohttp.ClientError, TimeoutError):
            body = None
        # Google's is a list of one.
        if isinstance(body, list) and body:
            body = body[0]
        # Some servers tell it at the top.
        error = body.get("error", body) if isinstance(body, dict) else None
        raise self._told(error, response.status, request, response.headers)

    def _told(
        self,
        error: Any,
        status: int | None,
        request: ProviderRequest | None,
        headers: Mapping[str, str],
        *,
        reached_model: bool = False,
    ) -> ProviderError:
        """What a service tells of a failure, as the error of its kind."""
        told = error if isinstance(error, dict) else {"message": error}
        code = told.get("code")
        if isinstance(code, int) and 400 <= code < 600:
            status = code
        elif isinstance(code, str) and re.fullmatch(r"[45][0-9]{2}", code, re.ASCII):
            status = int(code)
        kind = kind_of(status, told)
        word = code if code is not None else told.get("type")
        failure = ProviderError(
            kind,
            self._clean(f"HTTP {status}, code {word}: {'; '.join(sentences(told))}", request),
            status=status,
            reached_model=reached_model or status is None or status >= 500,
        )
        if failure.retryable:
            failure.retry_after = retry_hint(headers, told, limited=kind is _Kind.RATE_LIMIT)
        return failure

    def _translated(self, error: Exception, *, started: bool) -> ProviderError:
        kind = _Kind.INCOMPLETE if started else _Kind.CONNECTION
        if isinstance(error, aiohttp.ServerTimeoutError):
            kind = _Kind.TIMEOUT
        return ProviderError(
            kind,
            self._clean(f"{type(error).__name__}: {error}", None),
            # Once a connection stood the request may have arrived.
            reached_model=started or not isinstance(error, _NOT_SENT),
        )

    def _clean(self, text: str, request: ProviderRequest | None) -> str:
        return cleaned(text, self._secrets, request.messages if request is not None else ())


class _Connector(aiohttp.TCPConnector):
    """A pool that says of each connection whether it was used before.

    aiohttp's own way to learn that, tracing, costs more for a request than all that is here.
    """

    def __init__(self) -> None:
        super().__init__(limit=0)
        self._used: WeakSet[Any] = WeakSet()

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        connection = await super().connect(req, traces, timeout)
        # In the task of the request, so that the one who sends it reads it there.
        _was_used.set(connection.protocol in self._used)
        if not _was_used.get():
            self._used.add(connection.protocol)
        return connection


@lru_cache(64)
def _timeout(connect: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, connect=connect)


def _has_begun(error: Exception) -> bool:
    """Whether some of an answer had come when the connection broke."""
    return isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)


def _session(headers: Mapping[str, str], connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        # Nothing compressed is asked for or unpacked: a small body cannot become a huge one.
        headers={"Accept-Encoding": "identity", **headers},
        auto_decompress=False,
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )


def _read(answer: HttpAnswer, chunks: Iterable[bytes], *, joined: bool) -> Iterator[Event]:
    """The events of what was read at once. Raises as `HttpAnswer.chunk` does, after those before.

    :param joined: whether texts that follow each other are one event.
    """
    texts: list[str] = []
    try:
        for data in chunks:
            for event in answer.chunk(data):
                if joined and type(event) is TextDelta:
                    texts.append(event.text)
                    continue
                if texts:
                    yield TextDelta("".join(texts))
                    texts.clear()
                yield event
    except Exception:
        if texts:
            yield TextDelta("".join(texts))
        raise
    if texts:
        yield TextDelta("".join(texts))


class _Pieces:
    """The pieces of a body, as long as the answer in it is not whole, and a moment longer.

    Once something is shown of it, a piece is all that came while other streams had their turn.
    """

    def __init__(
        self, response: aiohttp.ClientResponse, answer: HttpAnswer, paced: PacedStream
    ) -> None:
        self.is_shown = False
        """Whether anything came that a client gets to see."""
        self.have_waited = False
        """Whether the last piece was left for others to have their turn first."""
        self._content = response.content
        self._answer = answer
        self._paced = paced
        self._until: float | None = None
        self._content.on_eof(paced.hurry)

    async def next(self) -> bytes:
        """The next piece; nothing at the end."""
        if not self._answer.is_whole:
            wait = self._paced.wait() if self.is_shown else None
            self.have_waited = wait is not None
            if wait is None:
                return await self._content.readany()
            await wait
            try:
                return await self._content.readany()
            except aiohttp.ClientError:
                # What came before it broke is there still, but aiohttp tells of the break first.
                if left := self._content._read_nowait(-1):
                    return left
                raise
        grace = DONE_GRACE_SECONDS if self._answer.is_done else END_GRACE_SECONDS
        until = asyncio.get_running_loop().time() + grace
        self._until = min(until, self._until or until)
        try:
            async with asyncio.timeout_at(self._until):
                return await self._content.readany()
        except (TimeoutError, aiohttp.ClientError):
            # What breaks after the end does no harm.
            return b""


async def _body(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := await response.content.readany():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ProviderError(
                _Kind.PROTOCOL, f"an answer of more than {MAX_BODY_BYTES} bytes", reached_model=True
            )
    return b"".join(parts)
