"""Chat: a message goes in, an answer comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatd.domain import Message, canonical_id
from chatd.errors import (
    BudgetExhausted,
    Fault,
    IdempotencyKeyReused,
    IdentityRequired,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    OriginNotAllowed,
    Overloaded,
    ProviderFailed,
    ProviderTimeout,
    RateLimited,
    ShuttingDown,
    StorageUnavailable,
    TurnInProgress,
    TurnRefused,
)
from chatd.handlers.base import Operation, Route
from chatd.handlers.streaming import IDEMPOTENCY_KEY, USER_TOKEN, TurnHandler, outcome

_TURN_ERRORS = (
    NotFound,
    IdempotencyKeyReused,
    TurnRefused,
    TurnInProgress,
    RateLimited,
    BudgetExhausted,
    ProviderFailed,
    ProviderTimeout,
    StorageUnavailable,
    Overloaded,
    ShuttingDown,
)


def new_messages(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """What is new of a list that may resend the conversation: the user's part at its end.

    Raises `InvalidRequest` when the list does not end in something a user says.
    """
    new: list[Message] = []
    for message in reversed(messages):
        if message["role"] == "assistant":
            break
        new.append(Message("user", message["content"]))
    if not new:
        raise InvalidRequest(
            "Nothing new is said: the last message must be the user's.",
            errors=[
                Fault(
                    f"/messages/{len(messages) - 1}/role", "must be the user's: nothing follows it"
                )
            ],
        )
    return new[::-1]


class ChatHandler(TurnHandler):
    """`POST /api/chat`."""

    async def post(self) -> None:
        body = self.body()
        assistant_id = canonical_id(body["assistant_id"]) or ""
        chatbot = await self.services.access.client(assistant_id, self.api_key(body))
        self.serve_chatbot(chatbot, check_origin=False)
        session_id = canonical_id(body["session_id"]) or ""
        messages = new_messages(body["messages"])
        await self.say(session_id, messages, body, label=body["type"], own={"key": ""})

    async def say(
        self,
        session_id: str,
        messages: Sequence[Message],
        body: dict[str, Any],
        *,
        label: str,
        own: Mapping[str, str | None],
        private: bool = True,
    ) -> None:
        """Runs a turn, and answers with its reply in the form that is asked for.

        :param own: whom it counts against, as in `Limits.ask`.
        """
        assert self.chatbot is not None
        stream = self.wants_events(body)
        key = self.idempotency_key()
        async with self.admitted("turns", **own):
            started = await self.services.turns.start(
                self.chatbot,
                session_id,
                messages,
                label=label,
                stream=stream,
                idempotency_key=key,
            )
        if stream:
            self.tell_replayed(started)
            await self.events(started.reply, private=private)
        else:
            result = await self.whole(started)
            self.answer({"response": result.reply, **outcome(result, private=private)})


class WidgetChatHandler(ChatHandler):
    """`POST /api/chat/widget`. What it costs and who answers is not the visitor's to know."""

    async def post(self) -> None:
        body = self.body()
        session_id = canonical_id(body["session_id"]) or ""
        session = await self.widget_session(session_id, body.get("user_token"))
        said = [Message("user", body["message"])]
        own = {"ip": self.client_address(), "session": session_id, "visitor": session.user_id}
        await self.say(session_id, said, body, label="widget", private=False, own=own)


ROUTES = [
    Route(
        "/api/chat",
        ChatHandler,
        {
            "POST": Operation(
                summary="Say something and get the answer",
                description="One turn of a session: the user's new messages are stored, the model "
                "is asked with the session's history, and its answer is stored and returned. "
                "The stored conversation is the truth, so it makes no difference whether a client "
                "sends the new message alone or the whole conversation again.",
                auth="api_key",
                request="chat_request",
                response="chat_answer",
                events=True,
                parameters=(IDEMPOTENCY_KEY,),
                errors=(InvalidApiKey, *_TURN_ERRORS),
            )
        },
        tag="REST",
    ),
    Route(
        "/api/chat/widget",
        WidgetChatHandler,
        {
            "POST": Operation(
                summary="Say something in a widget's session",
                auth="none",
                request="widget_chat_request",
                response="widget_chat_answer",
                events=True,
                parameters=(IDEMPOTENCY_KEY, USER_TOKEN),
                errors=(OriginNotAllowed, IdentityRequired, *_TURN_ERRORS),
            )
        },
        tag="Widget",
    ),
]
