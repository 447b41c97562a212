"""Beginning and ending a turn, within the writer's transaction."""

from __future__ import annotations

import dataclasses
import json

import apsw

import chatd

from .rows import TURN_COLUMNS, TURN_TABLES, turn_of

INTERRUPT = (
    "UPDATE turns SET status = 'interrupted', error_code = 'process_lost',"
    " finished_at = unixepoch('subsec') WHERE status = 'running'"
)


def require_session(db: apsw.Connection, session_id: str, chatbot_id: str) -> str | None:
    """The session's user id. Raises `NotFound` when the chatbot has no such session."""
    row: tuple[str | None] | None = db.execute(
        "SELECT user_id FROM sessions WHERE session_id = ? AND chatbot_id = ?",
        (session_id, chatbot_id),
    ).fetchone()
    if row is None:
        raise chatd.NotFound
    return row[0]


def begin_turn(
    db: apsw.Connection, request: chatd.BeginTurn
) -> chatd.BegunTurn | chatd.ExistingTurn:
    """As `chatd.Storage.begin_turn`."""
    user_id = require_session(db, request.session_id, request.chatbot_id)
    session = request.session_id
    running = db.execute(
        "SELECT turn_id, lease_until <= unixepoch('subsec') FROM turns"
        " WHERE session_id = ? AND status = 'running'",
        (session,),
    ).fetchone()
    if running and running[1]:
        db.execute(INTERRUPT + " AND turn_id = ?", (running[0],))
        running = None
    if running and running[0] == request.turn_id:
        return _begun(db, request, request.turn_id, user_id)
    ended = stored_turn(db, "t.turn_id = ? AND t.session_id = ?", request.turn_id, session)
    if ended is not None:
        return chatd.ExistingTurn(ended)
    if request.idempotency_key is not None and (known := _known(db, request, user_id)):
        return known
    if running:
        raise chatd.TurnInProgress(turn_id=running[0])
    db.execute(
        "INSERT INTO turns (turn_id, seq, session_id, status, label, idempotency_key,"
        " request_hash, lease_until)"
        " VALUES (?1, 1 + coalesce((SELECT max(seq) FROM turns WHERE session_id = ?2), 0), ?2,"
        " 'running', ?3, ?4, ?5, unixepoch('subsec') + ?6)",
        (
            request.turn_id,
            session,
            request.label,
            request.idempotency_key,
            request.request_hash,
            request.lease_seconds,
        ),
    )
    for message in request.messages:
        db.execute(
            "INSERT INTO conversations (session_id, role, content, turn_id) VALUES (?, ?, ?, ?)",
            (session, message.role, message.content, request.turn_id),
        )
    return _begun(db, request, request.turn_id, user_id)


def _known(
    db: apsw.Connection, request: chatd.BeginTurn, user_id: str | None
) -> chatd.BegunTurn | chatd.ExistingTurn | None:
    """What the idempotency key leads to; None when it begins a new turn."""
    row = db.execute(
        "SELECT turn_id, request_hash, status, rerunnable, reply_id,"
        " seq = (SELECT max(seq) FROM turns WHERE session_id = ?1)"
        " FROM turns WHERE session_id = ?1 AND idempotency_key = ?2",
        (request.session_id, request.idempotency_key),
    ).fetchone()
    if row is None:
        return None
    turn_id, request_hash, status, rerunnable, reply_id, newest = row
    same = request_hash == request.request_hash
    if rerunnable or (status == "interrupted" and reply_id is None):
        if same and newest:
            db.execute(
                "UPDATE turns SET status = 'running', run = run + 1, rerunnable = 0, error_code = NULL,"
                " stop_asked = 0, finished_at = NULL, lease_until = unixepoch('subsec') + ? WHERE turn_id = ?",
                (request.lease_seconds, turn_id),
            )
            return _begun(db, request, turn_id, user_id)
        db.execute("UPDATE turns SET idempotency_key = NULL WHERE turn_id = ?", (turn_id,))
        return None
    if not same:
        raise chatd.IdempotencyKeyReused
    found = stored_turn(db, "t.turn_id = ?", turn_id)
    return None if found is None else chatd.ExistingTurn(found)


def stored_turn(db: apsw.Connection, where: str, *values: str) -> chatd.TurnRecord | None:
    """The turn that a condition finds, if it finds one."""
    row = db.execute(f"SELECT {TURN_COLUMNS}{TURN_TABLES} WHERE {where}", values).fetchone()
    return turn_of(row) if row else None


def _begun(
    db: apsw.Connection, request: chatd.BeginTurn, turn_id: str, user_id: str | None
) -> chatd.BegunTurn:
    """The history before `turn_id`: the newest whole turns that fit, oldest first."""
    rows = db.execute(
        "SELECT c.role, c.content, c.turn_id FROM conversations c"
        " LEFT JOIN turns t ON t.turn_id = c.turn_id"
        " WHERE c.session_id = ?1 AND (c.turn_id IS NULL OR (c.turn_id <> ?2"
        " AND t.status IN ('completed', 'stopped', 'interrupted'))) ORDER BY c.id DESC",
        (request.session_id, turn_id),
    )
    history: list[chatd.Message] = []
    left, whole, current = request.history_chars, 0, None
    truncated = False
    for role, content, owner in rows:
        if owner is None or owner != current:
            whole, current = len(history), owner
        message = chatd.Message(role, content)
        left -= message.cost_chars
        if left < 0:
            truncated = True
            del history[whole:]
            break
        history.append(message)
    run = db.execute("SELECT run FROM turns WHERE turn_id = ?", (turn_id,)).get
    return chatd.BegunTurn(turn_id, history[::-1], truncated, user_id, run)


def finish_turn(db: apsw.Connection, result: chatd.FinishTurn) -> bool:
    """As `chatd.Storage.finish_turn`."""
    row = db.execute(
        "SELECT session_id, status,"
        " seq = (SELECT max(seq) FROM turns o WHERE o.session_id = t.session_id), error_code, run"
        " FROM turns t WHERE turn_id = ?",
        (result.turn_id,),
    ).fetchone()
    if row is None:
        return False
    session_id, status, newest, error_code, run = row
    if run != result.run:
        return False
    if status != "running":
        if error_code != "process_lost":
            return bool(status == result.status)
        if not newest:
            return False
    reply_id = None
    if result.reply:
        db.execute(
            "INSERT INTO conversations (session_id, role, content, turn_id)"
            " VALUES (?, 'assistant', ?, ?)",
            (session_id, result.reply, result.turn_id),
        )
        reply_id = db.last_insert_rowid()
    db.execute(
        "UPDATE turns SET status = ?, rerunnable = ?, reply_id = ?, model = ?, provider = ?,"
        " finish_reason = ?, error_code = ?, input_tokens = ?, output_tokens = ?,"
        " cached_tokens = ?, reasoning_tokens = ?, cost_usd = ?, attempts = ?,"
        " history_truncated = ?, side = ?, finished_at = unixepoch('subsec') WHERE turn_id = ?",
        (
            result.status,
            result.rerunnable,
            reply_id,
            result.model,
            result.provider,
            result.finish_reason,
            result.error_code,
            *dataclasses.astuple(result.usage),
            json.dumps(list(result.attempts)),
            result.history_truncated,
            result.side,
            result.turn_id,
        ),
    )
    return True
