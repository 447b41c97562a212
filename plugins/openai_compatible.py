"""Any server that speaks OpenAI's chat completions: LiteLLM, vLLM, llama.cpp, Ollama and others.

The wire format is here once; `openrouter` builds on it.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

import aiohttp

import chatd

MAX_BODY_BYTES = chatd.MAX_EVENT_BYTES
"""The largest answer in one piece that is read."""

LARGE_BODY = 2**20
"""Bytes from which a body is sent in pieces, so that the event loop is not kept from others."""

END_GRACE_SECONDS = 0.5
"""How long the end of the body is waited for once the answer is whole: usage often comes after
the finish reason, and a connection read to its end can be used again."""

DONE_GRACE_SECONDS = 0.02
"""The same after `[DONE]`, which is followed by nothing: the end is there or it is not sent."""

MIN_QUOTE_CHARS = 12
"""As many characters in a row as were said are taken for a quotation in a provider's words."""

ERROR_BODY_SECONDS = 2.0
"""How long the body of an error is waited for; the status alone tells enough."""

_Kind = chatd.ProviderErrorKind
_BY_STATUS = {
    401: _Kind.AUTHENTICATION,
    402: _Kind.CREDIT,
    403: _Kind.AUTHENTICATION,
    408: _Kind.TIMEOUT,
    429: _Kind.RATE_LIMIT,
}
_CONTEXT_LENGTH = re.compile(
    r"context[ _](length|window|size)|maximum context|too many tokens|prompt is too long", re.I
)
_NAME = re.compile(r"[ -~]{1,200}")
_FINISH_REASONS: dict[str, chatd.FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


class ChatCompletions:
    """`chatd.Provider` over `POST {base_url}/chat/completions`.

    :param base_url: the address up to and including the version, without a slash at the end.
    :param headers: sent with every request.
    :param parameters: put into every request's body.
    :param secrets: strings that must not come out in an error.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"tools", "images"})

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str],
        parameters: Mapping[str, Any],
        secrets: tuple[str, ...] = (),
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._parameters = parameters
        self._secrets = tuple(s for s in secrets if s)
        self._http = aiohttp.ClientSession(
            # Nothing compressed is asked for or unpacked: a small body cannot become a huge one.
            headers={"Accept-Encoding": "identity", **headers},
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        await self._http.close()

    async def check(self) -> None:
        await self._check("/models")

    async def _check(self, path: str) -> None:
        try:
            async with self._send("GET", path, None, 5) as response:
                await self._raise_for_status(response, None)
        except (aiohttp.ClientError, OSError) as error:
            raise self._translated(error, started=False) from error

    def body(self, request: chatd.ProviderRequest) -> dict[str, Any]:
        """The request's JSON."""
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [_message(message) for message in request.messages],
            "stream": request.stream,
        }
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        if request.max_output_tokens is not None:
            body["max_tokens"] = request.max_output_tokens
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.user is not None:
            body["user"] = request.user
        return {**body, **self._parameters, **request.parameters}

    async def stream(self, request: chatd.ProviderRequest) -> AsyncGenerator[chatd.Event, None]:
        answer = _Answer()
        try:
            async with self._send(
                "POST", "/chat/completions", self.body(request), request.timeouts.connect
            ) as response:
                await self._raise_for_status(response, request)
                if response.content_type == "text/event-stream":
                    async for event in self._events(response, answer):
                        yield event
                else:
                    for event in answer.whole(await self._json(response)):
                        yield event
            for event in answer.end():
                yield event
        except (aiohttp.ClientError, OSError) as error:
            raise self._translated(error, started=answer.started) from error
        except _Told as error:
            raise self._error(error.error, error.status, request, reached_model=True) from None

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, connect: float) -> Any:
        data: bytes | io.BytesIO | None = None
        headers = {}
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
            if len(data) >= LARGE_BODY:
                data = io.BytesIO(data)
        return self._http.request(
            method,
            self._base_url + path,
            data=data,
            headers=headers,
            # A redirect would take the key to another host.
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=connect),
        )

    async def _events(
        self, response: aiohttp.ClientResponse, answer: _Answer
    ) -> AsyncGenerator[chatd.Event, None]:
        decoder = chatd.SSEDecoder()
        ended_at: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(ended_at):
                    chunk = await response.content.readany()
            except TimeoutError:
                return
            except aiohttp.ClientError:
                # What breaks after the end does no harm.
                if answer.is_whole:
                    return
                raise
            if not chunk:
                return
            try:
                for data in decoder.feed(chunk):
                    for event in answer.chunk(data):
                        yield event
            except chatd.EventTooLarge as error:
                raise chatd.ProviderError(_Kind.PROTOCOL, str(error), reached_model=True) from None
            if answer.is_whole and ended_at is None:
                grace = DONE_GRACE_SECONDS if answer.is_done else END_GRACE_SECONDS
                ended_at = loop.time() + grace

    async def _json(self, response: aiohttp.ClientResponse) -> Any:
        text = await _read(response)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise chatd.ProviderError(
                _Kind.PROTOCOL,
                f"HTTP {response.status} with {response.content_type} that is not JSON",
                status=response.status,
                reached_model=response.status < 300,
            ) from None

    async def _raise_for_status(
        self, response: aiohttp.ClientResponse, request: chatd.ProviderRequest | None
    ) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.status < 300 and encoding in ("identity", ""):
            return
        if response.status < 300:
            raise chatd.ProviderError(_Kind.PROTOCOL, f"unasked Content-Encoding {encoding[:32]}")
        if response.status < 400:
            raise chatd.ProviderError(
                _Kind.PROTOCOL,
                f"HTTP {response.status}: a redirect, which is not followed: check base_url",
                status=response.status,
                retryable=False,
            )
        try:
            async with asyncio.timeout(ERROR_BODY_SECONDS):
                body = await self._json(response)
        except (chatd.ProviderError, aiohttp.ClientError, TimeoutError):
            body = None
        # Some servers tell it at the top.
        error = body.get("error", body) if isinstance(body, dict) else None
        raise self._error(
            error, response.status, request, retry_after=response.headers.get("Retry-After")
        )

    def _error(
        self,
        error: Any,
        status: int | None,
        request: chatd.ProviderRequest | None,
        *,
        retry_after: str | None = None,
        reached_model: bool = False,
    ) -> chatd.ProviderError:
        """What a provider tells of a failure, as the error of its kind."""
        told = error if isinstance(error, dict) else {"message": error}
        code, message = told.get("code"), told.get("message")
        message = message if isinstance(message, str) else ""
        if isinstance(code, int) and 400 <= code < 600:
            status = code
        elif isinstance(code, str) and re.fullmatch(r"[45][0-9]{2}", code, re.ASCII):
            status = int(code)
        return chatd.ProviderError(
            _kind(status, f"{code} {message}", told.get("metadata")),
            self._clean(f"HTTP {status}, code {code}: {message}", request),
            status=status,
            retry_after=_seconds(retry_after),
            reached_model=reached_model or status is None or status >= 500,
        )

    def _translated(self, error: Exception, *, started: bool) -> chatd.ProviderError:
        kind = _Kind.INCOMPLETE if started else _Kind.CONNECTION
        if isinstance(error, aiohttp.ServerTimeoutError):
            kind = _Kind.TIMEOUT
        return chatd.ProviderError(
            kind,
            self._clean(f"{type(error).__name__}: {error}", None),
            # Once a connection stood the request may have arrived.
            reached_model=started or not isinstance(error, _NOT_SENT),
        )

    def _clean(self, text: str, request: chatd.ProviderRequest | None) -> str:
        """`text` for the operator's log: no key, nothing that was said, one line, not long."""
        said = [s for m in request.messages for s in _said(m)] if request is not None else []
        hidden = [*self._secrets, *(text for text in said if len(text) >= 4)]
        for secret in sorted(hidden, key=len, reverse=True):
            text = text.replace(secret, "[removed]")
        text = _without_quotes(text[:300], said)
        return "".join(char if char.isprintable() else " " for char in text)


