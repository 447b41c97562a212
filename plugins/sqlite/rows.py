"""Rows of the file and what they mean. Times are seconds since 1970."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import chatd

CHATBOT_COLUMNS = "id, name, model_name, api_key, settings, created_at, updated_at"
SESSION_COLUMNS = "session_id, chatbot_id, channel, user_id, metadata, created_at"
TURN_COLUMNS = (
    "t.turn_id, t.session_id, s.chatbot_id, t.status, t.label, c.content, t.model, t.provider,"
    " t.finish_reason, t.error_code, t.input_tokens, t.output_tokens, t.cached_tokens,"
    " t.reasoning_tokens, t.cost_usd, t.attempts, t.rating, t.comment, t.started_at, t.finished_at,"
    " t.history_truncated, t.run, t.side"
)
TURN_TABLES = (
    " FROM turns t JOIN sessions s ON s.session_id = t.session_id"
    " LEFT JOIN conversations c ON c.id = t.reply_id"
)
KEY_SCHEME = "sha256:"


def utc(seconds: float) -> datetime:
    """The time of seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)


def time_of(seconds: float | None) -> datetime | None:
    """The time of seconds since 1970, where there is one."""
    return None if seconds is None else utc(seconds)


def seconds_of(time: datetime | None) -> float | None:
    """The seconds since 1970 of a time, where there is one."""
    return None if time is None else time.timestamp()


def settings_json(chatbot: chatd.Chatbot) -> str:
    """A chatbot's settings as they are stored."""
    return json.dumps(chatbot.settings.to_json(), ensure_ascii=False)


def chatbot_of(row: Any) -> chatd.Chatbot:
    """A chatbot of `CHATBOT_COLUMNS`."""
    id, name, model, api_key, settings, created_at, updated_at = row
    return chatd.Chatbot(
        id=id,
        name=name,
        model=model,
        api_key_hash=bytes.fromhex(api_key.removeprefix(KEY_SCHEME)),
        settings=chatd.ChatbotSettings.from_json(json.loads(settings)),
        created_at=time_of(created_at),
        updated_at=time_of(updated_at),
    )


def session_of(row: Any) -> chatd.Session:
    """A session of `SESSION_COLUMNS`."""
    id, chatbot_id, channel, user_id, metadata, created_at = row
    return chatd.Session(
        id, chatbot_id, channel, user_id, json.loads(metadata), time_of(created_at)
    )


def turn_of(row: Any) -> chatd.TurnRecord:
    """A turn of `TURN_COLUMNS`."""
    id, session, chatbot, status, label, reply, model, provider, finish_reason, error_code = row[
        :10
    ]
    attempts, rating, comment, started_at, finished_at, history_truncated, run, side = row[15:]
    return chatd.TurnRecord(
        id=id,
        session_id=session,
        chatbot_id=chatbot,
        status=chatd.TurnStatus(status),
        label=label,
        reply=reply,
        model=model,
        provider=provider,
        finish_reason=finish_reason,
        error_code=error_code,
        usage=chatd.Usage(*row[10:15]),
        attempts=json.loads(attempts),
        rating=rating,
        comment=comment,
        started_at=time_of(started_at),
        finished_at=time_of(finished_at),
        history_truncated=bool(history_truncated),
        run=run,
        side=side,
    )
