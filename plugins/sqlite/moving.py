"""Sessions as they move between storages."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import apsw

import chatd

from .rows import SESSION_COLUMNS, seconds_of, session_of, turn_of, utc

TALLY = """
    SELECT m.messages, m.chars, t.comments, t.turns, t.ended, t.up, t.down, t.priced
    FROM sessions s,
        (SELECT count(*) AS messages, coalesce(sum(length(content)), 0) AS chars
         FROM conversations WHERE session_id = ?1) m,
        (SELECT coalesce(sum(length(comment)), 0) AS comments, count(*) AS turns,
             count(*) FILTER (WHERE status <> 'running') AS ended,
             count(*) FILTER (WHERE rating = 'up') AS up,
             count(*) FILTER (WHERE rating = 'down') AS down,
             count(cost_usd) AS priced
         FROM turns WHERE session_id = ?1) t
    WHERE s.session_id = ?1
"""


_EXPORTED = (
    "turn_id, seq, status, label, idempotency_key, request_hash, rerunnable, run, reply_id, model,"
    " provider, finish_reason, error_code, input_tokens, output_tokens, cached_tokens,"
    " reasoning_tokens, cost_usd, attempts, rating, comment, started_at, finished_at,"
    " history_truncated, side"
)


def export_session(db: apsw.Connection, session_id: str, place: int) -> chatd.SessionPart | None:
    """As `chatd.Storage.export_session`."""
    db.execute("BEGIN")  # so that a turn that ends meanwhile is seen whole or not at all
    try:
        return _export_session(db, session_id, place)
    finally:
        db.execute("COMMIT")


def _export_session(db: apsw.Connection, session_id: str, place: int) -> chatd.SessionPart | None:
    row = db.execute(
        f"SELECT {SESSION_COLUMNS} FROM sessions WHERE session_id = ?", (session_id,)
    ).fetchone()
    if row is None:
        return None
    session = session_of(row)
    messages: list[chatd.StoredMessage] = []
    left, more = chatd.PART_CHARS, False
    rows = db.execute(
        "SELECT id, role, content, timestamp, turn_id FROM conversations WHERE session_id = ?"
        " ORDER BY id LIMIT -1 OFFSET ?",
        (session_id, place),
    )
    for id, role, content, timestamp, turn_id in rows:
        left -= len(content) + chatd.PART_MESSAGE_CHARS
        if left < 0 and messages:
            more = True
            break
        messages.append(chatd.StoredMessage(id, role, content, utc(timestamp), turn_id))
    turns = []
    for turn_id in dict.fromkeys(m.turn_id for m in messages if m.turn_id is not None):
        found = db.execute(f"SELECT {_EXPORTED} FROM turns WHERE turn_id = ?", (turn_id,))
        turns += [_exported(values, session) for values in found]
    return chatd.SessionPart(session, place, messages, turns, more)


def _exported(row: Any, session: chatd.Session) -> chatd.ExportedTurn:
    id, seq, status, label, key, request_hash, rerunnable, run, reply_id, *rest = row
    model, provider, finish_reason, error_code = rest[:4]
    record = (id, session.id, session.chatbot_id, status, label, None)
    return chatd.ExportedTurn(
        turn=turn_of(
            (*record, model, provider, finish_reason, error_code, *rest[4:-1], run, rest[-1])
        ),
        seq=seq,
        rerunnable=bool(rerunnable),
        idempotency_key=key,
        request_hash=request_hash,
        reply_id=reply_id,
    )


def import_session(db: apsw.Connection, part: chatd.SessionPart) -> None:
    """As `chatd.Storage.import_session`, within the writer's transaction."""
    session = part.session
    if not db.execute("SELECT 1 FROM chatbots WHERE id = ?", (session.chatbot_id,)).fetchone():
        raise chatd.NotFound
    db.execute(
        f"INSERT INTO sessions ({SESSION_COLUMNS}) VALUES (?, ?, ?, ?, ?,"
        " coalesce(?, unixepoch('subsec'))) ON CONFLICT (session_id) DO NOTHING",
        (
            session.id,
            session.chatbot_id,
            session.channel,
            session.user_id,
            json.dumps(dict(session.metadata), ensure_ascii=False),
            seconds_of(session.created_at),
        ),
    )
    owner, held = db.execute(
        "SELECT chatbot_id, (SELECT count(*) FROM conversations WHERE session_id = ?1)"
        " FROM sessions WHERE session_id = ?1",
        (session.id,),
    ).get
    if clash := _clash(db, part, owner, held):
        raise chatd.ConflictError(f"session {session.id}: {clash}")
    for message in part.messages[held - part.place :]:
        db.execute(
            "INSERT INTO conversations (session_id, role, content, timestamp, turn_id)"
            " VALUES (?, ?, ?, ?, ?)",
            (
                session.id,
                message.role,
                message.content,
                message.timestamp.timestamp(),
                message.turn_id,
            ),
        )
    here = db.execute(
        "SELECT id FROM conversations WHERE session_id = ? ORDER BY id LIMIT ? OFFSET ?",
        (session.id, len(part.messages), part.place),
    )
    ids = {message.id: id for message, (id,) in zip(part.messages, here, strict=True)}
    for turn in part.turns:
        db.execute(
            "UPDATE turns SET idempotency_key = NULL"
            " WHERE session_id = ? AND idempotency_key = ? AND turn_id <> ?",
            (session.id, turn.idempotency_key, turn.turn.id),
        )
    for turn in part.turns:
        _import_turn(db, turn, None if turn.reply_id is None else ids.get(turn.reply_id))