def _message(message: chatd.Message) -> dict[str, Any]:
    """A message's JSON."""
    value: dict[str, Any] = {"role": message.role, "content": message.whole}
    if message.tool_calls:
        value["content"] = message.whole or None
        value["tool_calls"] = message.tool_calls
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    return value


def _said(message: chatd.Message) -> Iterator[str]:
    """What a message holds that no log may."""
    yield message.content
    for part in message.parts or ():
        if isinstance(image := part.get("image_url"), dict):
            yield str(image.get("url", ""))
    for call in message.tool_calls or ():
        if isinstance(function := call.get("function"), dict):
            yield str(function.get("arguments", ""))


_NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


def _without_quotes(text: str, said: Sequence[str]) -> str:
    """`text` without any part of it that is also a part of what was said."""
    quoted = [False] * len(text)
    for start in range(len(text) - MIN_QUOTE_CHARS + 1):
        end = start + MIN_QUOTE_CHARS
        if any(text[start:end] in message for message in said):
            quoted[start:end] = [True] * MIN_QUOTE_CHARS
    parts: list[str] = []
    for is_quote, chars in itertools.groupby(zip(quoted, text, strict=True), lambda pair: pair[0]):
        parts.append("[removed]" if is_quote else "".join(char for _, char in chars))
    return "".join(parts)


