"""Beginning and ending a turn, within the writer's transaction."""

from __future__ import annotations

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


_NEWEST = "SELECT seq FROM turns WHERE session_id = ? ORDER BY seq DESC LIMIT 1"


def begin_turn(
    db: apsw.Connection, request: chatd.BeginTurn
) -> chatd.BegunTurn | chatd.ExistingTurn:
    """As `chatd.Storage.begin_turn`.

    Several small statements: SQLite takes three times as long for one that joins them.
    """
    session, turn_id = request.session_id, request.turn_id
    user_id = require_session(db, session, request.chatbot_id)
    running, has_lapsed, run = db.execute(
        "SELECT turn_id, lease_until <= unixepoch('subsec'), run FROM turns"
        " WHERE session_id = ? AND status = 'running'",
        (session,),
    ).fetchone() or (None, False, 1)
    if running and has_lapsed:
        db.execute(INTERRUPT + " AND turn_id = ?", (running,))
        running = None
    if running == turn_id:
        return _begun(db, request, turn_id, user_id, run)
    if db.execute("SELECT 1 FROM turns WHERE turn_id = ?", (turn_id,)).fetchone():
        ended = stored_turn(db, "t.turn_id = ? AND t.session_id = ?", turn_id, session)
        if ended is not None:
            return chatd.ExistingTurn(ended)
    if request.idempotency_key is not None and (known := _known(db, request, user_id)):
        return known
    if running:
        raise chatd.TurnInProgress(turn_id=running)
    _insert(db, request)
    return _begun(db, request, turn_id, user_id, 1)


def _insert(db: apsw.Connection, request: chatd.BeginTurn) -> None:
    """Stores a new turn and what the user says in it."""
    session, turn_id = request.session_id, request.turn_id
    newest = db.execute(_NEWEST, (session,)).fetchone()
    db.execute(
        "INSERT INTO turns (turn_id, seq, session_id, status, label, idempotency_key,"
        " request_hash, lease_until)"
        " VALUES (?, ?, ?, 'running', ?, ?, ?, unixepoch('subsec') + ?)",
        (
            turn_id,
            newest[0] + 1 if newest else 1,
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
            (session, message.role, message.content, turn_id),
        )


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
            run = db.execute(
                "UPDATE turns SET status = 'running', run = run + 1, rerunnable = 0, error_code = NULL,"
                " stop_asked = 0, finished_at = NULL, lease_until = unixepoch('subsec') + ?"
                " WHERE turn_id = ? RETURNING run",
                (request.lease_seconds, turn_id),
            ).get
            return _begun(db, request, turn_id, user_id, run)
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
    db: apsw.Connection, request: chatd.BeginTurn, turn_id: str, user_id: str | None, run: int
) -> chatd.BegunTurn:
    """The history before `turn_id`: the newest whole turns that fit, oldest first."""
    failed = db.execute(
        "SELECT turn_id FROM turns WHERE session_id = ? AND status = 'failed'",
        (request.session_id,),
    ).fetchall()
    # The turn itself may run again, and what it said before is no history of it.
    left_out = {turn_id, *(row[0] for row in failed)}
    rows = db.execute(
        "SELECT role, content, turn_id FROM conversations WHERE session_id = ? ORDER BY id DESC",
        (request.session_id,),
    )
    history: list[chatd.Message] = []
    left, whole, current = request.history_chars, 0, None
    truncated = False
    for role, content, owner in rows:
        if owner in left_out:
            continue
        if owner is None or owner != current:
            whole, current = len(history), owner
        message = chatd.Message(role, content)
        left -= message.cost_chars
        if left < 0:
            truncated = True
            del history[whole:]
            break
        history.append(message)
    history.reverse()
    return chatd.BegunTurn(turn_id, history, truncated, user_id, run)


def finish_turn(db: apsw.Connection, result: chatd.FinishTurn) -> bool:
    """As `chatd.Storage.finish_turn`."""
    row = db.execute(
        "SELECT session_id, status, seq, error_code, run FROM turns WHERE turn_id = ?",
        (result.turn_id,),
    ).fetchone()
    if row is None:
        return False
    session_id, status, seq, error_code, run = row
    if run != result.run:
        return False
    if status != "running":
        if error_code != "process_lost":
            return bool(status == result.status)
        if db.execute(_NEWEST, (session_id,)).get != seq:
            return False
    reply_id, usage = None, result.usage
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
            usage.input_tokens,
            usage.output_tokens,
            usage.cached_tokens,
            usage.reasoning_tokens,
            usage.cost_usd,
            json.dumps(list(result.attempts)),
            result.history_truncated,
            result.side,
            result.turn_id,
        ),
    )
    return True
