"""Beginning and ending a turn, within the writer's transaction."""

from __future__ import annotations

import json

import apsw
import orjson

import chatd

from .recent import Recent, RecentSession, Said, Whole, messages_of
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
    db: apsw.Connection, recent: Recent, request: chatd.BeginTurn
) -> chatd.BegunTurn | chatd.ExistingTurn:
    """As `chatd.Storage.begin_turn`.

    Several small statements: SQLite takes three times as long for one that joins them.
    """
    session, turn_id = request.session_id, request.turn_id
    known = recent.resting(session, request.chatbot_id)
    if known is not None:
        try:
            _insert_turn(db, request, known.seq + 1)
        except apsw.ConstraintError:
            pass  # its id or its idempotency key is known: which, is found below
        else:
            return _begun_next(db, recent, request, known)
    recent.forget(session)
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
    if request.idempotency_key is not None and (existing := _known(db, request, user_id)):
        return existing
    if running:
        raise chatd.TurnInProgress(turn_id=running)
    newest = db.execute(_NEWEST, (session,)).fetchone()
    seq = newest[0] + 1 if newest else 1
    _insert_turn(db, request, seq)
    return _begun_first(db, recent, request, seq, user_id)


def _begun_next(
    db: apsw.Connection, recent: Recent, request: chatd.BeginTurn, session: RecentSession
) -> chatd.BegunTurn:
    """A turn that was stored as the next one of a session that is known."""
    seq, kept = session.seq + 1, session.history(request.history_chars)
    if kept is None:
        return _begun_first(db, recent, request, seq, session.user_id)
    _insert_messages(db, request)
    recent.begun(request, seq, session)
    return chatd.BegunTurn(request.turn_id, *kept, session.user_id)


def _begun_first(
    db: apsw.Connection, recent: Recent, request: chatd.BeginTurn, seq: int, user_id: str | None
) -> chatd.BegunTurn:
    """A turn that was stored as the next one of a session that has to be read."""
    _insert_messages(db, request)
    wholes, truncated = _history(db, request, request.turn_id)
    recent.read(request, seq, user_id, wholes, is_all=not truncated)
    return chatd.BegunTurn(request.turn_id, messages_of(reversed(wholes)), truncated, user_id)


def _insert_turn(db: apsw.Connection, request: chatd.BeginTurn, seq: int) -> None:
    """Stores a new turn. Raises `apsw.ConstraintError` when it cannot be the session's next one."""
    db.execute(
        "INSERT INTO turns (turn_id, seq, session_id, status, label, idempotency_key,"
        " request_hash, lease_until)"
        " VALUES (?, ?, ?, 'running', ?, ?, ?, unixepoch('subsec') + ?)",
        (
            request.turn_id,
            seq,
            request.session_id,
            request.label,
            request.idempotency_key,
            request.request_hash,
            request.lease_seconds,
        ),
    )


def _insert_messages(db: apsw.Connection, request: chatd.BeginTurn) -> None:
    """Stores what the user says in a new turn."""
    for message in request.messages:
        db.execute(
            "INSERT INTO conversations (session_id, role, content, turn_id) VALUES (?, ?, ?, ?)",
            (request.session_id, message.role, message.content, request.turn_id),
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
    """A turn that was stored before, with the history before it."""
    wholes, truncated = _history(db, request, turn_id)
    return chatd.BegunTurn(turn_id, messages_of(reversed(wholes)), truncated, user_id, run)


def _history(
    db: apsw.Connection, request: chatd.BeginTurn, turn_id: str
) -> tuple[list[Whole], bool]:
    """The newest whole turns before `turn_id` that fit, newest first, and whether others do not."""
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
    wholes: list[Whole] = []
    said: list[Said] = []
    left, current = request.history_chars, None
    for role, content, owner in rows:
        if owner in left_out:
            continue
        if said and (owner is None or owner != current):
            wholes.append(Whole(said[::-1]))
            said = []
        current = owner
        left -= len(content) + chatd.MESSAGE_OVERHEAD_CHARS
        if left < 0:
            return wholes, True
        said.append((role, content))
    if said:
        wholes.append(Whole(said[::-1]))
    return wholes, False


def finish_turn(db: apsw.Connection, recent: Recent, result: chatd.FinishTurn) -> bool:
    """As `chatd.Storage.finish_turn`."""
    session = recent.running(result.turn_id)
    if session is not None and result.run == 1:
        _end(db, session.id, result)
        if result.status == chatd.TurnStatus.FAILED:
            recent.forget(session.id)
        else:
            recent.ended(session, result.reply)
        return True
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
    recent.forget(session_id)
    _end(db, session_id, result)
    return True


def _end(db: apsw.Connection, session_id: str, result: chatd.FinishTurn) -> None:
    """Stores how a turn ended, and its reply."""
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
            _attempts_json(result),
            result.history_truncated,
            result.side,
            result.turn_id,
        ),
    )


def _attempts_json(result: chatd.FinishTurn) -> str:
    try:
        return orjson.dumps(result.attempts).decode()
    except orjson.JSONEncodeError:
        # Numbers beyond 64 bits and half a surrogate pair, which a provider may have said.
        return json.dumps(list(result.attempts))