class _Told(Exception):
    """The provider said in its answer that it failed."""

    def __init__(self, error: Any, status: int | None = None) -> None:
        super().__init__("the provider told of an error")
        self.error = error
        self.status = status


class _Answer:
    """What has come of an answer."""

    def __init__(self) -> None:
        self.started = False
        self.is_whole = False
        self.is_done = False
        self._model: str | None = None
        self._usage: chatd.Usage | None = None
        self._reason: chatd.FinishReason = "stop"

    def chunk(self, data: bytes) -> Iterator[chatd.Event]:
        """The events of one event's data."""
        if data.strip() == b"[DONE]":
            self.is_whole = self.is_done = True
            return
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise chatd.ProviderError(
                _Kind.PROTOCOL, "a chunk that is not JSON", reached_model=True
            ) from None
        yield from self._read(value, "delta")

    def whole(self, value: Any) -> Iterator[chatd.Event]:
        """The events of an answer in one piece."""
        yield from self._read(value, "message")
        if isinstance(value, dict) and value.get("choices"):
            self.is_whole = True

    def end(self) -> Iterator[chatd.Event]:
        """The last events, or the error that there is no end."""
        if not self.is_whole:
            raise chatd.ProviderError(
                _Kind.INCOMPLETE, "the answer stopped without an end", reached_model=True
            )
        if self._usage is not None:
            yield chatd.UsageReport(self._usage)
        yield chatd.Finish(self._reason, self._model)

    def _read(self, value: Any, part: str) -> Iterator[chatd.Event]:
        if not isinstance(value, dict):
            raise chatd.ProviderError(
                _Kind.PROTOCOL, "JSON that is not an object", reached_model=True
            )
        if value.get("error"):
            raise _Told(value["error"])
        if isinstance(model := value.get("model"), str) and _NAME.fullmatch(model):
            self._model = model
        if isinstance(value.get("usage"), dict):
            self._usage = _usage(value["usage"])
        choices = value.get("choices")
        for choice in choices[:1] if isinstance(choices, list) else []:
            if isinstance(choice, dict):
                yield from self._choice(choice, part)

    def _choice(self, choice: dict[str, Any], part: str) -> Iterator[chatd.Event]:
        reason = choice.get("finish_reason")
        if choice.get("error") or "error" in (reason, choice.get("native_finish_reason")):
            raise _Told(choice.get("error") or "finish_reason error")
        said = choice.get(part)
        if isinstance(said, dict):
            if thought := _text(said.get("reasoning") or said.get("reasoning_content")):
                self.started = True
                yield chatd.ReasoningDelta(thought)
            if text := _text(said.get("content")):
                self.started = True
                yield chatd.TextDelta(text)
            calls = said.get("tool_calls")
            for place, call in enumerate(calls if isinstance(calls, list) else []):
                if isinstance(call, dict):
                    self.started = True
                    yield _tool_call(call, place)
        if isinstance(reason, str) and reason and not self.is_whole:
            self.is_whole = True
            self._reason = _FINISH_REASONS.get(reason, "other")


