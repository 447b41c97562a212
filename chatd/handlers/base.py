"""What every handler does alike: read, refuse, answer, and say so in one line of log."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from asyncio import Future
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from http import HTTPStatus
from typing import Any, Literal

import orjson
from tornado.httputil import HTTPHeaders, format_timestamp
from tornado.iostream import IOStream, StreamClosedError
from tornado.web import HTTPError, RequestHandler, stream_request_body

from chatd import logs
from chatd.access import Access
from chatd.config import ServerConfig
from chatd.domain import Chatbot, random_bytes
from chatd.errors import (
    BudgetExhausted,
    InvalidApiKey,
    MalformedRequest,
    NotFound,
    RateLimited,
    RequestError,
    StorageUnavailable,
)
from chatd.handlers.problems import (
    BodyTooLarge,
    HeadersTooLarge,
    MethodNotAllowed,
    NotAcceptable,
    UnsupportedMediaType,
    problem_body,
    problem_of,
    retry_after,
)
from chatd.headers import QuickHeaders, UsualHeaders
from chatd.limits import Admission, Kind, Limits
from chatd.metrics import Metrics
from chatd.sharing import Sharing
from chatd.storage import Storage
from chatd.tracing import Tracing
from chatd.turns import Turns
from chatd.validation import parse_json, schema

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 * 1024
"""Names and values together; the common limit of servers and routers is 8 to 16 KiB."""

MAX_HEADERS = 100
"""How many headers a request may have."""

SMALL_BODY_BYTES = 100_000
"""A body that is shorter, and JSON, is waited for before its handler runs."""

JSON = "application/json"
EVENT_STREAM = "text/event-stream"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_CONTENT_TYPE = re.compile(
    r"application/(?:[a-z0-9.-]+\+)?json\s*(?:;\s*charset=\"?utf-8\"?\s*)?", re.ASCII | re.I
)
_ALLOW_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-API-Key, X-Request-Id, "
    "X-User-Token"
)

_EXPOSE_HEADERS = "X-Request-Id, Retry-After, Idempotency-Replayed, RateLimit, RateLimit-Policy"

Auth = Literal["none", "api_key", "widget"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A header or a value in a query that an operation reads."""

    name: str
    place: Literal["header", "query"]
    schema: Mapping[str, Any]
    description: str


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a route: what validates and documents it.

    `auth` has no default, so that no route forgets to say who may. `request` and `response`
    name schemas; `events` says that the answer is, or with a `response` may be, a stream of
    events; `nothing` describes when there is nothing to answer with (204). `errors` are those
    beside what every route can give, and `problem` names the schema that they are told in.
    A text as `events` describes another stream than the AI SDK's.
    """

    summary: str
    auth: Auth
    description: str = ""
    request: str | None = None
    response: str | None = None
    events: bool | str = False
    nothing: str | None = None
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[type[RequestError], ...] = ()
    problem: str = "problem"


@dataclass(frozen=True, slots=True)
class Route:
    """A path, with its parameters in braces, and who handles it."""

    path: str
    handler: type[ApiHandler]
    operations: Mapping[str, Operation]
    tag: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        """The path as Tornado's regular expression."""
        return re.sub(r"\\{[a-z_]+\\}", "([^/]+)", re.escape(self.path))


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers call."""

    config: ServerConfig
    storage: Storage
    access: Access
    limits: Limits
    turns: Turns
    sharing: Sharing
    metrics: Metrics
    tracing: Tracing | None = None


class ApiHandler(RequestHandler):
    """The base of all handlers. Small bodies come in one piece, others as in `in_pieces`."""

    services: Services
    route: Route | None
    chatbot: Chatbot | None = None
    error_code: str | None = None
    span: Any = None
    error_type = "application/problem+json"
    takes_pieces = False

    def initialize(self, services: Services, route: Route | None = None, **arguments: Any) -> None:
        self.services = services
        self.route = route
        self.arguments = arguments
        self._chunks: list[bytes] = []
        self._received = 0
        self._early = self.takes_pieces
        self._cors = False
        self._quota: dict[str, str] = {}
        self.is_gone = False
        self.on_gone: Callable[[], None] | None = None
        headers = self.request.headers
        self.given_headers: Mapping[str, str] = (
            headers.given
            if isinstance(headers, UsualHeaders)
            else {name.lower(): value for name, value in headers.items()}
        )
        """What the request's headers say, by their names in lower case."""
        given = self.given_headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else random_bytes().hex()
        logs.request_id.set(self.request_id)
        self._common_headers()

    def clear(self) -> None:
        """Tornado's, without `Server`, with chatd's default headers, and at a third of the cost.

        Tornado checks each value as if a client might have given it, and makes the date anew.
        """
        self._headers = QuickHeaders(
            {
                "Content-Type": "text/html; charset=UTF-8",
                "Date": _date(int(time.time())),
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
                "Vary": "Origin",
            }
        )
        self.set_default_headers()
        self._write_buffer = []
        self._status_code = HTTPStatus.OK.value
        self._reason = HTTPStatus.OK.phrase

    def _common_headers(self) -> None:
        """The headers that answers and errors both have."""
        self._headers["X-Request-Id"] = self.request_id
        self._allow_origin()
        for name, value in self._quota.items():
            self.set_header(name, value)

    def _allow_origin(self) -> None:
        """Says to a page whether it may read the answer."""
        origin = self.given_headers.get("origin")
        if origin is not None and self._cors:
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Expose-Headers", _EXPOSE_HEADERS)

    async def prepare(self) -> None:
        if self.services.tracing is not None:
            self._begin_span(self.services.tracing)
        if (origin := self.given_headers.get("origin")) is not None:
            self._cors = await self.services.access.allows_origin_somewhere(origin)
            self._allow_origin()
        if getattr(getattr(self.request.connection, "stream", None), "is_crowding", False):
            most = self.services.config.max_connections_per_address
            raise RateLimited(
                f"At most {most} requests at once are taken from one address.", retry_after=1
            )
        if not isinstance(self.request.headers, UsualHeaders):
            _require_fitting(self.request.headers)
        # Who asks first whether to send a body is told before it is sent.
        if (
            "expect" in self.given_headers
            and _length(self.given_headers) > self.services.config.max_body_bytes
        ):
            raise self._too_large()
        self._early = False

    def _begin_span(self, tracing: Tracing) -> None:
        """Begins the request's span, which is the current one from here on."""
        if self.services.config.tracing == "continue":
            tracing.enter_caller(self.request.headers)
        # The template, not the path: a path may hold what nobody else should have.
        method, path = str(self.request.method), self.route.path if self.route else None
        self.span = tracing.begin(
            f"{method} {path}" if path else method,
            "server",
            {
                "http.request.method": method,
                "http.route": path,
                "chatd.request.id": self.request_id,
            },
        )
        tracing.enter(self.span)

    def end_span(self) -> None:
        """Ends it, if there is one: the request was answered."""
        if self.span is not None and self.services.tracing is not None:
            status = self.get_status()
            error = str(status) if status >= HTTPStatus.INTERNAL_SERVER_ERROR else None
            told = {"http.response.status_code": status}
            self.services.tracing.end(self.span, told, error=error)

    def _too_large(self) -> BodyTooLarge:
        most = self.services.config.max_body_bytes
        return BodyTooLarge(f"The body is too large: at most {most} bytes are taken.")

    def data_received(self, chunk: bytes) -> None:
        # A body over the limit is dropped as it comes, and refused at its end: a client that is
        # still sending when the connection is closed often cannot read why.
        self._received += len(chunk)
        if self._received <= self.services.config.max_body_bytes:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    # Reading

    @property
    def operation(self) -> Operation | None:
        """What the route says of the request's method."""
        method = "GET" if self.request.method == "HEAD" else str(self.request.method)
        return self.route.operations.get(method) if self.route else None

    def body(self) -> Any:
        """The body, read and fitting the operation's schema. Raises what does not fit."""
        value = self.json_body()
        operation = self.operation
        if operation is not None and operation.request is not None:
            schema(operation.request).require(value)
        return value

    def json_body(self) -> Any:
        """The body's JSON. Raises the `RequestError` of a body that is none."""
        if self._received > self.services.config.max_body_bytes:
            raise self._too_large()
        content_type = self.given_headers.get("content-type", JSON)
        if content_type != JSON and not _CONTENT_TYPE.fullmatch(content_type.strip()):
            raise UnsupportedMediaType
        if self.given_headers.get("content-encoding", "identity") not in ("", "identity"):
            raise UnsupportedMediaType
        operation = self.operation
        streams = operation is not None and operation.events
        self.require_acceptable(JSON, *([EVENT_STREAM] if streams else []))
        return parse_json(b"".join(self._chunks) if self.takes_pieces else self.request.body)

    def require_acceptable(self, *media_types: str) -> None:
        """Raises `NotAcceptable` when the client takes an answer of none of these types."""
        accept = self.given_headers.get("accept", "")
        if accept and not any(_accepts(accept, media_type) for media_type in media_types):
            named = " or ".join(media_types)
            raise NotAcceptable(f"This endpoint answers {named}; the Accept header rules that out.")

    @property
    def is_read_only(self) -> bool:
        """Whether the request changes nothing, so that it can be refused when its answer is known."""
        return self.request.method in ("GET", "HEAD")

    def wants_events(self, body: Mapping[str, Any]) -> bool:
        """Whether the answer is to be a stream of events."""
        return bool(body.get("stream")) or not _accepts(self.given_headers.get("accept", ""), JSON)

    def api_key(self, body: Mapping[str, Any]) -> str | None:
        """The API key, from wherever it came. Raises `InvalidApiKey` when there are two."""
        given = {body.get("api_key"), self.bearer(), self.given_headers.get("x-api-key")}
        keys = given - {None, ""}
        if len(keys) > 1:
            raise InvalidApiKey("The request holds two different API keys. Send one.")
        return keys.pop() if keys else None

    def bearer(self) -> str | None:
        """The token of `Authorization: Bearer …`."""
        scheme, _, token = self.given_headers.get("authorization", "").partition(" ")
        return token.strip() or None if scheme.lower() == "bearer" else None

    def serve_chatbot(self, chatbot: Chatbot, *, check_origin: bool) -> Chatbot:
        """From here on the request is `chatbot`'s, and its allowed origins count.

        With `check_origin` a page of another origin is refused, and where the chatbot has a list of
        its own a client that names no origin; without, its browser is just not
        told that it may read the answer.
        """
        self.chatbot = chatbot
        if (origin := self.given_headers.get("origin")) is not None:
            self._cors = self.services.access.allows_origin(origin, chatbot)
            if not self._cors:
                self.clear_header("Access-Control-Allow-Origin")
            self._allow_origin()
        # A browser names no origin when it reads from a page of this server.
        if check_origin and (origin or self.given_headers.get("sec-fetch-site") != "same-origin"):
            self.services.access.require_origin(origin, chatbot)
        return chatbot

    def admitted(self, kind: Kind, **own: str | None) -> _Admitted:
        """Counts one more of a kind for the request's chatbot, and says in headers what is left.

        It is counted when the `async with` ends well; else as tried in vain. Raises `RateLimited`.

        :param own: as in `Limits.ask`.
        """
        return _Admitted(self, kind, own)

    def show_quota(self, admission: Admission) -> None:
        """Says in headers what the limits leave."""
        self._quota = _quota_headers(admission)
        for name, value in self._quota.items():
            self.set_header(name, value)

    def client_address(self) -> str:
        """The address, or network, that the client is counted under."""
        forwarded = self.given_headers.get("x-forwarded-for", "")
        return self.services.limits.address(self.request.remote_ip or "", forwarded)

    def on_connection_close(self) -> None:
        self.is_gone = True
        if self.on_gone is not None:
            self.on_gone()
        if self.takes_pieces and not (self._finished or self.request._body_future.done()):
            # Its body is broken, which Tornado tells the client, or the client is gone.
            self.set_status(HTTPStatus.BAD_REQUEST)
            self.error_code = MalformedRequest.code
            self._log()
        super().on_connection_close()

    # Answering

    def answer(self, value: Any) -> None:
        """Answers 200 with JSON. Raises `NotAcceptable` for a GET whose client does not take that."""
        if self.is_read_only:
            self.require_acceptable(JSON)
        self._headers["Content-Type"] = JSON
        self.finish(orjson.dumps(value, option=orjson.OPT_UTC_Z))

    def answer_nothing(self) -> None:
        """Answers 204."""
        self.set_status(204)
        self.clear_header("Content-Type")
        self.finish()

    def compute_etag(self) -> str | None:
        return None

    def flush(self, include_footers: bool = False) -> Future[None]:
        """Tornado's, which takes three times as long for what is the usual: a whole answer."""
        connection: Any = self.request.connection
        if not (include_footers and self._is_usual(connection.stream)):
            return super().flush(include_footers)
        lines = [f"{name}: {value}\r\n" for name, value in self._headers.get_all()]
        head = f"HTTP/1.1 {self._status_code} {self._reason}\r\n" + "".join(lines)
        if not head.count("\n") == head.count("\r") == len(lines) + 1:
            # Tornado says which header holds more than a line.
            return super().flush(include_footers)
        data = b"".join((head.encode("latin-1"), b"\r\n", *self._write_buffer))
        self._headers_written, self._write_buffer = True, []
        if (sent := send_now(connection.stream, data)) < len(data):
            written: Future[None] = connection.write(data[sent:])
            return written
        done: Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def _is_usual(self, stream: Any) -> bool:
        """Whether the answer is whole, of a known length, and says nothing of its connection."""
        return (
            not self._headers_written
            and not self._early
            and self.request.version == "HTTP/1.1"
            and self.request.method != "HEAD"
            and "connection" not in self.given_headers
            and "Content-Length" in self._headers
            and not self._transforms
            and not hasattr(self, "_new_cookie")
            and not stream.closed()
        )

    def options(self, *_: str) -> None:
        """Answers a preflight, and anybody who asks for the methods."""
        self.set_status(204)
        self.set_header("Allow", self._allow())
        self.clear_header("Content-Type")
        if self._cors and "access-control-request-method" in self.given_headers:
            self.set_header("Access-Control-Allow-Methods", self._allow())
            self.set_header("Access-Control-Allow-Headers", _ALLOW_HEADERS)
            self.set_header("Access-Control-Max-Age", "600")
        self.finish()

    async def head(self, *arguments: str) -> None:
        if self.route is None or "GET" not in self.route.operations:
            raise MethodNotAllowed
        result = self.get(*arguments)
        if result is not None:
            await result

    def _allow(self) -> str:
        methods = list(self.route.operations) if self.route else []
        return ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])

    def _fail(self, error: RequestError) -> None:
        """Answers with an error, if nothing was answered yet."""
        problem = problem_of(error)
        self.error_code = error.code
        if isinstance(error, BudgetExhausted):
            self.services.metrics.refusals.add("daily_budget")
            self._quota = _budget_headers(error, self._quota)
        self.set_status(problem.status)
        self._common_headers()
        self.set_header("Content-Type", self.error_type)
        if problem.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.set_header("Allow", self._allow())
        if problem.status == HTTPStatus.UNAUTHORIZED:
            self.set_header("WWW-Authenticate", 'Bearer realm="chatd"')
        if self._early:
            # Tornado closes a connection whose request it has not read to the end.
            self.set_header("Connection", "close")
        if seconds := retry_after(error):
            self.set_header("Retry-After", seconds)
        self.finish(orjson.dumps(self.error_body(error)))

    def error_body(self, error: RequestError) -> dict[str, Any]:
        """What the client reads of an error."""
        return problem_body(error, self.request_id)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self._fail(_as_request_error(status_code, kwargs.get("exc_info")))

    def log_exception(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StorageUnavailable):
            log.error("storage is unavailable: %s", error.detail)
        elif error is None or isinstance(error, RequestError | HTTPError | StreamClosedError):
            return
        else:
            where = self.route.path if self.route else "-"
            log.error("%s %s failed: %s", self.request.method, where, logs.trace(error))


