"""SQLite: the contract, and what only a file can have."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import struct
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw
import pytest
from chatd_plugins.sqlite import SQLiteStorage, open_sqlite
from chatd_plugins.sqlite.schema import MIGRATIONS
from chatd_plugins.sqlite.turns import INTERRUPT
from chatd_plugins.sqlite.usage import usage_query
from tornado.ioloop import IOLoop

from chatd.domain import Message, Session, TurnStatus, new_id
from chatd.errors import NotFound, PluginError, StorageUnavailable
from chatd.storage import BegunTurn, FinishTurn, Storage
from chatd.testing.storage import StorageConformance, a_chatbot, a_turn
from tests.conftest import Serve
from tests.support import ECHO_CONFIG
from tests.test_http import SLOW_CONFIG, assert_problem


class TestSQLite(StorageConformance):
    @pytest.fixture
    def open_storage(self, tmp_path: Path) -> Callable[[], Awaitable[Storage]]:
        async def open() -> Storage:
            return await open_sqlite({"path": str(tmp_path / "chatd.db")})

        return open


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chatd.db"


@pytest.fixture
def storage(io_loop: IOLoop, path: Path) -> Iterator[SQLiteStorage]:
    storage = io_loop.run_sync(lambda: open_sqlite({"path": str(path), "busy_timeout": 0.1}))
    yield storage
    io_loop.run_sync(storage.close)


async def _session(storage: Storage, **more: Any) -> Session:
    chatbot = a_chatbot()
    await storage.add_chatbot(chatbot)
    session = Session(new_id(), chatbot.id, **more)
    await storage.create_session(session)
    return session


async def _say(storage: Storage, session: Session, text: str) -> None:
    request = a_turn(session, text)
    await storage.begin_turn(request)
    reply = f"You said: {text}"
    assert await storage.finish_turn(FinishTurn(request.turn_id, TurnStatus.COMPLETED, reply))


def _commits(wal: Path) -> int:
    """How many transactions a write-ahead log holds (https://sqlite.org/fileformat2.html#walformat)."""
    data = wal.read_bytes()
    (page_size,) = struct.unpack(">I", data[8:12])
    salts = data[16:24]
    frames = range(32, len(data), 24 + page_size)
    headers = [data[at : at + 24] for at in frames]
    return sum(h[8:16] == salts and h[4:8] != b"\0\0\0\0" for h in headers)


def test_the_sqlite_that_is_used_has_no_wal_reset_bug() -> None:
    # Fixed in 3.51.3 (https://sqlite.org/wal.html#walresetbug).
    assert apsw.sqlite_lib_version() >= "3.51.3"
    assert tuple(map(int, apsw.sqlite_lib_version().split("."))) >= (3, 51, 3)


async def test_turns_that_wait_at_the_same_moment_share_a_commit(
    storage: SQLiteStorage, path: Path
) -> None:
    sessions = [await _session(storage) for _ in range(50)]
    wal = Path(f"{path}-wal")
    before = _commits(wal)
    await storage.begin_turn(a_turn(await _session(storage)))
    alone = _commits(wal) - before
    assert alone == 3  # a chatbot, a session, a turn: none waited for another
    before = _commits(wal)
    await asyncio.gather(*(storage.begin_turn(a_turn(session)) for session in sessions))
    assert 1 <= _commits(wal) - before <= 5


async def test_what_fails_half_way_undoes_nothing_of_what_shares_its_commit(
    storage: SQLiteStorage,
) -> None:
    before, failing, after = [await _session(storage) for _ in range(3)]
    for session in (before, failing, after):
        await _say(storage, session, "first")
    nothing = Message("user", None)  # type: ignore[arg-type]
    outcomes = await asyncio.gather(
        storage.begin_turn(a_turn(before, "second")),
        storage.begin_turn(a_turn(failing, messages=[Message("user", "half"), nothing])),
        storage.begin_turn(a_turn(after, "second")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [BegunTurn, StorageUnavailable, BegunTurn]
    for session, texts in ((before, 3), (failing, 2), (after, 3)):
        page = await storage.list_messages(session.id, session.chatbot_id, limit=10)
        assert len(page.data) == texts
    begun = await storage.begin_turn(a_turn(failing, "second"))
    assert [message.content for message in begun.history] == ["first", "You said: first"]  # type: ignore[union-attr]


async def test_what_is_submitted_at_once_is_done_in_its_order(storage: SQLiteStorage) -> None:
    session = await _session(storage)
    await _say(storage, session, "first")
    outcomes = await asyncio.gather(
        storage.begin_turn(a_turn(session, "second")),
        storage.delete_session(session.id, session.chatbot_id),
        storage.begin_turn(a_turn(session, "third")),
        storage.create_session(session),
        storage.begin_turn(a_turn(session, "fourth")),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [BegunTurn, bool, NotFound, type(None), BegunTurn]
    page = await storage.list_messages(session.id, session.chatbot_id, limit=10)
    assert [message.content for message in page.data] == ["fourth"]


async def test_closing_lets_what_was_submitted_finish(path: Path) -> None:
    storage = await open_sqlite({"path": str(path)})
    sessions = [await _session(storage) for _ in range(20)]
    waiting = [
        asyncio.create_task(storage.begin_turn(a_turn(sessions[0]))),
        *(asyncio.create_task(storage.get_session(session.id)) for session in sessions),
    ]
    await asyncio.sleep(0)  # they are submitted now
    more = [asyncio.create_task(storage.begin_turn(a_turn(each))) for each in sessions[1:]]
    await asyncio.sleep(0)
    await storage.close()
    begun, *found = await asyncio.gather(*waiting)
    assert isinstance(begun, BegunTurn)
    assert found == [
        replace(session, created_at=each.created_at)
        for session, each in zip(sessions, found, strict=True)
    ]
    assert all(isinstance(each, BegunTurn) for each in await asyncio.gather(*more))
    connection = apsw.Connection(str(path))
    assert connection.execute("SELECT count(*) FROM turns").get == 20
    connection.close()


async def test_history_of_a_session_that_is_talked_to_is_not_read_again(
    storage: SQLiteStorage,
) -> None:
    session = await _session(storage)
    await _say(storage, session, "first")
    connection = storage._writer._connection
    assert connection is not None
    statements: list[str] = []

    def note(cursor: apsw.Cursor, statement: str, values: Any) -> bool:
        statements.append(statement)
        return True

    connection.exec_trace = note
    begun = await storage.begin_turn(a_turn(session, "second"))
    connection.exec_trace = None
    assert [message.content for message in begun.history] == ["first", "You said: first"]  # type: ignore[union-attr]
    assert any("INSERT INTO conversations" in statement for statement in statements)
    assert not any("SELECT" in statement for statement in statements)


@pytest.mark.parametrize(("setting", "level"), [(None, 2), ("full", 2), ("normal", 1), ("off", 0)])
async def test_the_synchronous_setting_is_full_unless_told_otherwise(
    path: Path, setting: str | None, level: int
) -> None:
    settings = {} if setting is None else {"synchronous": setting}
    storage = await open_sqlite({"path": str(path), **settings})
    try:
        connection = storage._connect()
        assert connection.pragma("synchronous") == level
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("foreign_keys") == 1
        connection.close()
    finally:
        await storage.close()


async def test_a_new_file_is_for_its_user_alone_and_an_older_one_stays_as_it_is(path: Path) -> None:
    before = os.umask(0o022)
    try:
        await (await open_sqlite({"path": str(path)})).close()
        path.chmod(0o640)
        storage = await open_sqlite({"path": str(path.with_name("new.db"))})
        session = await _session(storage)
        await _say(storage, session, "between us")
        modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.glob("*.db*")}
        await storage.close()
    finally:
        os.umask(before)
    assert modes[path.name] == 0o640
    assert {name: mode for name, mode in modes.items() if name.startswith("new.db")} == {
        "new.db": 0o600,
        "new.db-wal": 0o600,
        "new.db-shm": 0o600,
    }


async def test_a_database_locked_by_another_process_is_unavailable_until_it_is_free(
    storage: SQLiteStorage, path: Path
) -> None:
    session = await _session(storage)
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable, match="locked by another process"):
        await storage.begin_turn(a_turn(session))
    assert await storage.get_session(session.id) is not None
    other.execute("ROLLBACK")
    other.close()
    await storage.begin_turn(a_turn(session))
    page = await storage.list_messages(session.id, session.chatbot_id, limit=10)
    assert len(page.data) == 1


async def test_on_a_full_disk_nothing_is_half_written_and_reads_go_on(
    storage: SQLiteStorage, path: Path
) -> None:
    session = await _session(storage)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    begun = 0
    try:
        limit = Path(f"{path}-wal").stat().st_size + 300_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(StorageUnavailable, match="sqlite: .*chatd.db"):
            for _ in range(100):
                request = a_turn(session, "x" * 10_000, "y" * 10_000)
                await storage.begin_turn(request)
                await storage.finish_turn(FinishTurn(request.turn_id, TurnStatus.FAILED))
                begun += 1
        assert begun > 0
        page = await storage.list_messages(session.id, session.chatbot_id, limit=1000)
        assert len(page.data) in (2 * begun, 2 * begun + 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await storage.sweep()
    await storage.check()
    assert await storage.create_session(Session(new_id(), session.chatbot_id)) is None
    assert apsw.Connection(str(path)).pragma("integrity_check") == "ok"


async def test_a_file_that_may_not_be_written_is_said_to_be_read_only() -> None:
    # Root may write anything, so the test becomes nobody for a while.
    folder = Path(tempfile.mkdtemp())
    path = folder / "chatd.db"
    await (await open_sqlite({"path": str(path)})).close()
    folder.chmod(0o555)
    path.chmod(0o444)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(PluginError, match="read-only|cannot be opened"):
            await open_sqlite({"path": str(path)})
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    text = b"these are my notes, not a database\n" * 100
    path.write_bytes(text)
    with pytest.raises(PluginError, match="is not a SQLite database"):
        await open_sqlite({"path": str(path)})
    assert path.read_bytes() == text


async def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"nowhere/chatd\.db cannot be opened"):
        await open_sqlite({"path": str(tmp_path / "nowhere" / "chatd.db")})


async def test_a_database_of_a_newer_chatd_is_refused(path: Path) -> None:
    await (await open_sqlite({"path": str(path)})).close()
    connection = apsw.Connection(str(path))
    connection.execute("INSERT INTO chatd_schema VALUES (999)")
    connection.close()
    with pytest.raises(PluginError, match="written by a newer chatd"):
        await open_sqlite({"path": str(path)})


async def test_a_server_that_starts_alone_ends_the_turns_of_its_predecessor_at_once(
    path: Path,
) -> None:
    first = await open_sqlite({"path": str(path)})
    await first.sweep()
    session = await _session(first)
    lost = a_turn(session, lease_seconds=3600)
    await first.begin_turn(lost)
    second = await open_sqlite({"path": str(path)})
    assert await second.sweep() == 0, "the first server still holds the file"
    await first.close()
    await second.close()
    third = await open_sqlite({"path": str(path)})
    assert await third.sweep() == 1
    record = await third.get_turn(lost.turn_id, session.chatbot_id)
    assert record is not None
    assert record.status is TurnStatus.INTERRUPTED
    await third.close()


async def test_a_closed_storage_says_so(path: Path) -> None:
    storage = await open_sqlite({"path": str(path)})
    await storage.close()
    with pytest.raises(StorageUnavailable, match="closed"):
        await storage.get_chatbot(new_id())
    await storage.close()


async def test_history_of_a_long_session_is_read_only_as_far_as_the_budget_goes(
    storage: SQLiteStorage, path: Path
) -> None:
    session = await _session(storage)
    writer = apsw.Connection(str(path))
    with writer:
        writer.executemany(
            "INSERT INTO conversations (session_id, role, content) VALUES (?, ?, ?)",
            ((session.id, "user", f"message {i}") for i in range(10_000)),
        )
    writer.close()
    begun = await storage.begin_turn(a_turn(session, history_chars=2800))
    assert [m.content for m in begun.history][-1] == "message 9999"  # type: ignore[union-attr]
    assert len(begun.history) == 100  # type: ignore[union-attr]


def with_sqlite(text: str, folder: Path) -> str:
    """A configuration on a file that is not waited for long."""
    return text.replace(
        "%(storage)s", f"{{use: sqlite, path: {folder}/chatd.db, busy_timeout: 0.1}}"
    )


async def test_storage_that_does_not_answer_is_a_503_and_comes_back_by_itself(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(with_sqlite(ECHO_CONFIG, tmp_path))
    bot = await served.add_bot()
    session = await served.session(bot)
    other = apsw.Connection(str(tmp_path / "chatd.db"))
    other.execute("BEGIN IMMEDIATE")
    answer = await served.chat(bot, session, "hi")
    problem = assert_problem(answer, 503, "storage_unavailable")
    assert answer.headers["Retry-After"] == "2"
    assert "sqlite" not in problem["detail"]
    assert_problem(await served.get("/readyz"), 503, "storage_unavailable")
    assert (await served.get("/healthz")).status == 200
    other.execute("ROLLBACK")
    other.close()
    assert (await served.get("/readyz")).status == 200
    assert (await served.chat(bot, session, "hi")).status == 200


async def test_an_answer_is_given_although_it_cannot_be_stored_and_is_stored_later(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(with_sqlite(SLOW_CONFIG, tmp_path))
    bot = await served.add_bot()
    session = await served.session(bot)
    waiting = asyncio.create_task(served.chat(bot, session, "hi"))
    await asyncio.sleep(0.2)
    other = apsw.Connection(str(tmp_path / "chatd.db"))
    other.execute("BEGIN IMMEDIATE")
    answer = await waiting
    other.execute("ROLLBACK")
    other.close()
    assert (answer.status, answer.json["stored"]) == (200, False)
    assert answer.json["response"] == "You said: hi"
    for _ in range(100):
        if len(transcript := await served.transcript(bot, session)) == 2:
            break
        await asyncio.sleep(0.05)
    assert transcript == [("user", "hi"), ("assistant", "You said: hi")]


async def test_a_database_that_is_removed_under_the_server_is_noticed(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(with_sqlite(ECHO_CONFIG, tmp_path))
    assert (await served.get("/readyz")).status == 200
    (tmp_path / "chatd.db").rename(tmp_path / "elsewhere.db")
    assert_problem(await served.get("/readyz"), 503, "storage_unavailable")
    (tmp_path / "elsewhere.db").rename(tmp_path / "chatd.db")
    assert (await served.get("/readyz")).status == 200


async def test_a_turn_that_nobody_waits_for_any_more_is_not_begun(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatd.bookkeeping.BEGIN_SECONDS", 0.3)
    served = await serve(with_sqlite(ECHO_CONFIG, tmp_path).replace("0.1}", "20}"))
    bot = await served.add_bot()
    session = await served.session(bot)
    other = apsw.Connection(str(tmp_path / "chatd.db"))
    other.execute("BEGIN IMMEDIATE")
    assert_problem(await served.chat(bot, session, "hi"), 503, "storage_unavailable")
    other.execute("ROLLBACK")
    other.close()
    await asyncio.sleep(0.5)
    assert (await served.chat(bot, session, "again")).status == 200
    transcript = await served.transcript(bot, session)
    assert [text for _, text in transcript if text != "hi"] == ["again", "You said: again"]


async def test_a_turn_that_is_beginning_when_the_server_stops_is_finished(
    serve: Serve, tmp_path: Path
) -> None:
    served = await serve(with_sqlite(SLOW_CONFIG, tmp_path).replace("0.1}", "20}"))
    bot = await served.add_bot()
    session = await served.session(bot)
    other = apsw.Connection(str(tmp_path / "chatd.db"))
    other.execute("BEGIN IMMEDIATE")
    asked = asyncio.create_task(served.chat(bot, session, "hi"))
    await asyncio.sleep(0.2)
    draining = asyncio.create_task(served.runtime.services.turns.drain(20))
    await asyncio.sleep(0.1)
    other.execute("ROLLBACK")
    other.close()
    await draining
    answer = await asked
    assert (answer.status, answer.json["response"]) == (200, "You said: hi")
    assert answer.json["stored"] is True


async def test_every_older_database_is_brought_to_the_newest_version(tmp_path: Path) -> None:
    newest = len(MIGRATIONS)
    assert newest == 5
    for version in range(newest + 1):
        path = tmp_path / f"{version}.db"
        connection = apsw.Connection(str(path))
        connection.execute("CREATE TABLE chatd_schema (version INTEGER NOT NULL) STRICT")
        for number, script in enumerate(MIGRATIONS[:version], start=1):
            connection.execute(script)
            connection.execute("INSERT INTO chatd_schema VALUES (?)", (number,))
        connection.close()
        await (await open_sqlite({"path": str(path)})).close()
        connection = apsw.Connection(str(path))
        assert connection.execute("SELECT max(version) FROM chatd_schema").get == newest
        connection.close()


async def test_a_database_of_version_2_keeps_its_turns_and_totals_them(path: Path) -> None:
    bot, session, turn = a_chatbot(), new_id(), new_id()
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE chatd_schema (version INTEGER NOT NULL) STRICT")
    for number, script in enumerate(MIGRATIONS[:2], start=1):
        connection.execute(script)
        connection.execute("INSERT INTO chatd_schema VALUES (?)", (number,))
    connection.execute(
        "INSERT INTO chatbots (id, api_key, model_name, name, settings)"
        " VALUES (:bot, 'sha256:00', 'm', 'Bot', '{}');"
        "INSERT INTO sessions (session_id, chatbot_id) VALUES (:session, :bot);"
        "INSERT INTO turns (turn_id, seq, session_id, status, lease_until, cost_usd, started_at)"
        " VALUES (:turn, 1, :session, 'completed', 0, 0.25, 1709164800)",
        {"bot": bot.id, "session": session, "turn": turn},
    )
    connection.close()
    storage = await open_sqlite({"path": str(path)})
    record = await storage.get_turn(turn, bot.id)
    assert record is not None
    assert (record.usage.cost_usd, record.side) == (0.25, None)
    for _ in ("stored", "erased"):
        (total,) = await storage.usage_totals(by="day")
        assert (total.key, total.turns, total.cost_usd) == ("2024-02-29", 1, 0.25)
        await storage.delete_session(session, bot.id)
    await storage.close()


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        ({"since": True, "until": True}, "turns_by_start"),
        ({"chatbot_id": True, "since": True, "until": True}, "turns_by_start"),
        ({"chatbot_id": True}, "turns_of_session"),
    ],
)
async def test_usage_of_a_day_or_a_chatbot_does_not_read_all_turns(
    storage: SQLiteStorage, path: Path, asked: dict[str, bool], index: str
) -> None:
    given = {"chatbot_id": new_id(), "since": datetime.now(UTC), "until": datetime.now(UTC)}
    known = {name: value if name in asked else None for name, value in given.items()}
    sql, values = usage_query("day", **known)  # type: ignore[arg-type]
    connection = apsw.Connection(str(path))
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    connection.close()
    assert any(index in step for step in plan), plan
    assert not any(step.startswith(("SCAN t", "SCAN s")) for step in plan), plan


@pytest.mark.parametrize("where", ["", " AND lease_until <= unixepoch('subsec')"])
async def test_a_sweep_reads_only_turns_that_run(
    storage: SQLiteStorage, path: Path, where: str
) -> None:
    connection = apsw.Connection(str(path))
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {INTERRUPT}{where}")]
    connection.close()
    assert plan == ["SCAN turns USING INDEX one_running_turn"]


async def test_attempts_that_are_no_strict_json_are_stored_all_the_same(
    storage: SQLiteStorage,
) -> None:
    session = await _session(storage)
    request = a_turn(session)
    await storage.begin_turn(request)
    attempts = ({"error": "half of a pair: \ud800", "ms": 2**70},)
    await storage.finish_turn(
        FinishTurn(request.turn_id, TurnStatus.COMPLETED, "Hi", attempts=attempts)
    )
    record = await storage.get_turn(request.turn_id, session.chatbot_id)
    assert record is not None
    assert record.attempts == list(attempts)


# What is erased


def _holds(path: Path, text: str) -> bool:
    """Whether the files of a database hold a text anywhere."""
    files = [path, *path.parent.glob(f"{path.name}-*")]
    return any(text.encode() in file.read_bytes() for file in files)


async def test_of_what_was_erased_nothing_is_left_in_the_files_and_they_shrink(
    storage: SQLiteStorage, path: Path
) -> None:
    kept = await _session(storage)
    erased = [Session(new_id(), kept.chatbot_id, "api", "ann-of-0815") for _ in range(20)]
    for session in erased:
        await storage.create_session(session)
    for number in range(60):
        for session in (kept, erased[number % 20]):
            secret = session is not kept
            said = "a secret of Ann " * 40 if secret else "nothing to hide " * 40
            request = a_turn(session, said)
            await storage.begin_turn(request)
            done = FinishTurn(request.turn_id, TurnStatus.COMPLETED, said * (1 + number % 5 * 4))
            await storage.finish_turn(done)
            await storage.rate_turn(request.turn_id, session.id, "up", f"comment {secret}")
    await storage.reclaim()
    before = path.stat().st_size
    assert _holds(path, "a secret of Ann")
    assert _holds(path, "comment True")
    for session in erased:
        assert await storage.delete_session(session.id, session.chatbot_id)
    await storage.reclaim()
    for trace in ("secret of Ann", "ann-of-0815", "comment True", erased[0].id):
        assert not _holds(path, trace), trace
    assert path.stat().st_size < before * 0.7
    assert Path(f"{path}-wal").stat().st_size == 0
    page = await storage.list_messages(kept.id, kept.chatbot_id, limit=1000)
    assert len(page.data) == 120


async def test_an_older_file_keeps_its_space_until_it_is_vacuumed(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE chatd_schema (version INTEGER NOT NULL) STRICT")
    connection.close()
    storage = await open_sqlite({"path": str(path)})
    session = await _session(storage)
    request = a_turn(session, "a secret of Ann " * 20_000)
    await storage.begin_turn(request)
    await storage.reclaim()
    before = path.stat().st_size
    await storage.delete_session(session.id, session.chatbot_id)
    await storage.reclaim()
    assert not _holds(path, "secret of Ann")
    assert path.stat().st_size == before
    await storage.close()
    apsw.Connection(str(path)).execute("PRAGMA auto_vacuum = 2; VACUUM")
    assert path.stat().st_size < before / 2
    connection = apsw.Connection(str(path))
    assert connection.pragma("auto_vacuum") == 2
