"""What a service over HTTP says of a failure: its kind, when to ask again, words fit for a log."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from chatd.domain import Message
from chatd.errors import ProviderErrorKind

MIN_QUOTE_CHARS = 12
"""As many characters in a row as were said are taken for a quotation in a provider's words."""

MAX_DETAIL_CHARS = 300
"""How much of a provider's words is kept."""

MAX_HINT_SECONDS = 30 * 86400.0
"""A longer wait than a month is no hint but a mistake."""

_MAX_RAW_CHARS = 65536
"""How much of an answer that is quoted in another is looked into."""

_Kind = ProviderErrorKind

# What kind it is

_EXACT = {
    # OpenRouter's `error_type` (the SDK's `APIErrorType`), which is the same for all formats
    "context_length_exceeded": _Kind.CONTEXT_LENGTH,
    "token_limit_exceeded": _Kind.CONTEXT_LENGTH,
    "string_too_long": _Kind.CONTEXT_LENGTH,
    "authentication": _Kind.AUTHENTICATION,
    "permission_denied": _Kind.AUTHENTICATION,
    "payment_required": _Kind.CREDIT,
    "rate_limit_exceeded": _Kind.RATE_LIMIT,
    "provider_overloaded": _Kind.OVERLOADED,
    "provider_unavailable": _Kind.OVERLOADED,
    "content_policy_violation": _Kind.MODERATION,
    "refusal": _Kind.MODERATION,
    "timeout": _Kind.TIMEOUT,
    "server": _Kind.OVERLOADED,
    # OpenAI's and Azure's `code`, LiteLLM's and llama.cpp's `type`
    "insufficient_quota": _Kind.CREDIT,
    "billing_hard_limit_reached": _Kind.CREDIT,
    "billing_not_active": _Kind.CREDIT,
    "invalid_api_key": _Kind.AUTHENTICATION,
    "content_filter": _Kind.MODERATION,
    "exceed_context_size_error": _Kind.CONTEXT_LENGTH,
    # Anthropic's `type`
    "authentication_error": _Kind.AUTHENTICATION,
    "billing_error": _Kind.CREDIT,
    "permission_error": _Kind.AUTHENTICATION,
    "rate_limit_error": _Kind.RATE_LIMIT,
    "timeout_error": _Kind.TIMEOUT,
    "overloaded_error": _Kind.OVERLOADED,
}
"""Words that say more than a status does."""

_AT_FAULT = {
    *("invalid_request", "invalid_prompt", "not_found", "precondition_failed", "unprocessable"),
    *("payload_too_large", "max_tokens_exceeded", "invalid_image", "image_too_large"),
    *("image_too_small", "unsupported_image_format", "image_not_found", "image_download_failed"),
    *("invalid_request_error", "not_found_error", "request_too_large", "conflict_error"),
    *("model_not_found", "string_above_max_length"),
}
"""Words for a request that is itself at fault; a status says more."""

_BY_STATUS = {
    401: _Kind.AUTHENTICATION,
    402: _Kind.CREDIT,
    403: _Kind.AUTHENTICATION,
    408: _Kind.TIMEOUT,
    429: _Kind.RATE_LIMIT,
}
_CONTEXT_LENGTH = re.compile(
    r"context[ _](length|window|size|limit)|maximum context|too many tokens|prompt is too long"
    r"|input is too long|maximum number of tokens allowed",
    re.I,
)
_OUT_OF_CREDIT = re.compile(r"credit balance is too low|insufficient (balance|credits)", re.I)
_POLICY = re.compile(r"usage polic|safety system|content management policy", re.I)


