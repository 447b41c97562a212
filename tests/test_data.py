"""What is kept of people and no longer: `chatd export`, `chatd erase`, `chatd retention`."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from chatd_plugins.postgres import open_postgres
from chatd_plugins.sqlite import open_sqlite
from click.testing import CliRunner

from chatd.cli import main
from chatd.domain import Chatbot, ChatbotSettings, Session, TurnStatus, Usage, new_id
from chatd.storage import FinishTurn, Storage
from chatd.testing.storage import a_chatbot, a_turn
from chatd.testing.storage.base import begin, complete, past
from chatd.validation import schema
from tests.conftest import Serve
from tests.postgres import ROOT, Supabase
from tests.support import KEY, chatd_command
from tests.test_cli import serving, wait_for

SLOW = """
storage: %(storage)s
providers:
  main: {use: echo, reply: "You told me: {message}", word_seconds: 0.2}
models:
  - {match: "*", ask: [main]}
"""


async def opened(folder: Path) -> Storage:
    return await open_sqlite({"path": str(folder / "chatd.db")})


async def a_kept_bot(storage: Storage, days: int | None, **more: Any) -> Chatbot:
    """A chatbot whose sessions are kept for so long."""
    bot = a_chatbot(settings=ChatbotSettings(retention_days=days), **more)
    await storage.add_chatbot(bot)
    return bot


def days_ago(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def command(folder: Path, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    done = chatd_command(*words, cwd=folder, **more)
    assert done.returncode == 0, done.stderr
    return done


def on_a_terminal(folder: Path, *words: str) -> tuple[str, str]:
    """What a command prints, and what it shows where stderr is a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "chatd", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # the other side is closed
    finally:
        os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    return out, shown.decode()


async def files_hold(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.glob("chatd.db*"))


# Retention


async def test_a_server_erases_at_its_start_what_is_too_old_and_says_how_much(
    tmp_path: Path,
) -> None:
    storage = await opened(tmp_path)
    kept, mortal = await a_kept_bot(storage, None), await a_kept_bot(storage, 30)
    old = [await past(storage, mortal, days_ago(31)) for _ in range(3)]
    left = [await past(storage, mortal, days_ago(29)), await past(storage, kept, days_ago(3000))]
    before = await storage.usage_totals(by="day", chatbot_id=mortal.id)
    with serving(tmp_path) as server:
        wait_for(lambda: "retention erased" in server.stdout)
        assert f"retention erased 3 sessions of chatbot {mortal.id}" in server.stdout
    assert [await storage.get_session(session.id) for session in old] == [None] * 3
    assert all([await storage.get_session(session.id) for session in left])
    assert await storage.usage_totals(by="day", chatbot_id=mortal.id) == before
    await storage.close()


async def test_by_hand_it_erases_of_one_chatbot_or_of_all(tmp_path: Path) -> None:
    storage = await opened(tmp_path)
    bots = [await a_kept_bot(storage, 7, name=name) for name in ("Ann", "Bob")]
    for bot in bots:
        await past(storage, bot, days_ago(8))
        await past(storage, bot, days_ago(8))
    done = command(tmp_path, "retention", "Bob")
    assert done.stdout == '"Bob": erased 2 sessions older than 7 days\n'
    assert json.loads(command(tmp_path, "retention", "--json").stdout) == {
        bots[0].id: 2,
        bots[1].id: 0,
    }
    assert list(await storage.list_sessions(limit=10)) == []
    await storage.close()


async def test_where_no_chatbot_has_retention_days_nothing_is_erased(tmp_path: Path) -> None:
    storage = await opened(tmp_path)
    session = await past(storage, await a_kept_bot(storage, None), days_ago(3000))
    done = command(tmp_path, "retention")
    assert done.stdout == ""
    assert "--retention-days" in done.stderr
    assert await storage.get_session(session.id) is not None
    await storage.close()


