"""`chatd storage copy`, between real storages: everything arrives, once, whatever breaks it off."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apsw
import pytest
from chatd_plugins.postgres import open_postgres
from chatd_plugins.sqlite import open_sqlite
from chatd_plugins.supabase import SCHEMA_VERSION

from chatd.domain import (
    ChatbotSettings,
    Session,
    TurnStatus,
    Usage,
    new_id,
)
from chatd.storage import BegunTurn, FinishTurn, Storage
from chatd.testing.storage import a_chatbot, a_turn
from tests.postgres import ROOT, Supabase, jwt
from tests.support import chatd_command, clean_env
from tests.test_cli import added, fetch, say, serving, session_of

SCHEMA = (ROOT / "schema.sql").read_text()


@pytest.fixture
def supabase(database: Supabase, tmp_path: Path) -> Supabase:
    """An empty Supabase, which the configuration supabase.yaml here uses."""
    database.empty()
    storage = database.configured("supabase")
    (tmp_path / "supabase.yaml").write_text(f"storage: {storage}\n")
    return database


@pytest.fixture
def other(database: Supabase) -> Iterator[str]:
    """The address of another database, with the schema and no rows."""
    database.postgres.execute("CREATE DATABASE other;")
    url = database.postgres.url.removesuffix("/postgres") + "/other"
    command = [str(database.postgres.bin / "psql"), url, "-Xq", "-v", "ON_ERROR_STOP=1"]
    subprocess.run(command, input=SCHEMA, text=True, check=True, capture_output=True)
    yield url
    database.postgres.execute("DROP DATABASE other WITH (FORCE);")


def copied(folder: Path, source: str, target: str, *more: str, **env: str) -> dict[str, Any]:
    """What `chatd storage copy --json` tells of a copy that succeeds."""
    done = copy(folder, source, target, "--json", *more, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["source"] == told["target"]
    return dict(told)


def copy(
    folder: Path, source: str, target: str, *more: str, **env: str
) -> subprocess.CompletedProcess[str]:
    words = ["storage", "copy", "--from", source, "--to", target, *more]
    return chatd_command(*words, cwd=folder, env=env)


async def everything(storage: Storage) -> dict[str, Any]:
    """All that a storage holds, but for the ids of messages."""
    held: dict[str, Any] = {}
    for chatbot in await storage.list_chatbots():
        held[chatbot.id] = dataclasses.replace(chatbot, updated_at=None)
    for session in await storage.list_sessions(limit=1_000_000):
        messages: list[Any] = []
        turns: dict[str, Any] = {}
        more = True
        while more:
            part = await storage.export_session(session.id, place=len(messages))
            assert part is not None
            places = {m.id: part.place + i for i, m in enumerate(part.messages)}
            messages += [dataclasses.replace(m, id=0) for m in part.messages]
            for turn in part.turns:
                known = turns.get(turn.turn.id)
                reply = places.get(turn.reply_id or 0, known.reply_id if known else None)
                turns[turn.turn.id] = dataclasses.replace(turn, reply_id=reply)
            more = part.more
        held[session.id] = (session, messages, list(turns.values()))
    return held


async def in_sqlite(path: Path) -> dict[str, Any]:
    storage = await open_sqlite({"path": str(path)})
    try:
        return await everything(storage)
    finally:
        await storage.close()


async def in_postgres(url: str) -> dict[str, Any]:
    storage = await open_postgres({"url": url, "timeout": 30})
    try:
        return await everything(storage)
    finally:
        await storage.close()


async def fill(path: Path, sessions: int = 20, long: int = 0) -> None:
    """A database with all that can be in one."""
    storage = await open_sqlite({"path": str(path), "synchronous": "off"})
    chatbots = [
        a_chatbot(name=f"Bot {i}", settings=ChatbotSettings("Be kind. 💬", 4000)) for i in range(2)
    ]
    for chatbot in chatbots:
        await storage.add_chatbot(chatbot)
    for i in range(sessions):
        session = Session(
            new_id(), chatbots[i % 2].id, "widget" if i % 3 else None, f"v{i}", {"é": [1, {"a": i}]}
        )
        await storage.create_session(session)
        for n in range(i % 4):
            key = {"idempotency_key": f"k{n}", "request_hash": f"{i} {n}".encode()} if n % 2 else {}
            turn = a_turn(session, f"q{n} 🏳️‍🌈 漢", "and more", label="custom_code", **key)
            begun = await storage.begin_turn(turn)
            assert isinstance(begun, BegunTurn)
            status = [TurnStatus.COMPLETED, TurnStatus.FAILED, TurnStatus.STOPPED][n % 3]
            await storage.finish_turn(
                FinishTurn(
                    begun.turn_id,
                    status,
                    reply=None if status is TurnStatus.FAILED else f"a{n} 👋",
                    model="m",
                    provider="p",
                    finish_reason="stop",
                    usage=Usage(10, 20, None, 3, 0.1 + 0.2),
                    attempts=[{"provider": "p", "ms": 1.5, "error": None}],
                    rerunnable=status is TurnStatus.FAILED,
                    side=[None, "main/m"][n % 2],
                )
            )
            if n == 0:
                await storage.rate_turn(begun.turn_id, session.id, "up", "Great! 👍")
    big = Session(new_id(), chatbots[0].id)
    await storage.create_session(big)
    turn = a_turn(big, "a megabyte")
    await storage.begin_turn(turn)
    await storage.finish_turn(FinishTurn(turn.turn_id, TurnStatus.COMPLETED, "x💬" * 2**19))
    first, endless = (Session(new_id(), chatbots[1].id) for _ in range(2))
    for session in (first, endless):
        await storage.create_session(session)
    await storage.close()
    connection = apsw.Connection(str(path))
    with connection:
        rows = [(first.id, role, f"of the first version {i}", 1.7e9 + i) for i, role in
                enumerate(["user", "assistant"] * 3)]  # fmt: skip
        rows += [(endless.id, "user", f"message {i} 💬", 1.7e9 + i / 1000) for i in range(long)]
        connection.executemany(
            "INSERT INTO conversations (session_id, role, content, timestamp) VALUES (?, ?, ?, ?)",
            rows,
        )
    connection.close()


async def test_everything_goes_to_supabase_to_postgresql_and_back(
    supabase: Supabase, other: str, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", long=10_000)
    before = await in_sqlite(tmp_path / "chatd.db")
    told = copied(tmp_path, "sqlite", "supabase.yaml")
    assert told["source"]["sessions"] == 23
    assert told["source"]["messages"] > 10_000
    assert await in_postgres(supabase.postgres.url) == before
    copied(tmp_path, "supabase.yaml", "postgres", DATABASE_URL=other)
    assert await in_postgres(other) == before
    copied(tmp_path, "postgres", "sqlite", DATABASE_URL=other, CHATD_DB="back.db")
    assert await in_sqlite(tmp_path / "back.db") == before


async def test_a_name_takes_the_settings_that_chatd_carries_and_a_second_run_adds_nothing(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", sessions=4)
    env = {"DATABASE_URL": supabase.postgres.url}
    first = copy(tmp_path, "sqlite", "postgres", **env)
    assert (first.returncode, first.stderr) == (0, "")
    rows = dict(re.findall(r"^(\w+) +([\d,]+) +\2$", first.stdout, re.MULTILINE))
    assert rows.keys() == {"chatbots", "sessions", "messages", "turns"}
    count = "SELECT count(*), max(id) FROM conversations;"
    before = supabase.postgres.execute(count)
    copied(tmp_path, "sqlite", "postgres", **env)
    assert supabase.postgres.execute(count) == before


async def test_a_copy_that_is_killed_goes_on_and_says_nothing_twice(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", sessions=400, long=20_000)
    before = await in_sqlite(tmp_path / "chatd.db")
    command = [sys.executable, "-m", "chatd", "storage", "copy", "--from", "sqlite"]
    command += ["--to", "supabase.yaml"]
    choose = random.Random(7)
    killed = 0
    for seconds in sorted(choose.uniform(0.6, 3.5) for _ in range(6)):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        time.sleep(seconds)
        process.kill()
        process.communicate()
        killed += process.returncode == -9
    assert killed > 0
    copied(tmp_path, "sqlite", "supabase.yaml")
    assert await in_postgres(supabase.postgres.url) == before


async def test_other_chatbots_of_the_target_stay_as_they_are(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "other.db", sessions=8)
    await fill(tmp_path / "chatd.db", sessions=8)
    theirs, ours = await in_sqlite(tmp_path / "other.db"), await in_sqlite(tmp_path / "chatd.db")
    copied(tmp_path, "sqlite", "supabase.yaml", CHATD_DB="other.db")
    copied(tmp_path, "sqlite", "supabase.yaml")
    assert await in_postgres(supabase.postgres.url) == theirs | ours


async def test_a_chatbot_of_the_target_is_made_equal_and_it_is_said_in_what(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", sessions=1)
    copied(tmp_path, "sqlite", "supabase.yaml")
    bot = json.loads(chatd_command("bots", "list", "--json", cwd=tmp_path).stdout)[0]["id"]
    changes = ["--name", "New", "--temperature", "0.5"]
    assert chatd_command("bots", "set", bot, *changes, cwd=tmp_path).returncode == 0
    assert chatd_command("bots", "rotate-key", bot, cwd=tmp_path).returncode == 0
    (told,) = copied(tmp_path, "sqlite", "supabase.yaml")["changed"]
    assert told == f'"New" ({bot}) has the source\'s name, temperature, API key now'
    assert await in_postgres(supabase.postgres.url) == await in_sqlite(tmp_path / "chatd.db")


async def test_a_key_that_is_another_chatbots_in_the_target_is_told(
    supabase: Supabase, tmp_path: Path
) -> None:
    known = ["--api-key", "the-same-key-for-two-chatbots"]
    chatd_command("bots", "add", *known, "--name", "Mine", cwd=tmp_path)
    (tmp_path / "there.yaml").write_text("storage: {use: sqlite, path: there.db}\n")
    env = {"CHATD_DB": "there.db"}
    chatd_command("bots", "add", *known, "--name", "Theirs", cwd=tmp_path, env=env)
    done = copy(tmp_path, "sqlite", "there.yaml")
    assert done.returncode == 1
    assert 'the API key of "Mine"' in done.stderr
    assert 'that of "Theirs"' in done.stderr


async def test_a_session_that_went_on_in_the_target_is_named_and_left(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", sessions=6)
    copied(tmp_path, "sqlite", "supabase.yaml")
    target = await open_postgres({"url": supabase.postgres.url})
    session = (await target.list_sessions(limit=1))[0]
    await target.begin_turn(a_turn(session, "said there"))
    held = await everything(target)
    done = copy(tmp_path, "sqlite", "supabase.yaml")
    assert done.returncode == 1
    assert f"session {session.id}: it went on by itself in the target" in done.stderr
    assert await everything(target) == held
    await target.close()


async def test_a_server_may_talk_on_the_source_and_a_second_run_completes(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", sessions=200)
    with serving(tmp_path) as server, ThreadPoolExecutor(2) as pool:
        bot = added(tmp_path, "--name", "Talker")
        sessions = [session_of(server.url, bot).json["session_id"] for _ in range(4)]

        def talk(session: str) -> None:
            for i in range(40):
                assert say(server.url, bot, session, f"{i}").status == 200

        talking = [pool.submit(talk, session) for session in sessions]
        first = copy(tmp_path, "sqlite", "supabase.yaml")
        assert first.returncode in (0, 1)
        assert "Traceback" not in first.stderr
        for each in talking:
            await asyncio.to_thread(each.result)
        assert server.stop() == 0
    copied(tmp_path, "sqlite", "supabase.yaml")
    assert await in_postgres(supabase.postgres.url) == await in_sqlite(tmp_path / "chatd.db")


async def test_a_turn_that_runs_at_the_source_is_named_and_copied_when_it_ended(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", sessions=3)
    source = await open_sqlite({"path": str(tmp_path / "chatd.db")})
    await source.sweep()
    session = (await source.list_sessions(limit=1))[0]
    turn = a_turn(session, "still thinking", lease_seconds=60)
    await source.begin_turn(turn)
    done = copy(tmp_path, "sqlite", "supabase.yaml")
    assert done.returncode == 1
    assert f"1 sessions differ: {session.id}" in done.stderr
    assert "stop it and run this again" in done.stderr
    await source.finish_turn(FinishTurn(turn.turn_id, TurnStatus.COMPLETED, "done"))
    copied(tmp_path, "sqlite", "supabase.yaml")
    assert await in_postgres(supabase.postgres.url) == await everything(source)
    await source.rate_turn(turn.turn_id, session.id, "down", None)
    copied(tmp_path, "sqlite", "supabase.yaml")
    assert await in_postgres(supabase.postgres.url) == await everything(source)
    await source.close()


async def test_a_server_goes_on_where_the_copy_is(supabase: Supabase, tmp_path: Path) -> None:
    bot = added(tmp_path, "--name", "Mover")
    with serving(tmp_path) as server:
        session = session_of(server.url, bot).json["session_id"]
        assert say(server.url, bot, session, "before").status == 200
        assert server.stop() == 0
    env = {"DATABASE_URL": supabase.postgres.url}
    copied(tmp_path, "sqlite", "postgres", **env)
    config = str(ROOT / "config" / "postgres.yaml")
    with serving(tmp_path, "--config", config, env=env) as server:
        assert fetch(f"{server.url}/readyz").status == 200
        assert say(server.url, bot, session, "after").status == 200
        assert server.stop() == 0
    (said,) = (
        messages
        for held, messages, _ in (
            v for v in (await in_postgres(supabase.postgres.url)).values() if isinstance(v, tuple)
        )
        if held.id == session
    )
    assert [m.content for m in said if m.role == "user"] == ["before", "after"]


# What cannot be copied


def test_what_is_named_wrongly_is_told_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "chatd.db")
    (tmp_path / "same.yaml").write_text("storage: {use: sqlite, path: ./link.db}\n")
    (tmp_path / "broken.yaml").write_text("storage: {use: sqlite, paht: x}\nproviders: 7\n")
    wrong = {"SUPABASE_URL": "http://127.0.0.1:9", "SUPABASE_KEY": jwt("anon")}
    for source, target, told, env in [
        ("sqlite", "supabase.yml", "supabase.yml: cannot be read", {}),
        ("sqlite", "postgers", 'did you mean "postgres"?', {}),
        ("sqlite", "supabase", "the environment variable SUPABASE_URL is not set", {}),
        ("sqlite", "same.yaml", "--from and --to are the same: sqlite", {}),
        ("sqlite", "broken.yaml", "broken.yaml:1: storage.paht: unknown key", {}),
        ("sqlite", "supabase", f"there is no database at {tmp_path / 'chatd.db'}", wrong),
    ]:
        done = copy(tmp_path, source, target, **env)
        assert done.returncode == 1, told
        assert told in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "chatd.db").exists()


async def test_a_target_that_cannot_be_used_is_told_before_anything_is_written(
    supabase: Supabase, tmp_path: Path
) -> None:
    empty = await open_sqlite({"path": str(tmp_path / "chatd.db")})
    await empty.close()
    nothing = copy(tmp_path, "sqlite", "supabase.yaml")
    assert nothing.returncode == 1
    assert f"there is no chatbot in sqlite {tmp_path / 'chatd.db'}" in nothing.stderr
    await fill(tmp_path / "chatd.db", sessions=1)
    good = (tmp_path / "supabase.yaml").read_text()
    key = jwt("service_role")
    (tmp_path / "wrong.yaml").write_text(good.replace(key, key[:-4] + "AAAA"))
    wrong = copy(tmp_path, "sqlite", "wrong.yaml")
    assert wrong.returncode == 1
    assert "SUPABASE_KEY is not this project's secret key" in wrong.stderr
    version = "CREATE OR REPLACE FUNCTION public.chatd_schema_version() RETURNS integer"
    version += " LANGUAGE sql STABLE SET search_path = '' AS ' SELECT {} '"
    supabase.postgres.execute(version.format(1))
    try:
        old = copy(tmp_path, "sqlite", "supabase.yaml")
    finally:
        supabase.postgres.execute(version.format(SCHEMA_VERSION))
    assert old.returncode == 1
    assert "run schema.sql again" in old.stderr
    assert supabase.postgres.execute("SELECT count(*) FROM chatbots;").strip() == "0"


async def test_a_storage_that_goes_away_is_told_and_the_next_run_goes_on(
    supabase: Supabase, tmp_path: Path
) -> None:
    await fill(tmp_path / "chatd.db", sessions=600)
    config = (tmp_path / "supabase.yaml").read_text()
    (tmp_path / "supabase.yaml").write_text(config.replace("}", ", timeout: 0.5}"))
    running = asyncio.create_task(asyncio.to_thread(copy, tmp_path, "sqlite", "supabase.yaml"))
    while supabase.postgres.execute("SELECT count(*) FROM sessions;").strip() == "0":
        await asyncio.sleep(0.02)
    supabase.postgrest.stop()
    done = await running
    await asyncio.to_thread(supabase.postgrest.start)
    assert done.returncode == 1
    assert "Run it again; it goes on where it stopped" in done.stderr
    copied(tmp_path, "sqlite", "supabase.yaml")
    assert await in_postgres(supabase.postgres.url) == await in_sqlite(tmp_path / "chatd.db")
