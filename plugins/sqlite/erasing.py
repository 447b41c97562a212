"""Sessions that are erased, and the space that they leave."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import apsw

import chatd

from .rows import seconds_of
from .usage import KEEP_USAGE

MAX_ROWS = 2000
"""Rows after which a batch ends, so that turns do not wait for it: some ten milliseconds."""

VACUUM_PAGES = 256
"""Pages that go back to the system at once: a megabyte."""

INCREMENTAL = 2
"""What `PRAGMA auto_vacuum` says of a file whose free pages can be given back."""

_OLDEST = """
    SELECT session_id, created_at FROM sessions
    WHERE chatbot_id = ? AND created_at < ? AND (created_at, session_id) > (?, ?)
    ORDER BY created_at, session_id LIMIT ?
"""
_IDLE = """
    SELECT NOT EXISTS (SELECT 1 FROM turns WHERE session_id = ?1 AND status = 'running')
    AND max(
        ifnull((SELECT max(started_at, ifnull(finished_at, started_at)) FROM turns
            WHERE session_id = ?1 ORDER BY seq DESC LIMIT 1), 0),
        ifnull((SELECT timestamp FROM conversations
            WHERE session_id = ?1 ORDER BY id DESC LIMIT 1), 0)) < ?2
"""


def delete_session(db: apsw.Connection, session_id: str, chatbot_id: str) -> bool:
    """As `chatd.Storage.delete_session`, within the writer's transaction."""
    db.execute(KEEP_USAGE, (session_id, chatbot_id))
    db.execute(
        "DELETE FROM sessions WHERE session_id = ? AND chatbot_id = ?", (session_id, chatbot_id)
    )
    return db.changes() > 0


def erase_idle_sessions(
    db: apsw.Connection, chatbot_id: str, before: datetime, limit: int, after: str | None
) -> chatd.Erased:
    """As `chatd.Storage.erase_idle_sessions`, within the writer's transaction."""
    age, _, last = (after or "-1e18 ").partition(" ")
    oldest: list[Any] = db.execute(
        _OLDEST, (chatbot_id, seconds_of(before), float(age), last, limit)
    ).fetchall()
    erased, rows = 0, db.total_changes()
    for looked, (session_id, created_at) in enumerate(oldest, start=1):
        if db.execute(_IDLE, (session_id, seconds_of(before))).get:
            erased += delete_session(db, session_id, chatbot_id)
        if looked == limit or db.total_changes() - rows > MAX_ROWS:
            return chatd.Erased(erased, f"{created_at!r} {session_id}")
    return chatd.Erased(erased)


def give_back(db: apsw.Connection) -> bool:
    """Gives some free pages back to the system; False when there are no more.

    A file that an older chatd made keeps its free pages, and uses them again.
    """
    if db.pragma("auto_vacuum") != INCREMENTAL or not db.pragma("freelist_count"):
        return False
    db.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
    return bool(db.pragma("freelist_count"))


def empty_log(db: apsw.Connection) -> None:
    """Moves the write-ahead log into the file and empties it, unless somebody still reads from it."""
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