def _clash(db: apsw.Connection, part: chatd.SessionPart, owner: str, held: int) -> str | None:
    """Why a part cannot be stored, if it cannot."""
    if owner != part.session.chatbot_id:
        return "it belongs to another chatbot"
    if held < part.place:
        return "messages before this part are missing"
    for turn in part.turns:
        values = (turn.turn.id, part.session.id, turn.seq, turn.turn.run)
        if db.execute(
            "SELECT 1 FROM turns WHERE session_id = ?2 AND seq = ?3"
            " AND (turn_id <> ?1 OR run > ?4)",
            values,
        ).fetchone():
            return "it went on by itself"
        if db.execute(
            "SELECT 1 FROM turns WHERE turn_id = ?1 AND (session_id <> ?2 OR seq <> ?3)", values[:3]
        ).fetchone():
            return "a turn of it belongs to another session"
    return None


def _import_turn(db: apsw.Connection, exported: chatd.ExportedTurn, reply_id: int | None) -> None:
    turn, usage = exported.turn, exported.turn.usage
    lost = turn.status is chatd.TurnStatus.RUNNING
    values: dict[str, Any] = {
        "turn_id": turn.id,
        "session_id": turn.session_id,
        "seq": exported.seq,
        "status": chatd.TurnStatus.INTERRUPTED if lost else turn.status,
        "label": turn.label,
        "idempotency_key": exported.idempotency_key,
        "request_hash": exported.request_hash,
        "lease_until": 0,
        "rerunnable": exported.rerunnable,
        "run": turn.run,
        "reply_id": reply_id,
        "model": turn.model,
        "provider": turn.provider,
        "finish_reason": turn.finish_reason,
        "error_code": "process_lost" if lost else turn.error_code,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost_usd": usage.cost_usd,
        "attempts": json.dumps(list(turn.attempts)),
        "rating": turn.rating,
        "comment": turn.comment,
        "started_at": seconds_of(turn.started_at or datetime.now(UTC)),
        "finished_at": seconds_of(turn.finished_at),
        "history_truncated": turn.history_truncated,
        "side": turn.side,
    }
    updates = {name: f"excluded.{name}" for name in values if name not in _KEPT}
    updates["reply_id"] = "coalesce(excluded.reply_id, reply_id)"
    db.execute(
        f"INSERT INTO turns ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})"
        " ON CONFLICT (turn_id) DO UPDATE SET "
        + ", ".join(f"{name} = {value}" for name, value in updates.items()),
        values,
    )


_KEPT = {"turn_id", "session_id", "seq", "lease_until"}
"""What an import of a turn that is here already leaves as it is."""
