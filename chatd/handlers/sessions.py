"""Sessions: a conversation begins."""

from __future__ import annotations

from chatd.domain import Session, canonical_id, new_id
from chatd.errors import (
    InvalidApiKey,
    NotFound,
    OriginNotAllowed,
    StorageUnavailable,
)
from chatd.handlers.base import ApiHandler, Operation, Route


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
        session = Session(id=new_id(), chatbot_id=chatbot.id, channel="widget")
        await self.services.storage.create_session(session)
        self.answer({"session_id": session.id})


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
        WidgetSessionHandler,
        {
            "POST": Operation(
                summary="Begin a widget's session",
                description="Begins a conversation from a page of one of the chatbot's origins. "
                "Whoever has the session's id can go on with it, so keep it to the visitor.",
                auth="none",
                request="widget_session_request",
                response="session_answer",
                errors=(OriginNotAllowed, NotFound, StorageUnavailable),
            )
        },
        tag="Widget",
    ),
]
