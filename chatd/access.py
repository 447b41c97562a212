"""Who may: API keys, widget sessions and origins, over a small cache of chatbots."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from chatd.domain import Channel, Chatbot, hash_api_key
from chatd.errors import (
    IdentityRequired,
    InvalidApiKey,
    NotFound,
    OriginNotAllowed,
    StorageUnavailable,
)
from chatd.identity import subject
from chatd.origins import canonical_origin
from chatd.storage import Storage

K = TypeVar("K")
V = TypeVar("V")

_LABELS = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)

CACHE_ENTRIES = 10_000
"""Chatbots and sessions that are kept in memory, each; the least recently used go first."""


class _Cache(Generic[K, V]):
    """What was found, for a while. What was not found is looked up again each time."""

    def __init__(self, look_up: Callable[[K], Awaitable[V | None]], seconds: float) -> None:
        self._look_up = look_up
        self._seconds = seconds
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._forgotten = 0

    async def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is not None and entry[0] > time.monotonic():
            self._entries.move_to_end(key)
            return entry[1]
        asked, forgotten = time.monotonic(), self._forgotten
        found = await self._look_up(key)
        if forgotten != self._forgotten:
            return found  # it may have changed since it was read
        if found is None:
            self._entries.pop(key, None)
            return None
        # Counted from the asking, so that a change shows within `seconds` of being made.
        self._entries[key] = (asked + self._seconds, found)
        if len(self._entries) > CACHE_ENTRIES:
            self._entries.popitem(last=False)
        return found

    def forget(self, of: Callable[[K, V], bool] | None = None) -> None:
        """Looks up again what `of` is true of; without it everything."""
        self._forgotten += 1
        for key in [k for k, (_, found) in self._entries.items() if of is None or of(k, found)]:
            del self._entries[key]


NO_SESSION = "There is no widget session with this id."


@dataclass(frozen=True, slots=True)
class WidgetSession:
    """Whose a widget's session is; `user_id` is the visitor's that it was begun for."""

    chatbot: Chatbot
    user_id: str | None


class Access:
    """Decides who may talk to which chatbot.

    :param default_origins: for chatbots that set none of their own.
    :param public_url: this server's own address, whose pages are always allowed.
    :param cache_seconds: how long a changed chatbot may go on as it was.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        default_origins: Sequence[str],
        public_url: str | None,
        cache_seconds: float,
    ) -> None:
        self._chatbots = _Cache(storage.get_chatbot, cache_seconds)
        self._by_key = _Cache(storage.get_chatbot_by_key, cache_seconds)
        self._storage = storage
        # A session's chatbot, channel and user never change, and a turn asks storage for it anyway.
        self._sessions = _Cache(self._session, 3600)
        self._origins = _Cache[None, frozenset[str]](
            lambda _: storage.allowed_origins(), cache_seconds
        )
        self._default = frozenset(default_origins)
        self._own = frozenset({_origin(public_url)} if public_url else ())

    def forget_chatbot(self, chatbot_id: str) -> None:
        """Looks a chatbot up again, since it was changed."""
        self._chatbots.forget(lambda id, _: id == chatbot_id)
        self._by_key.forget(lambda _, chatbot: chatbot.id == chatbot_id)
        self._origins.forget()

    def forget_session(self, session_id: str) -> None:
        """Looks a session up again, since it was erased."""
        self._sessions.forget(lambda id, _: id == session_id)

    def forget_chatbots(self) -> None:
        """Looks all chatbots up again."""
        self._chatbots.forget()
        self._by_key.forget()
        self._origins.forget()

    async def client(self, assistant_id: str, api_key: str | None) -> Chatbot:
        """The chatbot, for a tenant's client with its key. Raises `InvalidApiKey`."""
        if not api_key:
            raise InvalidApiKey
        chatbot = await self._chatbots.get(assistant_id)
        if chatbot is None or not chatbot.owns_key(api_key):
            raise InvalidApiKey
        return chatbot

    async def client_by_key(self, api_key: str | None) -> Chatbot:
        """The chatbot that an API key belongs to. Raises `InvalidApiKey`."""
        chatbot = await self._by_key.get(hash_api_key(api_key)) if api_key else None
        if chatbot is None:
            raise InvalidApiKey
        return chatbot

    async def chatbot(self, chatbot_id: str) -> Chatbot:
        """The chatbot, for a widget, which has no key. Raises `NotFound`."""
        chatbot = await self._chatbots.get(chatbot_id)
        if chatbot is None:
            raise NotFound("There is no chatbot with this id.")
        return chatbot

    async def widget_session(self, session_id: str) -> WidgetSession:
        """Whose a session is that its id alone opens. Raises `NotFound`.

        Ask `require_visitor` next: an id may have been left on a computer that others use.
        """
        session = await self._sessions.get(session_id)
        chatbot = await self._chatbots.get(session[0]) if session else None
        if session is None or session[1] == "api" or chatbot is None:
            raise NotFound(NO_SESSION)
        return WidgetSession(chatbot, session[2])

    async def _session(self, session_id: str) -> tuple[str, Channel | None, str | None] | None:
        """A session's chatbot, channel and user; the rest of it is not kept in memory."""
        session = await self._storage.get_session(session_id)
        return (session.chatbot_id, session.channel, session.user_id) if session else None

    def visitor(self, chatbot: Chatbot, token: str | None) -> str | None:
        """Who sits before a widget, by a token; None for who need not say and does not.

        Raises `IdentityRequired` for a token that is not good, and for none where one is required.
        Where the chatbot has no identity secret no token can be checked, and none counts.
        """
        settings = chatbot.settings
        if token and settings.identity_secrets:
            return subject(token, settings.identity_secrets)
        if settings.require_identity:
            raise IdentityRequired
        return None

    def require_visitor(self, session: WidgetSession, token: str | None) -> None:
        """Checks that a session is the visitor's who asks.

        Raises `IdentityRequired` as `visitor` does, and for no token where the session was begun
        for a visitor; `NotFound` for the session of another, or of nobody.
        """
        visitor = self.visitor(session.chatbot, token)
        if visitor == session.user_id or not session.chatbot.settings.identity_secrets:
            return
        if visitor is None:
            raise IdentityRequired
        raise NotFound(NO_SESSION)

    def allows_origin(self, origin: str, chatbot: Chatbot) -> bool:
        """Whether pages of `origin` may talk to `chatbot`."""
        own = chatbot.settings.allowed_origins
        return self._matches(origin, self._default if own is None else frozenset(own))

    def require_origin(self, origin: str | None, chatbot: Chatbot) -> None:
        """Raises `OriginNotAllowed` for a page of an origin that is not allowed.

        None is a client that names no origin. It is refused where the chatbot has a list of its
        own, unless that is open to all.
        """
        if origin is None:
            own = chatbot.settings.allowed_origins
            allowed = own is None or "*" in own
        else:
            allowed = self.allows_origin(origin, chatbot)
        if not allowed:
            raise OriginNotAllowed

    async def allows_origin_somewhere(self, origin: str) -> bool:
        """Whether pages of `origin` may talk to some chatbot: for requests that name none yet."""
        if self._matches(origin, self._default):
            return True
        try:
            return self._matches(origin, await self._origins.get(None) or frozenset())
        except StorageUnavailable:
            return False

    def _matches(self, origin: str, allowed: frozenset[str]) -> bool:
        # "null" is what sandboxed and local pages all send, so "*" does not mean it.
        return "*" not in origin and (
            origin in allowed
            or origin in self._own
            or ("*" in allowed and origin != "null")
            or any(_is_below(origin, pattern) for pattern in allowed if "://*." in pattern)
        )


def _is_below(origin: str, pattern: str) -> bool:
    """Whether an origin fits `https://*.example.com`: one label or more in the place of the `*`."""
    scheme, _, rest = pattern.partition("*")
    if not (origin.startswith(scheme) and origin.endswith(rest)):
        return False
    labels = origin[len(scheme) : len(origin) - len(rest)]
    return _LABELS.fullmatch(labels) is not None


def _origin(url: str) -> str:
    parts = urlsplit(url)
    origin = f"{parts.scheme}://{parts.netloc}".lower()
    try:
        return canonical_origin(origin)
    except ValueError:
        return origin
