"""Turns: what became of one, its events, its end, and what people think of it."""

from __future__ import annotations

from typing import Any

from chatd.domain import TurnStatus, canonical_id
from chatd.errors import (
    IdentityRequired,
    InvalidApiKey,
    NotFound,
    OriginNotAllowed,
    RequestError,
    SessionRequired,
    StorageUnavailable,
)
from chatd.handlers.base import JSON, Auth, Operation, Route
from chatd.handlers.streaming import LAST_EVENT_ID, USER_TOKEN, TurnHandler, told_usage
from chatd.reply import TurnResult
from chatd.storage import TurnRecord


class OneTurnHandler(TurnHandler):
    """`GET …/turns/{turn_id}`."""

    async def get(self, turn_id: str) -> None:
        self.answer(shown(await self.record(turn_id), private=self.private))

    async def record(self, turn_id: str) -> TurnRecord:
        """The turn, if the caller may see it. Raises `RequestError`."""
        chatbot, session_id = await self.caller()
        return await self.services.turns.get(chatbot, _id(turn_id), session_id=session_id)


class EventsHandler(TurnHandler):
    """`GET …/turns/{turn_id}/events`."""

    async def get(self, turn_id: str) -> None:
        after = self.last_event_id()
        chatbot, session_id = await self.caller()
        reply = await self.services.turns.follow(chatbot, _id(turn_id), session_id=session_id)
        await self.events(reply, after=after, private=self.private)


class StopHandler(TurnHandler):
    """`POST …/turns/{turn_id}/stop`."""

    async def post(self, turn_id: str) -> None:
        chatbot, session_id = await self.caller()
        turn_id = _id(turn_id)
        self.require_acceptable(JSON)
        result = await self.services.turns.stop(chatbot, turn_id, session_id=session_id)
        self.answer(
            {
                "turn_id": turn_id,
                "status": result.status if result else TurnStatus.RUNNING,
                "response": result.reply if result else None,
                "stored": result is not None and result.stored,
            }
        )


class FeedbackHandler(OneTurnHandler):
    """`POST …/turns/{turn_id}/feedback`."""

    async def post(self, turn_id: str) -> None:
        record = await self.record(turn_id)
        body = self.body()
        rating, comment = body["rating"], body.get("comment")
        storage = self.services.storage
        if not await storage.rate_turn(record.id, record.session_id, rating, comment):
            raise NotFound("There is no turn with this id.")
        self.answer({"turn_id": record.id, "rating": rating, "comment": comment})


def _id(text: str) -> str:
    """The canonical form of an id in a path. Raises `NotFound` for what is none."""
    if (id := canonical_id(text)) is None:
        raise NotFound("There is no turn with this id.")
    return id


def shown(record: TurnRecord, *, private: bool) -> dict[str, Any]:
    """A turn as a client reads it: how it ended is told as its events and its answer tell it."""
    ended = None if record.status is TurnStatus.RUNNING else TurnResult.of(record)
    told: dict[str, Any] = {
        "turn_id": record.id,
        "session_id": record.session_id,
        "status": record.status,
        "type": record.label,
        "response": record.reply,
        "finish_reason": ended.finish_reason if ended else None,
        "error": ended.error.code if ended and ended.error else None,
        "history_truncated": record.history_truncated,
        "rating": record.rating,
        "comment": record.comment,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
    }
    if private:
        told["model"] = record.model
        told["usage"] = told_usage(record.usage)
        told["side"] = record.side
        told["attempts"] = [
            {
                **{name: attempt.get(name) for name in ("provider", "model", "error", "ms")},
                "lost": bool(attempt.get("lost")),
            }
            for attempt in record.attempts
        ]
    return told


def _routes(prefix: str, tag: str, auth: Auth, *refused: type[RequestError]) -> list[Route]:
    """The same endpoints for clients, who have a key, and for widgets, which have a session."""
    errors = (*refused, NotFound, StorageUnavailable)
    read = (USER_TOKEN,) if auth == "widget" else ()
    turn = Operation(
        summary="What became of a turn",
        description="Its state, and its reply once it has ended.",
        auth=auth,
        response="turn",
        parameters=read,
        errors=errors,
    )
    events = Operation(
        summary="A turn's events",
        description="The same stream that chatting gives with `stream`, from its start or from after "
        "the event that `Last-Event-ID` names: while the turn runs, after it ended, and after the "
        "server was started again.",
        auth=auth,
        events=True,
        parameters=(LAST_EVENT_ID, *read),
        errors=errors,
    )
    stop = Operation(
        summary="Stop a turn",
        description="Ends the answer; what was said so far is kept. `status` is `running` when "
        "another process runs the turn and cannot be told at once; it ends it within ten seconds.",
        auth=auth,
        response="stopped_turn",
        parameters=read,
        errors=errors,
    )
    feedback = Operation(
        summary="Rate an answer",
        description="Replaces what was said of it before; a `rating` of null takes it back.",
        auth=auth,
        request="feedback",
        response="feedback_answer",
        parameters=read,
        errors=errors,
    )
    path = f"{prefix}/turns/{{turn_id}}"
    return [
        Route(path, OneTurnHandler, {"GET": turn}, tag),
        Route(f"{path}/events", EventsHandler, {"GET": events}, tag),
        Route(f"{path}/stop", StopHandler, {"POST": stop}, tag),
        Route(f"{path}/feedback", FeedbackHandler, {"POST": feedback}, tag),
    ]


ROUTES = [
    *_routes("/api/chat", "REST", "api_key", InvalidApiKey),
    *_routes(
        "/api/chat/widget", "Widget", "widget", SessionRequired, OriginNotAllowed, IdentityRequired
    ),
]