@cache
def in_pieces(handler: type[ApiHandler]) -> type[ApiHandler]:
    """The same for bodies that come in pieces, so that one over the limit is refused in time.

    Tornado runs a handler then before the body has come, which costs some more.
    """
    return stream_request_body(type(handler.__name__, (handler,), {"takes_pieces": True}))


def comes_whole(headers: HTTPHeaders, most: int) -> bool:
    """Whether a request's body is JSON, and of a length that is known and small."""
    length = headers.get("Content-Length", "")
    return (
        len(length) < len(str(SMALL_BODY_BYTES))
        and length.isdecimal()
        and int(length) <= most
        and headers.get("Content-Type") == JSON
    )


def send_now(stream: IOStream, data: bytes) -> int:
    """How much of `data` the system takes at once, past Tornado's buffer; nothing if that holds some.

    When it fails nothing was taken: to write the rest then tells what is wrong.
    """
    if stream.writing():
        return 0
    try:
        return stream.socket.send(data)
    except OSError:
        return 0


class _Admitted:
    """What `ApiHandler.admitted` returns. A class, since a generator costs several times as much."""

    __slots__ = ("_admission", "_handler", "_kind", "_own")

    def __init__(self, handler: ApiHandler, kind: Kind, own: Mapping[str, str | None]) -> None:
        self._handler = handler
        self._kind = kind
        self._own = own

    async def __aenter__(self) -> None:
        handler = self._handler
        assert handler.chatbot is not None
        self._admission = await handler.services.limits.ask(self._kind, handler.chatbot, self._own)
        if not self._admission.is_limited:
            return
        handler.show_quota(self._admission)
        if (refusing := self._admission.refusing) is not None:
            handler.services.metrics.refusals.add(refusing.name)
        self._admission.require()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._admission.is_limited:
            handler = self._handler
            handler.show_quota(await handler.services.limits.give_back(self._admission))