def _tool_call(call: dict[str, Any], place: int) -> chatd.ToolCallDelta:
    """A part of a tool call; `place` is its index where none is told, as in an answer in one piece."""
    index, function = call.get("index"), call.get("function")
    told = function if isinstance(function, dict) else {}
    id, name, arguments = call.get("id"), told.get("name"), told.get("arguments")
    return chatd.ToolCallDelta(
        index if isinstance(index, int) else place,
        id if isinstance(id, str) and id else None,
        name if isinstance(name, str) and name else None,
        # Some servers send the arguments themselves instead of their JSON text.
        json.dumps(arguments) if isinstance(arguments, dict) else _text(arguments),
    )


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise chatd.ProviderError(
                _Kind.PROTOCOL, f"an answer of more than {MAX_BODY_BYTES} bytes", reached_model=True
            )
    return b"".join(parts)


def _kind(status: int | None, words: str, metadata: Any) -> chatd.ProviderErrorKind:
    if status in (400, 404, 413, 422):
        return _Kind.CONTEXT_LENGTH if _CONTEXT_LENGTH.search(words) else _Kind.INVALID_REQUEST
    if status == 403 and isinstance(metadata, dict) and "reasons" in metadata:
        return _Kind.MODERATION
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status is not None and 400 <= status < 500:
        return _Kind.INVALID_REQUEST
    return _Kind.OVERLOADED


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3)."""
    if not retry_after:
        return None
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip(), re.ASCII):
        return float(retry_after)
    try:
        when = parsedate_to_datetime(retry_after)
        return max(0.0, (when - when.now(when.tzinfo)).total_seconds())
    except (ValueError, TypeError):
        return None


def _text(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def _usage(value: dict[str, Any]) -> chatd.Usage:
    prompt, completion = value.get("prompt_tokens_details"), value.get("completion_tokens_details")
    cost = value.get("cost")
    return chatd.Usage(
        input_tokens=_count(value.get("prompt_tokens")),
        output_tokens=_count(value.get("completion_tokens")),
        cached_tokens=_count(prompt.get("cached_tokens")) if isinstance(prompt, dict) else None,
        reasoning_tokens=_count(completion.get("reasoning_tokens"))
        if isinstance(completion, dict)
        else None,
        cost_usd=float(cost)
        if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < 2**53
        else None,
    )


def _count(value: Any) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if good else None


async def open_openai_compatible(settings: Mapping[str, Any]) -> ChatCompletions:
    """Makes a client from the settings."""
    key = settings.get("api_key") or ""
    headers = dict(settings.get("headers", {}))
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return ChatCompletions(
        settings["base_url"],
        headers=headers,
        parameters=settings.get("parameters", {}),
        secrets=(key, *settings.get("headers", {}).values()),
    )


BASE_URL = {
    "type": "string",
    "pattern": "^https?://[^\\s?#]+$",
    "x-error": "must be an address like http://127.0.0.1:11434/v1",
    "description": "The address up to and including the version, like http://127.0.0.1:11434/v1.",
}
PARAMETERS = {
    "type": "object",
    "description": "Put into the body of every request, like {top_p: 0.9}.",
}
HEADER_VALUE = {
    "type": "string",
    "pattern": "^[ -~]*$",
    "x-error": "must be visible ASCII characters, as in a header",
}
_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["base_url"],
    "properties": {
        "base_url": BASE_URL,
        "api_key": {
            **HEADER_VALUE,
            "type": ["string", "null"],
            "description": "Sent as a bearer token; leave it out where none is needed.",
        },
        "headers": {
            "type": "object",
            "additionalProperties": HEADER_VALUE,
            "description": "Further headers of every request.",
        },
        "parameters": PARAMETERS,
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add(
        "openai_compatible",
        open_openai_compatible,
        _SETTINGS,
        "any server with OpenAI's /chat/completions",
    )
