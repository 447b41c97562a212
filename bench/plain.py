"""The main table: plain turns, latency, first tokens, memory and cold starts of all subjects."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from chatd_plugins.sqlite import open_sqlite

from bench import subjects
from bench.rounds import Plan, Rounds, cold_starts
from bench.seeding import DEFAULT, Seeds, add_chatbot, add_sessions
from bench.subjects import Mock, Subject
from bench.targets import Samples
from chatd.storage import Storage


def on_sqlite(folder: Path, seeds: Seeds = DEFAULT) -> Subject:
    """chatd on a new SQLite file, which a power cut does no harm."""
    folder.mkdir(parents=True)
    sessions = asyncio.run(_seed_sqlite(folder, seeds))
    return subjects.chatd("sqlite", folder, {"use": "sqlite", "path": "chatd.db"}, sessions)


async def _seed_sqlite(folder: Path, seeds: Seeds) -> list[str]:
    return await seed(await open_sqlite({"path": str(folder / "chatd.db")}), seeds)


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
    rounds.check_mock()
    rounds.saturate(plan)
    rounds.timed(plan)
    rounds.first_tokens(plan)
    cold_starts(chosen, samples, mock, server, plan.starts)