def _quota_headers(admission: Admission) -> dict[str, str]:
    """What draft-ietf-httpapi-ratelimit-headers-10 lets a client know of its limits."""
    quotas = (*admission.own, *admission.shared)
    if (tightest := admission.tightest) is None:
        return {}
    left, reset = max(0, tightest.left), math.ceil(tightest.reset)
    return {
        "RateLimit-Policy": ", ".join(
            f'"{quota.policy}";q={quota.rate.count};w={quota.rate.seconds}' for quota in quotas
        ),
        "RateLimit": f'"{tightest.policy}";r={left};t={reset}',
    }


def _budget_headers(error: BudgetExhausted, others: Mapping[str, str]) -> dict[str, str]:
    """The same of a budget that is used up. How many dollars it is, is not a visitor's to know."""
    policies = [others.get("RateLimit-Policy"), '"daily_budget";q=1;qu="budget";w=86400']
    return {
        "RateLimit-Policy": ", ".join(filter(None, policies)),
        "RateLimit": f'"daily_budget";r=0;t={math.ceil(error.retry_after or 0)}',
    }


@lru_cache(1)
def _date(seconds: int) -> str:
    """The time as the header `Date` has it."""
    return format_timestamp(seconds)


def _require_fitting(headers: HTTPHeaders) -> None:
    """Raises `HeadersTooLarge` for more than a request may have."""
    lines = list(headers.get_all())
    if len(lines) > MAX_HEADERS:
        raise HeadersTooLarge(f"At most {MAX_HEADERS} headers are taken.")
    if sum(len(name) + len(value) for name, value in lines) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"At most {MAX_HEADER_BYTES} bytes of headers are taken.")


