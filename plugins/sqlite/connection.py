"""The connections that read and write, and SQLite's errors in words."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import apsw

import chatd

T = TypeVar("T")
Work = Callable[[apsw.Connection], Any]
Outcome = tuple[asyncio.Future[Any], Any, BaseException | None]
Outcomes = Sequence[Outcome]


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


class _Piece(NamedTuple):
    future: asyncio.Future[Any]
    work: Work


class _Thread(threading.Thread):
    """A thread that does what it is given, in order."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.do = self._jobs.put

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    async def end(self) -> None:
        """Ends it, once all is done."""
        self._jobs.put(None)
        await asyncio.to_thread(self.join)


class Connection:
    """A connection on a thread of its own, where what waits is run as a group, in order.

    The loop makes the groups, one at a time: what is submitted in one turn of the loop, and while
    the group before was on its way. Thread and loop would else take the interpreter's lock from
    each other for every piece.
    """

    def __init__(self, name: str, path: Path, open: Callable[[], apsw.Connection]) -> None:
        self._path = path
        self._open = open
        self._loop = asyncio.get_running_loop()
        self._thread = _Thread(name)
        self._thread.start()
        self._connection: apsw.Connection | None = None
        self._waiting: deque[_Piece] = deque()
        self._busy = False
        self._idle: asyncio.Future[None] | None = None
        self._closed = False

    async def submit(self, work: Callable[[apsw.Connection], T]) -> T:
        """The result of `work`, once it is committed. Raises what it raises."""
        if self._closed:
            raise chatd.StorageUnavailable("sqlite: the storage is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(_Piece(future, work))
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._next)
        return await future

    async def close(self) -> None:
        """Lets what was submitted finish, and ends the thread."""
        if self._closed:
            return
        self._closed = True
        if self._busy:
            self._idle = self._loop.create_future()
            await self._idle
        self._thread.do(self._close)
        await self._thread.end()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _next(self) -> None:
        """Hands the next group to the thread, if anything waits."""
        waiting = self._waiting
        if waiting:
            group = [waiting.popleft() for _ in range(min(len(waiting), MAX_GROUP))]
            self._thread.do(partial(self._run, group))
            return
        self._busy = False
        if self._idle is not None:
            self._idle.set_result(None)

    def _run(self, group: Sequence[_Piece]) -> None:
        """Runs a group on the thread."""
        if self._connection is None:
            # Opened here, and again after it could not be: a storage comes back by itself.
            try:
                self._connection = self._open()
            except apsw.Error as error:
                failed = unavailable(error, self._path)
                self._deliver([(piece.future, None, failed) for piece in group])
                return
        self._deliver(self._run_group(self._connection, group))

    def _run_group(self, connection: apsw.Connection, group: Sequence[_Piece]) -> Outcomes:
        return [
            (piece.future, *self._run_one(connection, piece.work))
            for piece in group
            if not piece.future.done()
        ]

    def _run_one(self, connection: apsw.Connection, work: Work) -> tuple[Any, BaseException | None]:
        try:
            return work(connection), None
        except Exception as error:
            return None, self._translated(error)

    def _translated(self, error: Exception) -> Exception:
        return unavailable(error, self._path) if isinstance(error, apsw.Error) else error

    def _deliver(self, outcomes: Outcomes) -> None:
        # The loop may be gone when a process ends in mid-operation; nobody waits then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended, outcomes)

    def _ended(self, outcomes: Outcomes) -> None:
        for future, result, error in outcomes:
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._next()


class Writer(Connection):
    """The connection that writes: a group is one transaction.

    One piece's failure never undoes another's work: when a piece fails that has changed something,
    all are run once more, each in a savepoint of its own.

    :param forget: is called on the thread when the file is not what it was: in a transaction before
        which another connection wrote, and after one was undone.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        open: Callable[[], apsw.Connection],
        *,
        forget: Callable[[], None],
    ) -> None:
        super().__init__(name, path, open)
        self._forget = forget
        self._version: int | None = None

    def _run_group(self, connection: apsw.Connection, group: Sequence[_Piece]) -> Outcomes:
        try:
            self._begin_transaction(connection)
            outcomes = self._run_pieces(connection, group)
            connection.execute("COMMIT")
        except Exception as error:
            return self._undone(connection, group, error)
        return outcomes

    def _undone(
        self, connection: apsw.Connection, group: Sequence[_Piece], error: Exception
    ) -> Outcomes:
        """What comes of a group whose transaction failed."""
        with contextlib.suppress(apsw.Error):  # the next group tries it again
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        self._forget()
        failed = self._translated(error)
        return [(piece.future, None, failed) for piece in group]

    def _begin_transaction(self, connection: apsw.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA data_version").get
        if version != self._version:
            self._forget()
            self._version = version

    def _run_pieces(self, connection: apsw.Connection, group: Sequence[_Piece]) -> Outcomes:
        """Runs a group within a transaction."""
        outcomes = self._run_together(connection, group)
        if outcomes is None:
            connection.execute("ROLLBACK")
            self._forget()
            self._begin_transaction(connection)
            outcomes = self._run_apart(connection, group)
        return outcomes

    def _run_together(
        self, connection: apsw.Connection, group: Sequence[_Piece]
    ) -> Outcomes | None:
        """Runs a group as if nothing fails, which is cheapest; None when a piece failed half-way."""
        outcomes: list[Outcome] = []
        for piece in group:
            # What nobody waits for any more is not done: its caller was told so.
            if piece.future.done():
                continue
            before = connection.total_changes()
            result, error = self._run_one(connection, piece.work)
            if error is not None and connection.total_changes() != before:
                return None
            outcomes.append((piece.future, result, error))
        return outcomes

    def _run_apart(self, connection: apsw.Connection, group: Sequence[_Piece]) -> Outcomes:
        """Runs each piece of a group in a savepoint."""
        outcomes: list[Outcome] = []
        for piece in group:
            if piece.future.done():
                continue
            connection.execute("SAVEPOINT piece")
            result, error = self._run_one(connection, piece.work)
            if error is not None:
                connection.execute("ROLLBACK TO piece")
                self._forget()
            connection.execute("RELEASE piece")
            outcomes.append((piece.future, result, error))
        return outcomes

    def _run_one(self, connection: apsw.Connection, work: Work) -> tuple[Any, BaseException | None]:
        result, error = super()._run_one(connection, work)
        if error is not None and not connection.in_transaction:
            # SQLite itself undid the whole transaction (disk full, I/O error).
            raise error
        return result, error
