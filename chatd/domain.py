"""The words everyone uses: chatbots, sessions, messages, turns and what they cost."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal, Self

CHARS_PER_TOKEN = 4
"""Characters that make a token, as an estimate, until a provider says better."""

MESSAGE_OVERHEAD_CHARS = 4 * CHARS_PER_TOKEN
"""What a message costs beside its text: role and separators, about four tokens in chat formats."""

IMAGE_CHARS = 1000 * CHARS_PER_TOKEN
"""What an image costs; models count some hundred to some thousand tokens for one."""

KEY_PREFIX = "ck_"
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)

Role = Literal["system", "developer", "user", "assistant", "tool"]
Channel = Literal["api", "widget"]
OnDisconnect = Literal["finish", "stop"]
ThemeMode = Literal["light", "dark", "auto"]


def matches(pattern: str, text: str) -> bool:
    """Whether `text` fits a pattern, in which `*` is any text and `?` any one character."""
    return _compiled(pattern).fullmatch(text) is not None


@lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)


_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_RATE = re.compile(r"([0-9]+)/(?:([0-9]+) ?)?(second|minute|hour|day)s?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rate:
    """So many in so many seconds."""

    count: int
    seconds: int

    def __str__(self) -> str:
        name, unit = next(
            (name, unit) for name, unit in reversed(_UNITS.items()) if self.seconds % unit == 0
        )
        times = self.seconds // unit
        return f"{self.count} in {f'{times} {name}s' if times > 1 else f'a {name}'}"


@lru_cache(1024)
def rates(text: str) -> tuple[Rate, ...]:
    """The rates of a limit like `20/minute, 200/hour`; none of `none`."""
    return tuple(
        Rate(int(count), int(times or 1) * _UNITS[unit])
        for count, times, unit in _RATE.findall(text)
    )


_unused: deque[bytes] = deque()
os.register_at_fork(after_in_child=_unused.clear)


def random_bytes() -> bytes:
    """16 random bytes, for what is made for each turn and must be unique, in no process twice.

    The system is asked for many at once: each time that gives another thread its turn.
    """
    try:
        # From one end and as a whole: two threads do not get the same.
        return _unused.pop()
    except IndexError:
        many = os.urandom(4096)
        _unused.extend(many[place : place + 16] for place in range(16, len(many), 16))
        return many[:16]


def new_id() -> str:
    """A random UUID (version 4, 122 random bits) in canonical form."""
    # As `uuid.uuid4` makes it, at half the cost.
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def new_turn_id() -> str:
    """A UUID of version 7 (RFC 9562): the time in milliseconds, and 74 random bits.

    Turns that begin together lie together in an index, so that storage writes fewer pages.
    """
    digits = int(time.time() * 1000).to_bytes(6).hex() + random_bytes().hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-7{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def canonical_id(text: str) -> str | None:
    """The canonical form of a UUID (upper case folded), or None when it is written any other way."""
    folded = text.lower() if text.isascii() else text
    return folded if _UUID.fullmatch(folded) else None


def new_api_key() -> str:
    """A random API key of 256 bits, shown once and then kept only as `hash_api_key` of it."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_api_key(api_key: str) -> bytes:
    """The SHA-256 digest (32 bytes) under which a key is stored.

    No salt and no slow hash: a key is random, not a password that could be guessed.
    """
    return hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class ChatbotSettings:
    """What an operator sets for one chatbot. `None` means the server's or the provider's default."""

    system_prompt: str | None = None
    context_tokens: int = 8000
    """The most tokens of system prompt, history and new messages that a model is given."""
    max_output_tokens: int | None = None
    temperature: float | None = None
    allowed_origins: tuple[str, ...] | None = None
    """Origins whose pages may talk to this chatbot; `None` is the server's list."""
    on_disconnect: OnDisconnect = "finish"
    """Whether a turn goes on when its last reader goes away."""
    allow_tools: bool = True
    """Whether a client with the key may let the model call tools."""
    allow_images: bool = True
    """Whether a client with the key may show the model images."""
    provider_options: Mapping[str, Mapping[str, Any]] | None = None
    """What kinds of provider are told beside the question, by the name that each is offered under."""
    greeting: str | None = None
    """What the widget says first; no model is asked for it."""
    suggestions: tuple[str, ...] = ()
    """Questions that the widget offers before the first one is asked."""
    theme: ThemeMode | None = None
    accent: str | None = None
    """The widget's colour, like `#0a7d5c`."""
    language: str | None = None
    """The widget's language, a BCP 47 tag like `de` or `pt-BR`."""
    require_identity: bool = False
    """Whether the widget's visitors must prove who they are, with a token that the site signs."""
    identity_secrets: tuple[str, ...] = field(default=(), repr=False)
    """What such tokens are signed with: the newest first, and maybe the one before it."""
    limits: Mapping[str, str] | None = None
    """The limits that differ from the server's, by name, like `{"turns_per_ip": "5/minute"}`."""
    daily_budget_usd: float | Literal["none"] | None = None
    """What all turns of a day in UTC may cost together."""
    turn_reserve_usd: float | None = None
    """What a turn is taken to cost until that is known."""
    retention_days: int | None = None
    """After how many days without anything new a session is erased; `None` keeps it for ever."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_json` wrote; names it does not know (a newer version's) are left out."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**(known | lists))

    def to_json(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}


@dataclass(frozen=True, slots=True)
class Chatbot:
    """A configured bot of one tenant; `id` is `assistant_id` and `chatbot_id` on the wire."""

    id: str
    name: str
    model: str
    api_key_hash: bytes = field(repr=False)
    settings: ChatbotSettings = ChatbotSettings()
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def owns_key(self, api_key: str) -> bool:
        """Whether `api_key` is this chatbot's, compared in constant time."""
        return hmac.compare_digest(self.api_key_hash, hash_api_key(api_key))


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation with a chatbot.

    A widget's session is opened by its id alone, so only sessions of the channel `widget` are;
    those that an API client made need the key. `None` is a session older than this distinction.
    """

    id: str
    chatbot_id: str
    channel: Channel | None = None
    user_id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None


@dataclass(slots=True)
class Message:
    """Something said, as the model is given it; nobody changes one.

    Not frozen: each message of the history is made anew for each turn, at four times the cost.

    `content` is the text, and all that is stored. `parts` is the whole of a message that is more
    than text, `tool_calls` are those of an assistant and `tool_call_id` names the one that a
    tool's message answers, all in OpenAI's terms.
    """

    role: Role
    content: str
    parts: Sequence[Mapping[str, Any]] | None = None
    tool_calls: Sequence[Mapping[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def cost_chars(self) -> int:
        """What the message takes of a context budget, in characters."""
        if self.parts is None and self.tool_calls is None:
            return len(self.content) + MESSAGE_OVERHEAD_CHARS
        images = sum(1 for part in self.parts or () if part.get("type") != "text")
        calls = len(json.dumps(self.tool_calls)) if self.tool_calls else 0
        return len(self.content) + images * IMAGE_CHARS + calls + MESSAGE_OVERHEAD_CHARS

    @property
    def whole(self) -> str | Sequence[Mapping[str, Any]]:
        """The text, or the parts; their text is `content` when that was changed since."""
        if self.parts is None:
            return self.content
        if self.content == text_of(self.parts):
            return self.parts
        others = [part for part in self.parts if part.get("type") != "text"]
        return [{"type": "text", "text": self.content}, *others]


def text_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """The text of a message's parts; `[image]` when there is none."""
    texts = [str(part.get("text", "")) for part in parts if part.get("type") == "text"]
    return "\n".join(texts) if any(texts) else "[image]"


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A row of `conversations`; `id` grows within a session and is its order."""

    id: int
    role: str
    content: str
    timestamp: datetime
    turn_id: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn took, as the provider reports it; `None` is unknown and is not 0."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost_usd: float | None = None


class TurnStatus(StrEnum):
    """Where a turn stands. All but `RUNNING` are ends, and a turn reaches one of them once."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