def _length(headers: Mapping[str, str]) -> int:
    """The length that a body is said to have; 0 when it is not said."""
    length = headers.get("content-length", "")
    return int(length) if re.fullmatch(r"[0-9]{1,18}", length, re.ASCII) else 0


def _as_request_error(status: int, exc_info: Any) -> RequestError:
    error = exc_info[1] if exc_info else None
    if isinstance(error, RequestError):
        return error
    match status:
        case 404:
            return NotFound()
        case 405:
            return MethodNotAllowed()
        case _ if 400 <= status < 500:
            return MalformedRequest("The request's address or headers cannot be read.")
        case _:
            return RequestError()


def _accepts(header: str, media_type: str) -> bool:
    """Whether an Accept header (RFC 9110, 12.5.1) leaves room for an answer of this type."""
    if not header.strip():
        return True
    best: tuple[int, float] = (-1, 0.0)
    ways = {"*/*": 0, f"{media_type.partition('/')[0]}/*": 1, media_type: 2}
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        how = ways.get(name)
        if how is not None and how > best[0]:
            best = (how, _quality(parameters))
    return best[1] > 0


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0


class UnknownPathHandler(ApiHandler):
    """Answers every path that is not there."""

    def _not_found(self) -> None:
        raise NotFound("There is nothing at this path. The endpoints are described at /docs.")

    get = post = put = patch = delete = options = head = _not_found  # type: ignore[assignment]