@pytest.mark.alone
async def test_turns_go_on_while_thousands_of_sessions_are_erased(
    tmp_path: Path, serve: Serve, storage_config: str
) -> None:
    served = await serve(SLOW.replace(", word_seconds: 0.2", ""))
    bot = await served.add_bot(retention_days=10)
    storage = served.runtime.services.storage
    await asyncio.gather(*(past(storage, bot, days_ago(20)) for _ in range(5000)))
    session = await served.session(bot)
    job = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "chatd", "retention", "--config", str(tmp_path / "chatd.yaml"),
        cwd=tmp_path,
    )  # fmt: skip
    waits = []
    while job.returncode is None:
        began = asyncio.get_running_loop().time()
        answer = await served.chat(bot, session, "hi")
        waits.append(asyncio.get_running_loop().time() - began)
        assert answer.status == 200
        await asyncio.sleep(0.01)
    assert await job.wait() == 0
    assert max(waits) < 2
    assert [s.id for s in await storage.list_sessions(limit=10)] == [session]


async def test_postgresql_erases_what_is_too_old(database: Supabase, tmp_path: Path) -> None:
    url = database.postgres.url
    storage = await open_postgres({"url": url})
    bot = await a_kept_bot(storage, 30)
    try:
        for _ in range(3):
            await past(storage, bot, days_ago(31))
        left = await past(storage, bot, days_ago(1))
        done = command(
            tmp_path, "retention", bot.id, "--json",
            "--config", str(ROOT / "config" / "postgres.yaml"), env={"DATABASE_URL": url},
        )  # fmt: skip
        assert json.loads(done.stdout) == {bot.id: 3}
        found = await storage.list_sessions(limit=10, chatbot_id=bot.id)
        assert [session.id for session in found] == [left.id]
    finally:
        await storage.remove_chatbot(bot.id)
        await storage.close()


# Export


async def a_talk(storage: Storage, bot: Chatbot) -> Session:
    """A session with all that a session may hold."""
    session = Session(new_id(), bot.id, "widget", "ann", {"plan": "gold"})
    await storage.create_session(session)
    begun = await begin(storage, a_turn(session, "Grüße 👋\nzwei", label="x", idempotency_key="k"))
    done = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "Hi!", "m", "p", "stop", side="p/m")
    await storage.finish_turn(done)
    await storage.settle_turn(begun.turn_id, 1, Usage(1, 2, 3, 4, 0.5))
    await storage.rate_turn(begun.turn_id, session.id, "down", "too short")
    await begin(storage, a_turn(session, "still running"))
    return session


def lines(text: str) -> list[dict[str, Any]]:
    """What was exported; each line is as the schema says."""
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert list(schema("export_line").faults(line)) == [], line
    return found


async def test_an_export_holds_all_that_a_chatbots_sessions_hold_and_nothing_of_others(
    tmp_path: Path,
) -> None:
    storage = await opened(tmp_path)
    bot, other = await a_kept_bot(storage, None, name="Ann"), await a_kept_bot(storage, None)
    session = await a_talk(storage, bot)
    theirs = Session(new_id(), other.id, "api", "ann")
    await storage.create_session(theirs)
    await complete(storage, theirs, "not yours", "no")
    done = command(tmp_path, "export", "Ann")
    assert done.stderr == ""
    told = lines(done.stdout)
    assert [line["type"] for line in told] == ["session", *["turn"] * 2, *["message"] * 3]
    assert told[0]["user_id"] == "ann"
    assert told[0]["metadata"] == {"plan": "gold"}
    first, second = told[1:3]
    assert first["usage"] == {
        "input_tokens": 1,
        "output_tokens": 2,
        "cached_tokens": 3,
        "reasoning_tokens": 4,
        "cost_usd": 0.5,
    }
    assert (first["rating"], first["comment"]) == ("down", "too short")
    assert (first["status"], second["status"]) == ("completed", "running")
    said = [(line["role"], line["content"], line["turn_id"]) for line in told[3:]]
    assert said == [
        ("user", "Grüße 👋\nzwei", first["id"]),
        ("assistant", "Hi!", first["id"]),
        ("user", "still running", second["id"]),
    ]
    assert told[4]["id"] == first["reply_id"]
    assert {line.get("session_id", session.id) for line in told} == {session.id}
    await storage.close()