def kind_of(status: int | None, error: Mapping[str, Any]) -> ProviderErrorKind:
    """The kind of a failure, by its status and by the object that tells of it.

    Known are the words of OpenAI, OpenRouter, Anthropic, and servers that speak as they do.
    """
    metadata = _object(error.get("metadata"))
    words = [metadata.get("error_type"), *map(error.get, ("error_type", "code", "type"))]
    for word in words:
        kind = _EXACT.get(word) if isinstance(word, str) else None
        # One request that is over the limit of a minute (Groq's 413) is too large at any time.
        if kind is not None and (status, kind) != (413, _Kind.RATE_LIMIT):
            return kind
    if status is None and any(isinstance(w, str) and w in _AT_FAULT for w in words):
        status = 400
    if status == 403 and ("reasons" in metadata or "flagged_input" in metadata):
        return _Kind.MODERATION
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status is not None and 400 <= status < 500:
        return _of_fault(" ".join([*map(str, words), *sentences(error)]))
    return _Kind.OVERLOADED


def _of_fault(said: str) -> ProviderErrorKind:
    if _CONTEXT_LENGTH.search(said):
        return _Kind.CONTEXT_LENGTH
    if _OUT_OF_CREDIT.search(said):
        return _Kind.CREDIT
    return _Kind.MODERATION if _POLICY.search(said) else _Kind.INVALID_REQUEST


def sentences(error: Mapping[str, Any]) -> list[str]:
    """What a service says of a failure in words: its own, and those it quotes of another."""
    metadata = _object(error.get("metadata"))
    raw = metadata.get("raw")
    quoted = _parsed(raw)
    if isinstance(quoted, Mapping):
        inner = quoted.get("error", quoted)
        raw = inner.get("message") if isinstance(inner, Mapping) else inner
    found = [error.get("message"), metadata.get("provider_name"), raw]
    # A page says nothing that is worth a line.
    return [s for s in found if isinstance(s, str) and s and not s.lstrip().startswith("<")]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _parsed(raw: Any) -> Any:
    """An answer that is quoted in another: an object, or its JSON text."""
    if not isinstance(raw, str) or len(raw) > _MAX_RAW_CHARS:
        return raw
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return value[0] if isinstance(value, list) and value else value


# When to ask again

_AMOUNT = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s?"
_UNIT = r"(ms|milliseconds?|s|sec|seconds?|m|min|minutes?|h|hours?)(?![a-z])"
_PARTS = re.compile(_AMOUNT + _UNIT, re.I)
_WORDS = re.compile(
    rf"(?:again|retry|wait)\s+(?:in\s+|after\s+|for\s+)?((?:{_AMOUNT}{_UNIT}[\s,]*){{1,4}})", re.I
)
_NUMBER = re.compile(r"[0-9]{1,17}(?:\.[0-9]{1,9})?", re.ASCII)


def retry_hint(
    headers: Mapping[str, str],
    error: Mapping[str, Any],
    *,
    limited: bool = True,
    now: datetime | None = None,
) -> float | None:
    """The seconds after which a service says it can be asked again, if it says so anywhere.

    Looked for in this order: the headers `retry-after-ms` and `Retry-After` (seconds, or a date:
    RFC 9110, 10.2.3); the same in OpenRouter's `error.metadata.headers`; its
    `metadata.retry_after_seconds` and `retry_after`; Google's RetryInfo, also where it is quoted
    in `metadata.raw`; the words "try again in 1m3s"; at last the moment at which a limit that
    is used up begins anew (`X-RateLimit-Reset`, `anthropic-ratelimit-…-reset`). What is negative,
    no number, or beyond `MAX_HINT_SECONDS` is passed over.

    :param headers: of the answer.
    :param error: the object that tells of the failure; may be empty.
    :param limited: whether a limit is the reason; else when one begins anew says nothing.
    :param now: the time that dates are compared with, with its zone.
    """
    now = now or datetime.now(UTC)
    metadata = _object(error.get("metadata"))
    quoted = {k: str(v) for k, v in _object(metadata.get("headers")).items() if isinstance(k, str)}
    places = (_lower(headers), _lower(quoted))
    resets = (_reset(place, now) for place in places if limited)
    for hint in itertools.chain(_hints(places, error, now), resets):
        if hint is not None and 0 <= hint <= MAX_HINT_SECONDS:
            return hint
    return None


