"""A connection on a thread of its own, and SQLite's errors in words."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import apsw

import chatd

T = TypeVar("T")
Work = Callable[[apsw.Connection], Any]
Outcome = tuple[asyncio.Future[Any], Any, BaseException | None]


MAX_GROUP = 256
"""The most operations that share a commit, so that the first of them does not wait too long."""


def unavailable(error: apsw.Error, path: Path) -> chatd.StorageUnavailable:
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


class Connection(threading.Thread):
    """A connection on a thread of its own, which runs what is submitted, in order.

    :param write: whether what waits is run in one transaction. One piece's failure never undoes
        another's work: when a piece fails that has changed something, all are run once more, each
        in a savepoint of its own.
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
                        [(future, None, unavailable(error, self._path)) for future, _ in group]
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
    ) -> Sequence[Outcome]:
        try:
            if not self._write:
                return [(future, *self._run_one(connection, work)) for future, work in group]
            connection.execute("BEGIN IMMEDIATE")
            outcomes = self._run_together(connection, group)
            if outcomes is None:
                connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                outcomes = self._run_apart(connection, group)
            connection.execute("COMMIT")
        except Exception as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return [(future, None, self._translated(error)) for future, _ in group]
        return outcomes

    def _run_together(
        self, connection: apsw.Connection, group: Sequence[tuple[asyncio.Future[Any], Work]]
    ) -> Sequence[Outcome] | None:
        """Runs a group as if nothing fails, which is cheapest; None when a piece failed half-way."""
        outcomes: list[Outcome] = []
        for future, work in group:
            # What nobody waits for any more is not done: its caller was told so.
            if future.done():
                continue
            before = connection.total_changes()
            result, error = self._run_one(connection, work)
            if error is not None and connection.total_changes() != before:
                return None
            outcomes.append((future, result, error))
        return outcomes

    def _run_apart(
        self, connection: apsw.Connection, group: Sequence[tuple[asyncio.Future[Any], Work]]
    ) -> Sequence[Outcome]:
        """Runs each piece of a group in a savepoint."""
        outcomes: list[Outcome] = []
        for future, work in group:
            if future.done():
                continue
            connection.execute("SAVEPOINT piece")
            result, error = self._run_one(connection, work)
            if error is not None:
                connection.execute("ROLLBACK TO piece")
            connection.execute("RELEASE piece")
            outcomes.append((future, result, error))
        return outcomes

    def _run_one(self, connection: apsw.Connection, work: Work) -> tuple[Any, BaseException | None]:
        try:
            return work(connection), None
        except Exception as error:
            if self._write and not connection.in_transaction:
                # SQLite itself undid the whole transaction (disk full, I/O error).
                raise
            return None, self._translated(error)

    def _translated(self, error: Exception) -> Exception:
        return unavailable(error, self._path) if isinstance(error, apsw.Error) else error

    def _deliver(self, outcomes: Iterable[Outcome]) -> None:
        # The loop may be gone when a process ends in mid-operation; nobody waits then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: Iterable[Outcome]) -> None:
    for future, result, error in outcomes:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
