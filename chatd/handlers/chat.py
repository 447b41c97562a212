"""Chat: a message goes in, an answer comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatd.answering import TurnResult
from chatd.domain import Message, canonical_id
from chatd.errors import (
    Fault,
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
from chatd.handlers.base import ApiHandler, Operation, Route

_TURN_ERRORS = (
    NotFound,
    TurnRefused,
    TurnInProgress,
    RateLimited,
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


def _outcome(result: TurnResult) -> dict[str, Any]:
    """What both endpoints tell of a turn. Raises the error of one without an answer."""
    if result.error is not None:
        raise result.error
    return {
        "response": result.reply,
        "turn_id": result.turn_id,
        "finish_reason": result.finish_reason,
        "history_truncated": result.history_truncated,
        "stored": result.stored,
    }


class ChatHandler(ApiHandler):
    """`POST /api/chat`."""

    async def post(self) -> None:
        body = self.body()
        assistant_id = canonical_id(body["assistant_id"]) or ""
        chatbot = await self.services.access.client(assistant_id, self.api_key(body))
        self.serve_chatbot(chatbot, check_origin=False)
        turn = await self.services.turns.start(
            chatbot,
            canonical_id(body["session_id"]) or "",
            new_messages(body["messages"]),
            label=body["type"],
        )
        result = await turn.result()
        outcome = _outcome(result)
        outcome["model"] = result.model
        outcome["usage"] = {
            "input_tokens": result.usage.input_tokens,
            "output_tokens": result.usage.output_tokens,
            "cost_usd": result.usage.cost_usd,
        }
        self.answer(outcome)


class WidgetChatHandler(ApiHandler):
    """`POST /api/chat/widget`. What it costs and who answers is not the visitor's to know."""

    async def post(self) -> None:
        body = self.body()
        session_id = canonical_id(body["session_id"]) or ""
        chatbot = await self.services.access.widget_session(session_id)
        self.serve_chatbot(chatbot, check_origin=True)
        turn = await self.services.turns.start(
            chatbot, session_id, [Message("user", body["message"])], label="widget"
        )
        self.answer(_outcome(await turn.result()))


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
                errors=(OriginNotAllowed, *_TURN_ERRORS),
            )
        },
        tag="Widget",
    ),
]
