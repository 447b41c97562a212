"""What a service over HTTP says of a failure: its kind, when to ask again, words fit for a log."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from chatd.domain import Message
from chatd.errors import ProviderErrorKind

MIN_QUOTE_CHARS = 12
"""As many characters in a row as were said are taken for a quotation in a provider's words."""

MAX_DETAIL_CHARS = 300
"""How much of a provider's words is kept."""

_Kind = ProviderErrorKind
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


def kind_of(status: int | None, words: str, metadata: Any) -> ProviderErrorKind:
    """The kind of an error by its status and by what is said of it."""
    if status in (400, 404, 413, 422):
        return _Kind.CONTEXT_LENGTH if _CONTEXT_LENGTH.search(words) else _Kind.INVALID_REQUEST
    if status == 403 and isinstance(metadata, dict) and "reasons" in metadata:
        return _Kind.MODERATION
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status is not None and 400 <= status < 500:
        return _Kind.INVALID_REQUEST
    return _Kind.OVERLOADED


def seconds_of(retry_after: str | None) -> float | None:
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


def cleaned(text: str, secrets: Sequence[str], messages: Sequence[Message] = ()) -> str:
    """`text` for the operator's log: no secret, nothing that was said, one line, not long."""
    said = [text for message in messages for text in _said(message)]
    hidden = [*secrets, *(text for text in said if len(text) >= 4)]
    for secret in sorted(hidden, key=len, reverse=True):
        text = text.replace(secret, "[removed]")
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