async def test_an_export_to_a_file_is_whole_private_and_the_same(tmp_path: Path) -> None:
    storage = await opened(tmp_path)
    bot = await a_kept_bot(storage, None)
    for _ in range(20):
        await a_talk(storage, bot)
    await storage.close()
    target = tmp_path / "out.jsonl"
    command(tmp_path, "export", bot.id, "-o", str(target))
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.read_text() == command(tmp_path, "export", bot.id).stdout
    assert len(lines(target.read_text())) == 20 * 6
    assert list(tmp_path.glob("*.part")) == []
    wrong = chatd_command("export", bot.id, "-o", str(tmp_path / "no" / "out"), cwd=tmp_path)
    assert wrong.returncode == 1
    assert "cannot be written: No such file" in wrong.stderr


async def test_a_session_that_is_larger_than_a_part_is_exported_whole_and_once(
    tmp_path: Path,
) -> None:
    storage = await opened(tmp_path)
    bot = await a_kept_bot(storage, None)
    session = Session(new_id(), bot.id)
    await storage.create_session(session)
    for number in range(5):
        await complete(storage, session, f"{number}" * 600_000, "a" * 900_000)
    await storage.close()
    told = lines(command(tmp_path, "export", bot.id).stdout)
    assert [line["seq"] for line in told if line["type"] == "turn"] == [1, 2, 3, 4, 5]
    sizes = [len(line["content"]) for line in told if line["type"] == "message"]
    assert sizes == [600_000, 900_000] * 5


async def test_an_export_has_the_reply_of_each_turn_that_it_has_as_ended_while_turns_end(
    tmp_path: Path,
) -> None:
    storage = await opened(tmp_path)
    session = Session(new_id(), (await a_kept_bot(storage, None)).id)
    await storage.create_session(session)
    for _ in range(300):
        await complete(storage, session, "hi", "Hi!")

    async def talk() -> None:
        while True:
            await complete(storage, session, "and?", "So.")

    talking = asyncio.create_task(talk())
    for _ in range(40):
        part = await storage.export_session(session.id)
        assert part is not None
        replies = {exported.reply_id for exported in part.turns} - {None}
        assert replies <= {message.id for message in part.messages}
    talking.cancel()
    await asyncio.gather(talking, return_exceptions=True)
    await storage.close()


# Erase


async def test_erasing_a_user_leaves_nothing_of_theirs_and_all_of_others(tmp_path: Path) -> None:
    storage = await opened(tmp_path)
    bots = [await a_kept_bot(storage, None, name=name) for name in ("Ann", "Bob")]
    kept = Session(new_id(), bots[0].id, "api", "visitor-2")
    await storage.create_session(kept)
    await complete(storage, kept, "leave this", "left")
    gone: list[Session] = []
    for bot in bots:
        for number in range(10):
            session = Session(new_id(), bot.id, "api", "visitor-1", {"mail": "me@site.example"})
            await storage.create_session(session)
            turn = await complete(storage, session, f"my secret {number}", "your secret")
            await storage.rate_turn(turn, session.id, "up", "secret comment")
            gone.append(session)
    before = await storage.usage_totals(by="day")
    one = command(tmp_path, "erase", "--user", "visitor-1", "--bot", "Bob", "--yes")
    assert one.stdout == "Erased 10 sessions\n"
    rest = command(tmp_path, "erase", "--user", "visitor-1", "--yes", "--json")
    assert json.loads(rest.stdout) == {"sessions": 10}
    for trace in ("visitor-1", "secret", "me@site.example", *(s.id for s in gone)):
        assert not await files_hold(tmp_path, trace), trace
    assert await files_hold(tmp_path, "leave this")
    assert await storage.usage_totals(by="day") == before
    none = command(tmp_path, "erase", "--user", "visitor-1")
    assert none.stdout == "Erased 0 sessions\n"
    await storage.close()


