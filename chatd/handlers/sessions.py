"""Sessions: a conversation begins."""

from __future__ import annotations

from chatd.domain import Session, canonical_id, new_id
from chatd.errors import (
    IdentityRequired,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    OriginNotAllowed,
    RateLimited,
    RequestError,
    SessionRequired,
    StorageUnavailable,
)
from chatd.handlers.base import ApiHandler, Auth, Operation, Parameter, Route
from chatd.handlers.streaming import USER_TOKEN, TurnHandler


class SessionHandler(ApiHandler):
    """`POST /api/chat/session`."""

    async def post(self) -> None:
        body = self.body()
        assistant_id = canonical_id(body["assistant_id"]) or ""
        chatbot = await self.services.access.client(assistant_id, self.api_key(body))
        self.serve_chatbot(chatbot, check_origin=False)
        session = Session(
            id=new_id(),
            chatbot_id=chatbot.id,
            channel="api",
            user_id=body.get("user_id"),
            metadata=body.get("metadata") or {},
        )
        try:
            await self.services.storage.create_session(session)
        except NotFound:
            # The chatbot was removed a moment ago, and its key with it.
            raise InvalidApiKey from None
        self.answer({"session_id": session.id})


class WidgetSessionHandler(ApiHandler):
    """`POST /api/chat/widget/session`."""

    async def post(self) -> None:
        body = self.body()
        chatbot = await self.services.access.chatbot(canonical_id(body["chatbot_id"]) or "")
        self.serve_chatbot(chatbot, check_origin=True)
        visitor = self.services.access.visitor(chatbot, body.get("user_token"))
        session = Session(new_id(), chatbot.id, "widget", user_id=visitor)
        async with self.admitted("sessions", ip=self.client_address(), visitor=visitor):
            await self.services.storage.create_session(session)
        self.answer({"session_id": session.id})


class MessagesHandler(TurnHandler):
    """`GET session/{session_id}/messages`, and `GET messages` for a widget."""

    async def get(self, session_id: str | None = None) -> None:
        chatbot, session = await self.caller_in(session_id)
        limit = self.whole_number("limit", DEFAULT_PAGE, most=MAX_PAGE)
        before = self.whole_number("before", None, most=2**63 - 1)
        assert limit is not None
        storage = self.services.storage
        page = await storage.list_messages(session, chatbot.id, limit=limit, before=before)
        self.answer(
            {
                "data": [
                    {
                        "id": str(message.id),
                        "role": message.role,
                        "content": message.content,
                        "timestamp": message.timestamp,
                        "turn_id": message.turn_id,
                    }
                    for message in page.data
                ],
                "has_more": page.has_more,
                "next_cursor": str(page.data[0].id) if page.has_more else None,
            }
        )

    def whole_number(self, name: str, default: int | None, *, most: int) -> int | None:
        """A number of the query, from 1 to `most`. Raises `InvalidRequest`."""
        text = self.get_query_argument(name, None)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 19 and 1 <= int(text) <= most):
            raise InvalidRequest(f"{name} in the address must be a whole number from 1 to {most}.")
        return int(text)


class OneSessionHandler(TurnHandler):
    """`DELETE session/{session_id}`, and `DELETE session` for a widget."""

    async def delete(self, session_id: str | None = None) -> None:
        chatbot, session = await self.caller_in(session_id)
        await self.services.turns.stop_in(chatbot, session)
        if not await self.services.storage.delete_session(session, chatbot.id):
            raise NotFound("This chatbot has no session with this id.")
        self.services.sharing.tell("erased", session=session)
        self.answer_nothing()


class WidgetOneSessionHandler(WidgetSessionHandler, OneSessionHandler):
    """Both on one path."""


class StreamHandler(TurnHandler):
    """`GET session/{session_id}/stream`, and `GET stream` for a widget."""

    async def get(self, session_id: str | None = None) -> None:
        chatbot, session = await self.caller_in(session_id)
        reply = await self.services.turns.running_in(chatbot, session)
        if reply is None:
            self.answer_nothing()
        else:
            await self.events(reply, private=self.private)


DEFAULT_PAGE = 50
MAX_PAGE = 200
_LIMIT = Parameter(
    "limit",
    "query",
    {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE},
    "The most messages to answer with.",
)
_BEFORE = Parameter(
    "before",
    "query",
    {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
    "Only messages before this one: a page's `next_cursor`.",
)


def _operations(auth: Auth, *refused: type[RequestError]) -> tuple[Operation, Operation, Operation]:
    """Reading, erasing and following a session: the same for clients and for widgets."""
    errors = (*refused, NotFound, StorageUnavailable)
    read = (USER_TOKEN,) if auth == "widget" else ()
    return (
        Operation(
            summary="What was said in a session",
            description="The newest page first, and within a page the oldest message first.",
            auth=auth,
            response="messages_page",
            parameters=(_LIMIT, _BEFORE, *read),
            errors=(InvalidRequest, *errors),
        ),
        Operation(
            summary="Erase a session",
            description="Removes the session and everything said in it. A running turn is stopped.",
            auth=auth,
            nothing="Erased.",
            parameters=read,
            errors=errors,
        ),
        Operation(
            summary="The events of the turn that runs now",
            description="From the turn's start.",
            auth=auth,
            events=True,
            nothing="No turn runs.",
            parameters=read,
            errors=errors,
        ),
    )


_MESSAGES, _ERASE, _STREAM = _operations("api_key", InvalidApiKey)
_OWN_MESSAGES, _ERASE_OWN, _OWN_STREAM = _operations(
    "widget", SessionRequired, OriginNotAllowed, IdentityRequired
)
_SESSION = "/api/chat/session/{session_id}"

ROUTES = [
    Route(
        "/api/chat/session",
        SessionHandler,
        {
            "POST": Operation(
                summary="Begin a session",
                description="Begins a conversation with a chatbot, for a client with its API key.",
                auth="api_key",
                request="session_request",
                response="session_answer",
                errors=(InvalidApiKey, StorageUnavailable),
            )
        },
        tag="REST",
    ),
    Route(
        "/api/chat/widget/session",
        WidgetOneSessionHandler,
        {
            "DELETE": _ERASE_OWN,
            "POST": Operation(
                summary="Begin a widget's session",
                description="Begins a conversation from a page of one of the chatbot's origins. "
                "Whoever has the session's id can go on with it, so keep it to the visitor.",
                auth="none",
                request="widget_session_request",
                response="session_answer",
                errors=(
                    OriginNotAllowed,
                    IdentityRequired,
                    NotFound,
                    RateLimited,
                    StorageUnavailable,
                ),
            ),
        },
        tag="Widget",
    ),
    Route(_SESSION, OneSessionHandler, {"DELETE": _ERASE}, tag="REST"),
    Route(f"{_SESSION}/messages", MessagesHandler, {"GET": _MESSAGES}, tag="REST"),
    Route(f"{_SESSION}/stream", StreamHandler, {"GET": _STREAM}, tag="REST"),
    Route("/api/chat/widget/messages", MessagesHandler, {"GET": _OWN_MESSAGES}, tag="Widget"),
    Route("/api/chat/widget/stream", StreamHandler, {"GET": _OWN_STREAM}, tag="Widget"),
]
