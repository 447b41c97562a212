"""The main table: plain turns, latency, first tokens, memory and cold starts of all subjects."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from chatd_plugins.postgres import open_postgres
from chatd_plugins.sqlite import open_sqlite

from bench import subjects
from bench.rounds import Plan, Rounds, cold_starts
from bench.seeding import DEFAULT, Seeds, add_chatbot, add_sessions
from bench.subjects import Mock, Subject
from bench.targets import Samples, verdicts
from chatd.storage import Storage
from tests.postgres import Supabase, jwt


def on_sqlite(folder: Path, seeds: Seeds = DEFAULT) -> Subject:
    """chatd on a new SQLite file, which a power cut does no harm."""
    folder.mkdir(parents=True)
    sessions = asyncio.run(_seed_sqlite(folder, seeds))
    return subjects.chatd("sqlite", folder, {"use": "sqlite", "path": "chatd.db"}, sessions)


async def _seed_sqlite(folder: Path, seeds: Seeds) -> list[str]:
    return await seed(await open_sqlite({"path": str(folder / "chatd.db")}), seeds)


def on_postgresql(folder: Path, database: Supabase) -> list[Subject]:
    """Those whose turns are stored in PostgreSQL, all with sessions of their own."""
    key, url = jwt("service_role"), database.postgrest.url
    sessions = asyncio.run(_seed_postgres(database.postgres.url, 4))
    supabase = {"use": "supabase", "url": url, "rest_path": "", "key": key}
    postgres = {"use": "postgres", "url": database.postgres.url}
    return [
        subjects.chatd("supabase", folder / "supabase", supabase, sessions[0]),
        subjects.chatd("postgres", folder / "postgres", postgres, sessions[1]),
        subjects.fastapi("async", folder / "fastapi_async", url, key, sessions[2]),
        subjects.fastapi("sync", folder / "fastapi_sync", url, key, sessions[3]),
    ]


async def _seed_postgres(url: str, times: int) -> list[list[str]]:
    found = []
    for number in range(times):
        storage = await open_postgres({"url": url})
        found.append(await seed(storage, DEFAULT, chatbot=number == 0))
    return found


async def seed(storage: Storage, seeds: Seeds, *, chatbot: bool = True) -> list[str]:
    """The sessions that were put into a storage, which is closed then."""
    try:
        if chatbot:
            await add_chatbot(storage, seeds)
        return await add_sessions(storage, seeds)
    finally:
        await storage.close()


def measure(
    stack: ExitStack,
    chosen: Sequence[Subject],
    mock: Mock,
    samples: Samples,
    plan: Plan,
    cores: tuple[frozenset[int], frozenset[int]],
) -> None:
    """Starts the subjects, measures them in turn, and ends them."""
    server, load = cores
    for subject in chosen:
        stack.callback(subject.close)
        subject.start(mock.url, server)
    rounds = Rounds(mock, chosen, samples, load)
    rounds.idle()
    rounds.warm_up()
    rounds.saturate(plan)
    for _ in range(plan.again):
        if any(verdict.missed for verdict in verdicts(samples, short=True)):
            rounds.saturate(plan)
    rounds.timed(plan)
    rounds.first_tokens(plan)
    cold_starts(chosen, samples, mock, server, plan.starts)