async def test_erasing_asks_first_and_a_no_erases_nothing(tmp_path: Path) -> None:
    storage = await opened(tmp_path)
    session = await a_talk(storage, await a_kept_bot(storage, None, name="Ann"))
    asked = chatd_command("erase", "--user", "ann", cwd=tmp_path, stdin="n\n")
    assert asked.returncode == 1
    assert 'Erase 1 session of the user "ann"?' in asked.stdout
    silent = chatd_command("erase", "--user", "ann", cwd=tmp_path)
    assert silent.returncode == 1
    assert await storage.get_session(session.id) is not None
    assert "Erased 1 session\n" in command(tmp_path, "erase", "--user", "ann", stdin="y\n").stdout
    await storage.close()


async def test_a_turn_that_runs_while_its_user_is_erased_writes_nothing_back(
    tmp_path: Path, serve: Serve
) -> None:
    served = await serve(SLOW)
    bot = await served.add_bot()
    session = await served.session(bot, user_id="ann")
    said = "this is a secret of mine" + " and it takes a while" * 5
    asked = asyncio.create_task(served.chat(bot, session, said, user_id="ann"))
    storage = served.runtime.services.storage
    while await storage.running_turn(session, bot.id) is None:
        await asyncio.sleep(0.02)
    config = ["--config", str(tmp_path / "chatd.yaml")]
    words = ["erase", "--user", "ann", "--yes", *config]
    done = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert done.output == "Erased 1 session\n"
    assert not asked.done(), "it still runs"
    answer = await asked
    assert (answer.status, answer.json["stored"]) == (200, False)
    await storage.reclaim()
    for trace in ("secret of mine", "You told me", session):
        assert not await files_hold(tmp_path, trace), trace
    (total,) = await storage.usage_totals(by="day")
    assert (total.turns, total.interrupted) == (1, 1)


async def test_erasing_leaves_nothing_in_the_tables_of_postgresql(
    database: Supabase, tmp_path: Path
) -> None:
    url = database.postgres.url
    storage = await open_postgres({"url": url})
    bot = await a_kept_bot(storage, None)
    user = f"visitor-{new_id()}"
    try:
        for _ in range(3):
            session = Session(new_id(), bot.id, "api", user)
            await storage.create_session(session)
            await complete(storage, session, f"secret of {user}", f"told {user}")
        config = ["--config", str(ROOT / "config" / "postgres.yaml")]
        words = ["erase", "--user", user, "--yes", *config]
        done = command(tmp_path, *words, env={"DATABASE_URL": url})
        assert done.stdout == "Erased 3 sessions\n"
        for table in ("sessions", "conversations", "turns", "usage_of_erased", "chatbots"):
            rows = f"SELECT count(*) FROM {table} x WHERE x::text LIKE '%{user}%'"
            assert database.postgres.execute(rows) == "0\n", table
    finally:
        await storage.remove_chatbot(bot.id)
        await storage.close()


# Progress


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("export", "Ann", "-o", "out.jsonl"), "Exporting sessions"),
        (("retention",), "Erasing sessions"),
        (("erase", "--user", "ann", "--yes"), "Erasing sessions"),
        (("storage", "copy", "--from", "sqlite", "--to", "other.yaml"), "Copying sessions"),
    ],
)
async def test_long_work_shows_how_far_it_is_on_a_terminal_and_nothing_elsewhere(
    tmp_path: Path, words: Sequence[str], shown: str
) -> None:
    storage = await opened(tmp_path)
    bot = await a_kept_bot(storage, 10, name="Ann")
    await past(storage, bot, days_ago(20))
    for _ in range(3):
        await a_talk(storage, bot)
    await storage.close()
    (tmp_path / "other.yaml").write_text(SLOW.replace("%(storage)s", "{use: sqlite, path: o.db}"))
    _, terminal = on_a_terminal(tmp_path, *words)
    assert shown in terminal
    assert command(tmp_path, *words).stderr == ""
    assert KEY not in terminal
