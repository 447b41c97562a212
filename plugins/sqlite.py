"""Storage in one SQLite file: the embedded default.

One connection writes, on a thread of its own, where everything that waits at the same moment
shares one commit; another one reads. Times in the database are seconds since 1970 by SQLite's
own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import queue
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import apsw

import chatd

T = TypeVar("T")
Work = Callable[[apsw.Connection], Any]

MAX_GROUP = 256
"""The most operations that share a commit, so that the first of them does not wait too long."""

_MIGRATIONS = (
    """
    CREATE TABLE chatbots (
        id TEXT PRIMARY KEY,
        api_key TEXT NOT NULL UNIQUE,
        model_name TEXT NOT NULL,
        name TEXT NOT NULL,
        settings TEXT NOT NULL,
        created_at REAL NOT NULL DEFAULT (unixepoch('subsec')),
        updated_at REAL NOT NULL DEFAULT (unixepoch('subsec'))
    ) STRICT;
    CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY,
        chatbot_id TEXT NOT NULL REFERENCES chatbots(id) ON DELETE CASCADE,
        created_at REAL NOT NULL DEFAULT (unixepoch('subsec')),
        channel TEXT,
        user_id TEXT,
        metadata TEXT NOT NULL DEFAULT '{}'
    ) STRICT;
    CREATE INDEX sessions_of_chatbot ON sessions (chatbot_id);
    CREATE TABLE turns (
        turn_id TEXT PRIMARY KEY,
        seq INTEGER NOT NULL,
        session_id TEXT NOT NULL REFERENCES sessions(session_id) ON DELETE CASCADE,
        status TEXT NOT NULL,
        label TEXT,
        idempotency_key TEXT,
        request_hash BLOB,
        lease_until REAL NOT NULL,
        rerunnable INTEGER NOT NULL DEFAULT 0,
        run INTEGER NOT NULL DEFAULT 1,
        reply_id INTEGER,
        model TEXT,
        provider TEXT,
        finish_reason TEXT,
        error_code TEXT,
        input_tokens INTEGER,
        output_tokens INTEGER,
        cached_tokens INTEGER,
        reasoning_tokens INTEGER,
        cost_usd REAL,
        attempts TEXT NOT NULL DEFAULT '[]',
        rating TEXT,
        comment TEXT,
        started_at REAL NOT NULL DEFAULT (unixepoch('subsec')),
        finished_at REAL
    ) STRICT, WITHOUT ROWID;
    CREATE UNIQUE INDEX turns_of_session ON turns (session_id, seq);
    CREATE UNIQUE INDEX one_running_turn ON turns (session_id) WHERE status = 'running';
    CREATE UNIQUE INDEX one_turn_per_key ON turns (session_id, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
    CREATE INDEX running_leases ON turns (lease_until) WHERE status = 'running';
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        session_id TEXT NOT NULL REFERENCES sessions(session_id) ON DELETE CASCADE,
        role TEXT NOT NULL,
        content TEXT NOT NULL,
        timestamp REAL NOT NULL DEFAULT (unixepoch('subsec')),
        turn_id TEXT
    ) STRICT;
    CREATE INDEX conversations_of_session ON conversations (session_id, id);
    """,
    """
    ALTER TABLE turns ADD COLUMN history_truncated INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE turns ADD COLUMN stop_asked INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE turns ADD COLUMN side TEXT;
    CREATE INDEX turns_by_start ON turns (started_at);
    CREATE TABLE usage_of_erased (
        chatbot_id TEXT NOT NULL REFERENCES chatbots(id) ON DELETE CASCADE,
        day TEXT NOT NULL,
        model TEXT,
        side TEXT,
        turns INTEGER NOT NULL,
        completed INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        stopped INTEGER NOT NULL,
        interrupted INTEGER NOT NULL,
        input_tokens INTEGER,
        output_tokens INTEGER,
        cached_tokens INTEGER,
        reasoning_tokens INTEGER,
        cost_usd REAL,
        unknown_cost INTEGER NOT NULL,
        rated_up INTEGER NOT NULL,
        rated_down INTEGER NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX usage_of_erased_day ON usage_of_erased
        (chatbot_id, day, ifnull(model, ''), ifnull(side, ''));
    """,
)
"""Forward migrations: the n-th brings a database of version n to n + 1. Never edit, only add."""

_CHATBOT = "id, name, model_name, api_key, settings, created_at, updated_at"
_SESSION = "session_id, chatbot_id, channel, user_id, metadata, created_at"
_TURN = (
    "t.turn_id, t.session_id, s.chatbot_id, t.status, t.label, c.content, t.model, t.provider,"
    " t.finish_reason, t.error_code, t.input_tokens, t.output_tokens, t.cached_tokens,"
    " t.reasoning_tokens, t.cost_usd, t.attempts, t.rating, t.comment, t.started_at, t.finished_at,"
    " t.history_truncated, t.run, t.side"
)
_TURN_FROM = (
    " FROM turns t JOIN sessions s ON s.session_id = t.session_id"
    " LEFT JOIN conversations c ON c.id = t.reply_id"
)
_KEY_SCHEME = "sha256:"


def _unavailable(error: apsw.Error, path: Path) -> chatd.StorageUnavailable:
    """SQLite's errors in the operator's words."""
    match error:
        case apsw.BusyError() | apsw.LockedError():
            what = "is locked by another process that writes to it"
        case apsw.FullError():
            what = "cannot grow: the disk is full"
        case apsw.ReadOnlyError():
            what = "is read-only: check the permissions of the file and its folder"
        case apsw.NotADBError():
            what = "is not a SQLite database: name another file under storage.path"
        case apsw.CorruptError():
            what = "is damaged: restore a backup, or recover it with the sqlite3 tool's .recover"
        case apsw.CantOpenError():
            what = "cannot be opened: check that its folder exists and can be written"
        case _:
            what = f"failed ({type(error).__name__}: {error})"
    return chatd.StorageUnavailable(f"sqlite: {path} {what}")


class _Connection(threading.Thread):
    """A connection on a thread of its own, which runs what is submitted, in order.

    :param write: whether what waits is run in one transaction, each piece in a savepoint, so
        that one piece's failure never undoes another's work.
    """

    def __init__(self, path: Path, open: Callable[[], apsw.Connection], *, write: bool) -> None:
        super().__init__(name=f"sqlite-{'write' if write else 'read'}", daemon=True)
        self._path = path
        self._open = open
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[asyncio.Future[Any], Work] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False

    async def submit(self, work: Callable[[apsw.Connection], T]) -> T:
        """The result of `work`, once it is committed. Raises what it raises."""
        if self._closed:
            raise chatd.StorageUnavailable("sqlite: the storage is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put((future, work))
        return await future

    async def close(self) -> None:
        """Lets what was submitted finish, and ends the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            await asyncio.to_thread(self.join)

    def run(self) -> None:
        connection: apsw.Connection | None = None
        while group := self._next_group():
            if connection is None:
                # Opened here, and again after it could not be: a storage comes back by itself.
                try:
                    connection = self._open()
                except apsw.Error as error:
                    self._deliver(
                        [(future, None, _unavailable(error, self._path)) for future, _ in group]
                    )
                    continue
            self._deliver(self._run_group(connection, group))
        if connection is not None:
            connection.close()

    def _next_group(self) -> list[tuple[asyncio.Future[Any], Work]]:
        first = self._queue.get()
        if first is None:
            return []
        group = [first]
        with contextlib.suppress(queue.Empty):
            while len(group) < MAX_GROUP:
                item = self._queue.get_nowait()
                if item is None:
                    self._queue.put(None)
                    break
                group.append(item)
        return group

    def _run_group(
        self, connection: apsw.Connection, group: Sequence[tuple[asyncio.Future[Any], Work]]
    ) -> list[tuple[asyncio.Future[Any], Any, BaseException | None]]:
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        try:
            if self._write:
                connection.execute("BEGIN IMMEDIATE")
            for future, work in group:
                # What nobody waits for any more is not done: its caller was told so.
                if not future.done():
                    outcomes.append((future, *self._run_one(connection, work)))
            if self._write:
                connection.execute("COMMIT")
        except Exception as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return [(future, None, self._translated(error)) for future, _ in group]
        return outcomes

    def _run_one(self, connection: apsw.Connection, work: Work) -> tuple[Any, BaseException | None]:
        if not self._write:
            try:
                return work(connection), None
            except Exception as error:
                return None, self._translated(error)
        connection.execute("SAVEPOINT piece")
        try:
            result = work(connection)
        except Exception as error:
            if not connection.in_transaction:
                # SQLite itself undid the whole transaction (disk full, I/O error).
                raise
            connection.execute("ROLLBACK TO piece")
            connection.execute("RELEASE piece")
            return None, self._translated(error)
        connection.execute("RELEASE piece")
        return result, None

    def _translated(self, error: Exception) -> Exception:
        return _unavailable(error, self._path) if isinstance(error, apsw.Error) else error

    def _deliver(
        self, outcomes: Iterable[tuple[asyncio.Future[Any], Any, BaseException | None]]
    ) -> None:
        # The loop may be gone when a process ends in mid-operation; nobody waits then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: Iterable[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, result, error in outcomes:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


class SQLiteStorage:
    """`chatd.Storage` in a file."""

    def __init__(self, path: Path, *, synchronous: str, busy_timeout: float) -> None:
        self._path = path
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._writer = _Connection(path, self._connect, write=True)
        self._reader = _Connection(path, self._connect, write=False)
        self._lock: IO[bytes] | None = None
        self._file: tuple[int, int] | None = None
        self._began = False

    async def open(self) -> None:
        """Creates or migrates the database. Raises `PluginError` when it cannot be used."""
        self._writer.start()
        self._reader.start()
        try:
            await self._writer.submit(self._migrate)
            found = self._path.stat()
            self._file = (found.st_dev, found.st_ino)
        except chatd.StorageUnavailable as error:
            await self.close()
            raise chatd.PluginError(error.detail) from error
        except chatd.PluginError:
            await self.close()
            raise

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(str(self._path))
        connection.set_busy_timeout(round(self._busy_timeout * 1000))
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", self._synchronous)
        connection.pragma("foreign_keys", True)
        return connection

    def _migrate(self, db: apsw.Connection) -> None:
        db.execute("CREATE TABLE IF NOT EXISTS chatd_schema (version INTEGER NOT NULL) STRICT")
        version = db.execute("SELECT coalesce(max(version), 0) FROM chatd_schema").get
        if version > len(_MIGRATIONS):
            raise chatd.PluginError(
                f"sqlite: {self._path} was written by a newer chatd (schema {version}, this one "
                f"knows {len(_MIGRATIONS)}): install that version"
            )
        for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            db.execute(script)
            db.execute("INSERT INTO chatd_schema VALUES (?)", (number,))

    async def close(self) -> None:
        await self._writer.close()
        await self._reader.close()
        if self._lock is not None:
            self._lock.close()

    def _require_file(self) -> None:
        """Raises `StorageUnavailable` when the file that is open is not the one at the path."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise chatd.StorageUnavailable(
                f"sqlite: {self._path} {error.strerror}: it was removed under this server; what is "
                "said now is lost. Put it back or start again"
            ) from error
        if self._file is not None and self._file != (found.st_dev, found.st_ino):
            raise chatd.StorageUnavailable(
                f"sqlite: {self._path} was replaced under this server: start again"
            )

    async def check(self) -> None:
        self._require_file()
        await self._writer.submit(lambda db: db.execute("SELECT 1 FROM chatd_schema").get)
        await self._reader.submit(lambda db: db.execute("SELECT 1 FROM chatd_schema").get)

    async def diagnose(self) -> Sequence[chatd.Finding]:
        try:
            self._require_file()
            return await self._reader.submit(lambda db: _diagnose(db, self._path))
        except chatd.StorageUnavailable as error:
            problem, _, cure = error.detail.partition(": ")[2].partition(": ")
            return [chatd.Finding(problem, cure or "restore a backup if it stays like this")]

    # Chatbots

    async def add_chatbot(self, chatbot: chatd.Chatbot) -> None:
        def work(db: apsw.Connection) -> None:
            with _conflicts():
                db.execute(
                    "INSERT INTO chatbots (id, name, model_name, api_key, settings, created_at,"
                    " updated_at) VALUES (?, ?, ?, ?, ?, coalesce(?, unixepoch('subsec')),"
                    " coalesce(?, unixepoch('subsec')))",
                    (
                        chatbot.id,
                        chatbot.name,
                        chatbot.model,
                        _KEY_SCHEME + chatbot.api_key_hash.hex(),
                        _settings_json(chatbot),
                        _seconds(chatbot.created_at),
                        _seconds(chatbot.updated_at),
                    ),
                )

        await self._writer.submit(work)

    async def get_chatbot(self, chatbot_id: str) -> chatd.Chatbot | None:
        return await self._chatbot("id = ?", chatbot_id)

    async def get_chatbot_by_key(self, api_key_hash: bytes) -> chatd.Chatbot | None:
        return await self._chatbot("api_key = ?", _KEY_SCHEME + api_key_hash.hex())

    async def _chatbot(self, where: str, value: str) -> chatd.Chatbot | None:
        row = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {_CHATBOT} FROM chatbots WHERE {where}", (value,)
            ).fetchone()
        )
        return _chatbot(row) if row else None

    async def list_chatbots(self) -> Sequence[chatd.Chatbot]:
        rows = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {_CHATBOT} FROM chatbots ORDER BY created_at, id"
            ).fetchall()
        )
        return [_chatbot(row) for row in rows]

    async def update_chatbot(self, chatbot: chatd.Chatbot) -> bool:
        def work(db: apsw.Connection) -> bool:
            db.execute(
                "UPDATE chatbots SET name = ?, model_name = ?, settings = ?,"
                " updated_at = unixepoch('subsec') WHERE id = ?",
                (chatbot.name, chatbot.model, _settings_json(chatbot), chatbot.id),
            )
            return db.changes() > 0

        return await self._writer.submit(work)

    async def set_api_key(self, chatbot_id: str, api_key_hash: bytes) -> bool:
        def work(db: apsw.Connection) -> bool:
            with _conflicts():
                db.execute(
                    "UPDATE chatbots SET api_key = ?, updated_at = unixepoch('subsec')"
                    " WHERE id = ?",
                    (_KEY_SCHEME + api_key_hash.hex(), chatbot_id),
                )
            return db.changes() > 0

        return await self._writer.submit(work)

    async def remove_chatbot(self, chatbot_id: str) -> bool:
        return await self._change("DELETE FROM chatbots WHERE id = ?", (chatbot_id,))

    async def _change(self, sql: str, values: tuple[Any, ...]) -> bool:
        def work(db: apsw.Connection) -> bool:
            db.execute(sql, values)
            return db.changes() > 0

        return await self._writer.submit(work)

    async def allowed_origins(self) -> frozenset[str]:
        rows = await self._reader.submit(
            lambda db: db.execute(
                "SELECT DISTINCT o.value FROM chatbots b, json_each(b.settings, '$.allowed_origins') o"
            ).fetchall()
        )
        return frozenset(str(origin) for (origin,) in rows)

    # Sessions

    async def create_session(self, session: chatd.Session) -> None:
        def work(db: apsw.Connection) -> None:
            if not db.execute(
                "SELECT 1 FROM chatbots WHERE id = ?", (session.chatbot_id,)
            ).fetchone():
                raise chatd.NotFound
            db.execute(
                "INSERT INTO sessions (session_id, chatbot_id, channel, user_id, metadata)"
                " VALUES (?, ?, ?, ?, ?) ON CONFLICT (session_id) DO NOTHING",
                (
                    session.id,
                    session.chatbot_id,
                    session.channel,
                    session.user_id,
                    json.dumps(session.metadata, ensure_ascii=False),
                ),
            )

        await self._writer.submit(work)

    async def get_session(self, session_id: str) -> chatd.Session | None:
        row = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {_SESSION} FROM sessions WHERE session_id = ?", (session_id,)
            ).fetchone()
        )
        return _session(row) if row else None

    async def delete_session(self, session_id: str, chatbot_id: str) -> bool:
        def work(db: apsw.Connection) -> bool:
            db.execute(_KEEP_USAGE, (session_id, chatbot_id))
            db.execute(
                "DELETE FROM sessions WHERE session_id = ? AND chatbot_id = ?",
                (session_id, chatbot_id),
            )
            return db.changes() > 0

        return await self._writer.submit(work)

    async def list_messages(
        self, session_id: str, chatbot_id: str, *, limit: int, before: int | None = None
    ) -> chatd.MessagePage:
        def work(db: apsw.Connection) -> list[Any]:
            _require_session(db, session_id, chatbot_id)
            return db.execute(
                "SELECT id, role, content, timestamp, turn_id FROM conversations"
                " WHERE session_id = ? AND id < ? ORDER BY id DESC LIMIT ?",
                (session_id, 2**63 - 1 if before is None else before, limit + 1),
            ).fetchall()

        rows = await self._reader.submit(work)
        messages = [
            chatd.StoredMessage(i, r, c, _utc(t), turn) for i, r, c, t, turn in rows[:limit]
        ]
        return chatd.MessagePage(messages[::-1], has_more=len(rows) > limit)

    # Turns

    async def begin_turn(self, request: chatd.BeginTurn) -> chatd.BegunTurn | chatd.ExistingTurn:
        self._began = True
        return await self._writer.submit(lambda db: _begin(db, request))

    async def finish_turn(self, result: chatd.FinishTurn) -> bool:
        return await self._writer.submit(lambda db: _finish(db, result))

    async def settle_turn(self, turn_id: str, run: int, usage: chatd.Usage) -> bool:
        return await self._change(
            "UPDATE turns SET input_tokens = ?, output_tokens = ?, cached_tokens = ?,"
            " reasoning_tokens = ?, cost_usd = ?"
            " WHERE turn_id = ? AND run = ? AND status <> 'running'",
            (*dataclasses.astuple(usage), turn_id, run),
        )

    async def renew_turns(
        self, turns: Sequence[tuple[str, int]], lease_seconds: float
    ) -> chatd.Renewed:
        def work(db: apsw.Connection) -> chatd.Renewed:
            lost, stopping = set(), set()
            for turn_id, run in turns:
                renewed = db.execute(
                    "UPDATE turns SET lease_until = unixepoch('subsec') + ?"
                    " WHERE turn_id = ? AND run = ? AND status = 'running' RETURNING stop_asked",
                    (lease_seconds, turn_id, run),
                ).fetchone()
                if renewed is None:
                    lost.add(turn_id)
                elif renewed[0]:
                    stopping.add(turn_id)
            return chatd.Renewed(frozenset(lost), frozenset(stopping))

        return await self._writer.submit(work)

    async def stop_turn(self, turn_id: str, chatbot_id: str) -> bool:
        return await self._change(
            "UPDATE turns SET stop_asked = 1 WHERE turn_id = ? AND status = 'running' AND"
            " session_id IN (SELECT session_id FROM sessions WHERE chatbot_id = ?)",
            (turn_id, chatbot_id),
        )

    async def running_turn(self, session_id: str, chatbot_id: str) -> chatd.TurnRecord | None:
        def work(db: apsw.Connection) -> chatd.TurnRecord | None:
            _require_session(db, session_id, chatbot_id)
            return _stored_turn(db, "t.session_id = ? AND t.status = 'running'", session_id)

        return await self._reader.submit(work)

    async def get_turn(self, turn_id: str, chatbot_id: str) -> chatd.TurnRecord | None:
        row = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {_TURN}{_TURN_FROM} WHERE t.turn_id = ? AND s.chatbot_id = ?",
                (turn_id, chatbot_id),
            ).fetchone()
        )
        return _turn(row) if row else None

    async def rate_turn(
        self, turn_id: str, session_id: str, rating: chatd.Rating | None, comment: str | None
    ) -> bool:
        return await self._change(
            "UPDATE turns SET rating = ?, comment = ? WHERE turn_id = ? AND session_id = ?",
            (rating, comment, turn_id, session_id),
        )

    async def usage_totals(
        self,
        *,
        by: chatd.UsageBy,
        chatbot_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Sequence[chatd.UsageTotal]:
        sql, values = _usage_query(by, chatbot_id, since, until)
        rows: list[Any] = await self._reader.submit(lambda db: db.execute(sql, values).fetchall())
        return [chatd.UsageTotal(*row) for row in rows]

    async def sweep(self) -> int:
        self._require_file()
        alone = False
        if self._lock is None:
            self._lock, alone = await asyncio.to_thread(_take_lock, Path(f"{self._path}-lock"))
        # Nobody else serves this file, and this process has not begun: all that runs is dead.
        ended = await self._sweep(everything=alone and not self._began)
        if alone and self._lock is not None:
            await asyncio.to_thread(fcntl.flock, self._lock.fileno(), fcntl.LOCK_SH)
        return ended

    async def _sweep(self, *, everything: bool) -> int:
        where = "" if everything else " AND lease_until <= unixepoch('subsec')"

        def work(db: apsw.Connection) -> int:
            db.execute(_INTERRUPT + where)
            return db.changes()

        return await self._writer.submit(work)

    # Moving

    async def list_sessions(
        self, *, limit: int, after: str | None = None
    ) -> Sequence[chatd.Session]:
        rows = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {_SESSION} FROM sessions WHERE session_id > ? ORDER BY session_id LIMIT ?",
                (after or "", limit),
            ).fetchall()
        )
        return [_session(row) for row in rows]

    async def tally_session(self, session_id: str) -> chatd.Tally | None:
        row = await self._reader.submit(lambda db: db.execute(_TALLY, (session_id,)).fetchone())
        if row is None:
            return None
        messages, chars, comments, turns, ended, up, down, priced = row
        return chatd.Tally(messages, chars + comments, turns, ended, up, down, priced)

    async def export_session(self, session_id: str, *, place: int = 0) -> chatd.SessionPart | None:
        return await self._reader.submit(lambda db: _export(db, session_id, place))

    async def import_session(self, part: chatd.SessionPart) -> None:
        await self._writer.submit(lambda db: _import(db, part))


_TALLY = """
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
_INTERRUPT = (
    "UPDATE turns SET status = 'interrupted', error_code = 'process_lost',"
    " finished_at = unixepoch('subsec') WHERE status = 'running'"
)


_FIGURES = (
    "turns, completed, failed, stopped, interrupted, input_tokens, output_tokens, cached_tokens,"
    " reasoning_tokens, cost_usd, unknown_cost, rated_up, rated_down"
)
"""The columns of `usage_of_erased` that are sums, in the order of `chatd.UsageTotal`."""

_DAY = "date(CAST(t.started_at AS INTEGER), 'unixepoch')"
_COUNTED = """
    count(*) AS turns,
    count(*) FILTER (WHERE t.status = 'completed') AS completed,
    count(*) FILTER (WHERE t.status = 'failed') AS failed,
    count(*) FILTER (WHERE t.status = 'stopped') AS stopped,
    count(*) FILTER (WHERE t.status IN ('interrupted', 'running')) AS interrupted,
    sum(t.input_tokens) AS input_tokens, sum(t.output_tokens) AS output_tokens,
    sum(t.cached_tokens) AS cached_tokens, sum(t.reasoning_tokens) AS reasoning_tokens,
    sum(t.cost_usd) AS cost_usd,
    count(*) FILTER (WHERE t.cost_usd IS NULL AND NOT t.rerunnable) AS unknown_cost,
    count(*) FILTER (WHERE t.rating = 'up') AS rated_up,
    count(*) FILTER (WHERE t.rating = 'down') AS rated_down
"""
"""`_FIGURES` of turns t."""

_KEEP_USAGE = f"""
    INSERT INTO usage_of_erased AS u (chatbot_id, day, model, side, {_FIGURES})
    SELECT s.chatbot_id, {_DAY}, t.model, t.side, {_COUNTED}
    FROM sessions s JOIN turns t ON t.session_id = s.session_id
    WHERE s.session_id = ? AND s.chatbot_id = ?
    GROUP BY s.chatbot_id, {_DAY}, t.model, t.side
    ON CONFLICT (chatbot_id, day, ifnull(model, ''), ifnull(side, '')) DO UPDATE SET
""" + ", ".join(
    # What is unknown on both sides stays so.
    f"{name} = coalesce(u.{name} + excluded.{name}, u.{name}, excluded.{name})"
    for name in _FIGURES.split(", ")
)


def _usage_query(
    by: chatd.UsageBy, chatbot_id: str | None, since: datetime | None, until: datetime | None
) -> tuple[str, dict[str, Any]]:
    """The query of `usage_totals`, and what it is given."""
    values = {"bot": chatbot_id, "since": _seconds(since), "until": _seconds(until)}
    # Without a +, SQLite would read all of a chatbot's turns for a day's.
    bot = "s.chatbot_id" if since is None else "+s.chatbot_id"
    ended = {"bot": f"{bot} = :bot", "since": "t.started_at >= :since"}
    ended["until"] = "t.started_at < :until"
    erased = {"bot": "e.chatbot_id = :bot", "since": "unixepoch(e.day) >= :since"}
    erased["until"] = "unixepoch(e.day) < :until"
    given = [name for name, value in values.items() if value is not None]
    key = {"day": _DAY, "model": "t.model", "side": "t.side"}[by]
    sums = ", ".join(f"sum({name})" for name in _FIGURES.split(", "))
    sql = f"""
        SELECT chatbot_id, key, {sums} FROM (
            SELECT s.chatbot_id, {key} AS key, {_COUNTED}
            FROM turns t JOIN sessions s ON s.session_id = t.session_id
            WHERE {" AND ".join(["t.status <> 'running'", *(ended[name] for name in given)])}
            GROUP BY s.chatbot_id, {key}
            UNION ALL
            SELECT e.chatbot_id, e.{by}, {_FIGURES} FROM usage_of_erased e
            WHERE {" AND ".join(["true", *(erased[name] for name in given)])})
        GROUP BY chatbot_id, key ORDER BY chatbot_id, key NULLS LAST
    """
    return sql, {name: values[name] for name in given}


def _take_lock(path: Path) -> tuple[IO[bytes], bool]:
    """A lock that every server on this file holds for its life, and whether it is the only one.

    The only one holds it exclusively until it has swept, and then lets others in. Raises
    `StorageUnavailable`.
    """
    try:
        lock = path.open("ab")
    except OSError as error:
        raise chatd.StorageUnavailable(f"sqlite: {path} {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock, False
    return lock, True


def _require_session(db: apsw.Connection, session_id: str, chatbot_id: str) -> str | None:
    """The session's user id. Raises `NotFound` when the chatbot has no such session."""
    row: tuple[str | None] | None = db.execute(
        "SELECT user_id FROM sessions WHERE session_id = ? AND chatbot_id = ?",
        (session_id, chatbot_id),
    ).fetchone()
    if row is None:
        raise chatd.NotFound
    return row[0]


def _begin(db: apsw.Connection, request: chatd.BeginTurn) -> chatd.BegunTurn | chatd.ExistingTurn:
    user_id = _require_session(db, request.session_id, request.chatbot_id)
    session = request.session_id
    running = db.execute(
        "SELECT turn_id, lease_until <= unixepoch('subsec') FROM turns"
        " WHERE session_id = ? AND status = 'running'",
        (session,),
    ).fetchone()
    if running and running[1]:
        db.execute(_INTERRUPT + " AND turn_id = ?", (running[0],))
        running = None
    if running and running[0] == request.turn_id:
        return _begun(db, request, request.turn_id, user_id)
    ended = _stored_turn(db, "t.turn_id = ? AND t.session_id = ?", request.turn_id, session)
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
    found = _stored_turn(db, "t.turn_id = ?", turn_id)
    return None if found is None else chatd.ExistingTurn(found)


def _stored_turn(db: apsw.Connection, where: str, *values: str) -> chatd.TurnRecord | None:
    row = db.execute(f"SELECT {_TURN}{_TURN_FROM} WHERE {where}", values).fetchone()
    return _turn(row) if row else None


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


def _finish(db: apsw.Connection, result: chatd.FinishTurn) -> bool:
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


_EXPORTED = (
    "turn_id, seq, status, label, idempotency_key, request_hash, rerunnable, run, reply_id, model,"
    " provider, finish_reason, error_code, input_tokens, output_tokens, cached_tokens,"
    " reasoning_tokens, cost_usd, attempts, rating, comment, started_at, finished_at,"
    " history_truncated, side"
)


def _export(db: apsw.Connection, session_id: str, place: int) -> chatd.SessionPart | None:
    row = db.execute(
        f"SELECT {_SESSION} FROM sessions WHERE session_id = ?", (session_id,)
    ).fetchone()
    if row is None:
        return None
    session = _session(row)
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
        messages.append(chatd.StoredMessage(id, role, content, _utc(timestamp), turn_id))
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
        turn=_turn(
            (*record, model, provider, finish_reason, error_code, *rest[4:-1], run, rest[-1])
        ),
        seq=seq,
        rerunnable=bool(rerunnable),
        idempotency_key=key,
        request_hash=request_hash,
        reply_id=reply_id,
    )


def _import(db: apsw.Connection, part: chatd.SessionPart) -> None:
    session = part.session
    if not db.execute("SELECT 1 FROM chatbots WHERE id = ?", (session.chatbot_id,)).fetchone():
        raise chatd.NotFound
    db.execute(
        f"INSERT INTO sessions ({_SESSION}) VALUES (?, ?, ?, ?, ?,"
        " coalesce(?, unixepoch('subsec'))) ON CONFLICT (session_id) DO NOTHING",
        (
            session.id,
            session.chatbot_id,
            session.channel,
            session.user_id,
            json.dumps(dict(session.metadata), ensure_ascii=False),
            _seconds(session.created_at),
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
        "started_at": _seconds(turn.started_at or datetime.now(UTC)),
        "finished_at": _seconds(turn.finished_at),
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


def _diagnose(db: apsw.Connection, path: Path) -> list[chatd.Finding]:
    findings = []
    mode = path.stat().st_mode
    if mode & 0o002:
        findings.append(
            chatd.Finding(f"anybody on this machine may write {path}", f"chmod o-w {path}")
        )
    for place in (path, path.resolve().parent):
        if not os.access(place, os.W_OK):
            findings.append(
                chatd.Finding(f"chatd may not write {place}", f"chmod u+w {place}, as its owner")
            )
    if (journal := db.pragma("journal_mode")) != "wal":
        findings.append(
            chatd.Finding(
                f"{path} cannot keep a write-ahead log (its journal is {journal})",
                "put the file on a local disk that can be written",
            )
        )
    faults = [fault for (fault,) in db.execute("PRAGMA quick_check(5)")]
    if faults != ["ok"]:
        told = "; ".join(" ".join(str(fault).split()) for fault in faults)
        cure = "restore a backup, or recover it with the sqlite3 tool's .recover"
        return [chatd.Finding(f"{path} is damaged: {told}", cure), *findings]
    return [*findings, *_missing(db, path), *_orphans(db, path)]


def _missing(db: apsw.Connection, path: Path) -> list[chatd.Finding]:
    """Tables and indexes that the migrations make and that are not there."""
    named = "SELECT name, type, sql FROM sqlite_schema WHERE sql IS NOT NULL"
    made = apsw.Connection(":memory:")
    for script in _MIGRATIONS:
        made.execute(script)
    there = {name for name, _, _ in db.execute(named)}
    return [
        chatd.Finding(
            f"the {kind} {name} is missing from {path}",
            _run(path, sql) if kind == "index" else "restore a backup",
        )
        for name, kind, sql in made.execute(named)
        if name not in there
    ]


def _orphans(db: apsw.Connection, path: Path) -> list[chatd.Finding]:
    """Rows that belong to nothing."""
    counted: dict[tuple[str, str, int], int] = {}
    for table, _, parent, key in db.execute("PRAGMA foreign_key_check"):
        counted[table, parent, key] = counted.get((table, parent, key), 0) + 1
    findings = []
    for (table, parent, key), count in counted.items():
        column, other = db.execute(
            'SELECT "from", "to" FROM pragma_foreign_key_list(?) WHERE id = ?', (table, key)
        ).get
        findings.append(
            chatd.Finding(
                f"{count} rows of {table} belong to no row of {parent}",
                _run(
                    path,
                    f"DELETE FROM {table} WHERE {column} NOT IN (SELECT {other} FROM {parent})",
                ),
            )
        )
    return findings


def _run(path: Path, sql: str) -> str:
    """A command that runs SQL in the file, with the SQLite that chatd brings."""
    text = f"import apsw; apsw.Connection({str(path)!r}).execute({' '.join(sql.split())!r})"
    return f"python -c {shlex.quote(text)}"


class _conflicts(contextlib.AbstractContextManager[None]):
    """Tells a taken id or key from other failures."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, apsw.ConstraintError):
            what = "API key" if "api_key" in str(error) else "id"
            raise chatd.ConflictError(f"a chatbot with this {what} exists already") from error


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else _utc(seconds)


def _seconds(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()


def _settings_json(chatbot: chatd.Chatbot) -> str:
    return json.dumps(chatbot.settings.to_json(), ensure_ascii=False)


def _chatbot(row: Any) -> chatd.Chatbot:
    id, name, model, api_key, settings, created_at, updated_at = row
    return chatd.Chatbot(
        id=id,
        name=name,
        model=model,
        api_key_hash=bytes.fromhex(api_key.removeprefix(_KEY_SCHEME)),
        settings=chatd.ChatbotSettings.from_json(json.loads(settings)),
        created_at=_time(created_at),
        updated_at=_time(updated_at),
    )


def _session(row: Any) -> chatd.Session:
    id, chatbot_id, channel, user_id, metadata, created_at = row
    return chatd.Session(id, chatbot_id, channel, user_id, json.loads(metadata), _time(created_at))


def _turn(row: Any) -> chatd.TurnRecord:
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
        started_at=_time(started_at),
        finished_at=_time(finished_at),
        history_truncated=bool(history_truncated),
        run=run,
        side=side,
    )


async def open_sqlite(settings: Mapping[str, Any]) -> SQLiteStorage:
    """Opens the database that the settings name, and makes it when it does not exist."""
    storage = SQLiteStorage(
        Path(settings.get("path", "chatd.db")),
        synchronous=settings.get("synchronous", "full"),
        busy_timeout=settings.get("busy_timeout", 5),
    )
    await storage.open()
    return storage


_SETTINGS: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "path": {
            "type": "string",
            "minLength": 1,
            "default": "chatd.db",
            "description": "The file, relative to the folder that chatd runs in.",
            "x-place": "file",
        },
        "synchronous": {
            "enum": ["full", "normal", "off"],
            "default": "full",
            "description": (
                "What a turn waits for: `full` survives a power cut, `normal` may lose the last "
                "turns in one (not in a crash of chatd), `off` may damage the file in one."
            ),
        },
        "busy_timeout": {
            "type": "number",
            "minimum": 0,
            "maximum": 60,
            "default": 5,
            "description": "Seconds to wait while another process writes.",
        },
        "allow_ephemeral": {
            "type": "boolean",
            "default": False,
            "description": "Run on a Heroku dyno although its disk is wiped daily.",
        },
    },
}


_WIPED = (
    "must be true: a dyno's disk is wiped at least once a day, and every conversation with it. "
    "Use a storage elsewhere, or set storage.allow_ephemeral: true if losing it is fine"
)


def _settings_on_a_dyno() -> dict[str, Any]:
    """The settings where the disk does not last: SQLite must be told that this is fine."""
    told = {**_SETTINGS["properties"]["allow_ephemeral"], "const": True}
    told |= {"x-error": _WIPED, "x-required": _WIPED}
    properties = {**_SETTINGS["properties"], "allow_ephemeral": told}
    return {**_SETTINGS, "required": ["allow_ephemeral"], "properties": properties}


@chatd.hookimpl
def chatd_register_storage(register: chatd.StorageRegister) -> None:
    settings = _settings_on_a_dyno() if os.environ.get("DYNO") else _SETTINGS
    register.add("sqlite", open_sqlite, settings, "one file on this machine's disk (WAL)")
