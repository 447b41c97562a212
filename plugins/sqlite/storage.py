"""`chatd.Storage` in a file.

One connection writes, on a thread of its own, where everything that waits at the same moment
shares one commit; another one reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import apsw

import chatd

from .connection import Connection, Writer, unavailable
from .doctor import diagnose
from .erasing import INCREMENTAL, delete_session, empty_log, erase_idle_sessions, give_back
from .moving import TALLY, export_session, import_session
from .recent import Recent
from .rows import (
    CHATBOT_COLUMNS,
    KEY_SCHEME,
    SESSION_COLUMNS,
    TURN_COLUMNS,
    TURN_TABLES,
    chatbot_of,
    seconds_of,
    session_of,
    settings_json,
    turn_of,
    utc,
)
from .schema import MIGRATIONS
from .turns import INTERRUPT, begin_turn, finish_turn, require_session, stored_turn
from .usage import usage_query

LOG_PAGES = 4000
"""How long the log grows before it is written into the file, in pages of 4 KiB: a page that many turns
change is written once for all of them, and a commit seldom has to wait for that."""


class SQLiteStorage:
    """`chatd.Storage` in a file."""

    def __init__(self, path: Path, *, synchronous: str, busy_timeout: float) -> None:
        self._path = path
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._recent = Recent()
        self._writer = Writer("sqlite-write", path, self._connect, forget=self._recent.clear)
        self._reader = Connection("sqlite-read", path, self._connect)
        self._lock: IO[bytes] | None = None
        self._file: tuple[int, int] | None = None
        self._began = False

    async def open(self) -> None:
        """Creates or migrates the database. Raises `PluginError` when it cannot be used."""
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
        # What is said in it is for nobody else; SQLite gives its other files the same permissions.
        with contextlib.suppress(OSError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = apsw.Connection(str(self._path))
        connection.set_busy_timeout(round(self._busy_timeout * 1000))
        if not connection.pragma("page_count"):
            # Only a file that is empty yet takes it, and others would wait for a lock in vain.
            connection.pragma("auto_vacuum", INCREMENTAL)
        connection.pragma("journal_mode", "wal")
        connection.pragma("wal_autocheckpoint", LOG_PAGES)
        # What is erased is overwritten, in the file and not only in its list of pages.
        connection.pragma("secure_delete", True)
        connection.pragma("synchronous", self._synchronous)
        connection.pragma("foreign_keys", True)
        return connection

    def _migrate(self, db: apsw.Connection) -> None:
        db.execute("CREATE TABLE IF NOT EXISTS chatd_schema (version INTEGER NOT NULL) STRICT")
        version = db.execute("SELECT coalesce(max(version), 0) FROM chatd_schema").get
        if version > len(MIGRATIONS):
            raise chatd.PluginError(
                f"sqlite: {self._path} was written by a newer chatd (schema {version}, this one "
                f"knows {len(MIGRATIONS)}): install that version"
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
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
            return await self._reader.submit(lambda db: diagnose(db, self._path))
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
                        KEY_SCHEME + chatbot.api_key_hash.hex(),
                        settings_json(chatbot),
                        seconds_of(chatbot.created_at),
                        seconds_of(chatbot.updated_at),
                    ),
                )

        await self._writer.submit(work)

    async def get_chatbot(self, chatbot_id: str) -> chatd.Chatbot | None:
        return await self._chatbot("id = ?", chatbot_id)

    async def get_chatbot_by_key(self, api_key_hash: bytes) -> chatd.Chatbot | None:
        return await self._chatbot("api_key = ?", KEY_SCHEME + api_key_hash.hex())

    async def _chatbot(self, where: str, value: str) -> chatd.Chatbot | None:
        row = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {CHATBOT_COLUMNS} FROM chatbots WHERE {where}", (value,)
            ).fetchone()
        )
        return chatbot_of(row) if row else None

    async def list_chatbots(self) -> Sequence[chatd.Chatbot]:
        rows = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {CHATBOT_COLUMNS} FROM chatbots ORDER BY created_at, id"
            ).fetchall()
        )
        return [chatbot_of(row) for row in rows]

    async def update_chatbot(self, chatbot: chatd.Chatbot) -> bool:
        def work(db: apsw.Connection) -> bool:
            db.execute(
                "UPDATE chatbots SET name = ?, model_name = ?, settings = ?,"
                " updated_at = unixepoch('subsec') WHERE id = ?",
                (chatbot.name, chatbot.model, settings_json(chatbot), chatbot.id),
            )
            return db.changes() > 0

        return await self._writer.submit(work)

    async def set_api_key(self, chatbot_id: str, api_key_hash: bytes) -> bool:
        def work(db: apsw.Connection) -> bool:
            with _conflicts():
                db.execute(
                    "UPDATE chatbots SET api_key = ?, updated_at = unixepoch('subsec')"
                    " WHERE id = ?",
                    (KEY_SCHEME + api_key_hash.hex(), chatbot_id),
                )
            return db.changes() > 0

        return await self._writer.submit(work)

    async def remove_chatbot(self, chatbot_id: str) -> bool:
        def work(db: apsw.Connection) -> bool:
            self._recent.clear()
            db.execute("DELETE FROM chatbots WHERE id = ?", (chatbot_id,))
            return db.changes() > 0

        return await self._writer.submit(work)

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
                f"SELECT {SESSION_COLUMNS} FROM sessions WHERE session_id = ?", (session_id,)
            ).fetchone()
        )
        return session_of(row) if row else None

    async def delete_session(self, session_id: str, chatbot_id: str) -> bool:
        def work(db: apsw.Connection) -> bool:
            self._recent.forget(session_id)
            return delete_session(db, session_id, chatbot_id)

        return await self._writer.submit(work)

    async def erase_idle_sessions(
        self, chatbot_id: str, before: datetime, *, limit: int, after: str | None = None
    ) -> chatd.Erased:
        def work(db: apsw.Connection) -> chatd.Erased:
            self._recent.clear()
            return erase_idle_sessions(db, chatbot_id, before, limit, after)

        return await self._writer.submit(work)

    async def reclaim(self) -> None:
        more = True
        while more:
            more = await self._writer.submit(give_back)
        await asyncio.to_thread(self._empty_log)

    def _empty_log(self) -> None:
        """On a connection of its own: it waits for the others, which must not wait for it."""
        try:
            connection = self._connect()
            try:
                empty_log(connection)
            finally:
                connection.close()
        except apsw.Error as error:
            raise unavailable(error, self._path) from error

    async def list_messages(
        self, session_id: str, chatbot_id: str, *, limit: int, before: int | None = None
    ) -> chatd.MessagePage:
        def work(db: apsw.Connection) -> list[Any]:
            require_session(db, session_id, chatbot_id)
            return db.execute(
                "SELECT id, role, content, timestamp, turn_id FROM conversations"
                " WHERE session_id = ? AND id < ? ORDER BY id DESC LIMIT ?",
                (session_id, 2**63 - 1 if before is None else before, limit + 1),
            ).fetchall()

        rows = await self._reader.submit(work)
        messages = [chatd.StoredMessage(i, r, c, utc(t), turn) for i, r, c, t, turn in rows[:limit]]
        return chatd.MessagePage(messages[::-1], has_more=len(rows) > limit)

    # Turns

    async def begin_turn(self, request: chatd.BeginTurn) -> chatd.BegunTurn | chatd.ExistingTurn:
        self._began = True
        return await self._writer.submit(lambda db: begin_turn(db, self._recent, request))

    async def finish_turn(self, result: chatd.FinishTurn) -> bool:
        return await self._writer.submit(lambda db: finish_turn(db, self._recent, result))

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
            require_session(db, session_id, chatbot_id)
            return stored_turn(db, "t.session_id = ? AND t.status = 'running'", session_id)

        return await self._reader.submit(work)

    async def get_turn(self, turn_id: str, chatbot_id: str) -> chatd.TurnRecord | None:
        row = await self._reader.submit(
            lambda db: db.execute(
                f"SELECT {TURN_COLUMNS}{TURN_TABLES} WHERE t.turn_id = ? AND s.chatbot_id = ?",
                (turn_id, chatbot_id),
            ).fetchone()
        )
        return turn_of(row) if row else None

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
        sql, values = usage_query(by, chatbot_id, since, until)
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
            db.execute(INTERRUPT + where)
            if ended := db.changes():
                self._recent.clear()
            return ended

        return await self._writer.submit(work)

    # Moving

    async def list_sessions(
        self,
        *,
        limit: int,
        after: str | None = None,
        chatbot_id: str | None = None,
        user_id: str | None = None,
    ) -> Sequence[chatd.Session]:
        wanted = {"chatbot_id": chatbot_id, "user_id": user_id}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(["session_id > :after", *(f"{name} = :{name}" for name in given)])
        sql = (
            f"SELECT {SESSION_COLUMNS} FROM sessions WHERE {where} ORDER BY session_id LIMIT :limit"
        )
        values = {**given, "after": after or "", "limit": limit}
        rows = await self._reader.submit(lambda db: db.execute(sql, values).fetchall())
        return [session_of(row) for row in rows]

    async def tally_session(self, session_id: str) -> chatd.Tally | None:
        row = await self._reader.submit(lambda db: db.execute(TALLY, (session_id,)).fetchone())
        if row is None:
            return None
        messages, chars, comments, turns, ended, up, down, priced = row
        return chatd.Tally(messages, chars + comments, turns, ended, up, down, priced)

    async def export_session(self, session_id: str, *, place: int = 0) -> chatd.SessionPart | None:
        return await self._reader.submit(lambda db: export_session(db, session_id, place))

    async def import_session(self, part: chatd.SessionPart) -> None:
        def work(db: apsw.Connection) -> None:
            self._recent.forget(part.session.id)
            import_session(db, part)

        await self._writer.submit(work)


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


class _conflicts(contextlib.AbstractContextManager[None]):
    """Tells a taken id or key from other failures."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, apsw.ConstraintError):
            what = "API key" if "api_key" in str(error) else "id"
            raise chatd.ConflictError(f"a chatbot with this {what} exists already") from error