def _hints(
    places: Sequence[Mapping[str, str]], error: Mapping[str, Any], now: datetime
) -> Iterator[float | None]:
    metadata = _object(error.get("metadata"))
    for headers in places:
        milliseconds = _number(headers.get("retry-after-ms"))
        yield None if milliseconds is None else milliseconds / 1000
        yield _number(headers.get("retry-after"))
        yield _until_date(headers.get("retry-after"), now)
    for told in (metadata, error):
        for name in ("retry_after_seconds", "retry_after"):
            yield _number(told.get(name))
    raw = _parsed(metadata.get("raw"))
    for told in (error, raw):
        yield _retry_delay(told)
    for sentence in sentences(error):
        if found := _WORDS.search(sentence[:4096]):
            yield _length(found[1])


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value.strip() for name, value in headers.items()}


def _number(value: Any) -> float | None:
    """A number, also as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if -1e18 < value < 1e18 else None
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return None


def _until_date(value: str | None, now: datetime) -> float | None:
    """The seconds until a date, as HTTP (RFC 9110) or as RFC 3339 writes it; 0 when it is past."""
    if not value:
        return None
    try:
        when = (
            datetime.fromisoformat(value) if value[:4].isdigit() else parsedate_to_datetime(value)
        )
        zoned = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max(0.0, (zoned - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def _length(text: Any) -> float | None:
    """The seconds of `1.5s`, `20ms`, `1m3s` or `6 minutes`."""
    parts = _PARTS.findall(text[:128]) if isinstance(text, str) else []
    return math.fsum(float(number) * _seconds_of(unit) for number, unit in parts) if parts else None


def _seconds_of(unit: str) -> float:
    unit = unit.lower()
    if unit.startswith(("ms", "milli")):
        return 0.001
    return {"s": 1.0, "m": 60.0, "h": 3600.0}[unit[0]]


def _retry_delay(told: Any) -> float | None:
    """Google's `retryDelay` (google.rpc.RetryInfo), in an error's details."""
    inner = _object(_object(told).get("error", told))
    details = inner.get("details")
    for detail in details[:32] if isinstance(details, list) else []:
        if (found := _length(_object(detail).get("retryDelay"))) is not None:
            return found
    return None


def _reset(headers: Mapping[str, str], now: datetime) -> float | None:
    """The seconds until the last of the limits that are used up begins anew."""
    found = []
    for name, value in headers.items():
        if "ratelimit" not in name or "reset" not in name:
            continue
        if headers.get(name.replace("reset", "remaining"), "0") not in ("0", "0.0"):
            continue
        found.append(_until_moment(value, now))
    known = [seconds for seconds in found if seconds is not None and seconds <= MAX_HINT_SECONDS]
    return max(known, default=None)


def _until_moment(value: str, now: datetime) -> float | None:
    """The seconds until a moment: milliseconds or seconds since 1970, a date, or from now on."""
    number = _number(value)
    if number is None:
        return _length(value) if _PARTS.match(value) else _until_date(value, now)
    if number > 1e9:
        return max(0.0, number / (1000 if number > 1e11 else 1) - now.timestamp())
    return number


# What may be written in a log

_KEY = re.compile(r"\b(?:(?:sk|gsk|xai|key)[-_]|AIza|Bearer\s)[\w\-.*]{12,}", re.ASCII)


def cleaned(text: str, secrets: Sequence[str], messages: Sequence[Message] = ()) -> str:
    """`text` for the operator's log: no secret, nothing that was said, one line, not long."""
    said = [text for message in messages for text in _said(message)]
    hidden = [*secrets, *(text for text in said if len(text) >= 4)]
    for secret in sorted(hidden, key=len, reverse=True):
        text = text.replace(secret, "[removed]")
    # Keys of others too: a router names the key of the service behind it.
    text = _KEY.sub("[removed]", text)
    text = _without_quotes(text[:MAX_DETAIL_CHARS], said)
    return "".join(char if char.isprintable() else " " for char in text)


def _said(message: Message) -> Iterator[str]:
    """What a message holds that no log may."""
    yield message.content
    for part in message.parts or ():
        if isinstance(image := part.get("image_url"), dict):
            yield str(image.get("url", ""))
    for call in message.tool_calls or ():
        if isinstance(function := call.get("function"), dict):
            yield str(function.get("arguments", ""))


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
