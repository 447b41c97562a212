"""Turns a second and CPU per turn of the three storages, side by side in one run.

`python -m bench --only storage` starts a PostgreSQL and a PostgREST of its own on loopback and takes
about a minute. A turn here is `begin_turn` with a history of 20 messages and `finish_turn`, 64 at once;
CPU is that of this process alone, chatd's share. RPCs are counted in the last round.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from chatd_plugins.postgres import open_postgres
from chatd_plugins.sqlite import open_sqlite
from chatd_plugins.supabase import open_supabase

from bench import wording
from chatd.domain import Session, TurnStatus, new_id
from chatd.storage import FinishTurn, Storage
from chatd.testing.storage import a_chatbot, a_turn
from tests.postgres import Supabase, jwt

ROUNDS = 5
TURNS = 1000
"""Turns a round."""
HISTORY_CHARS = 20 * (20 + 16)
"""A budget that holds the last 20 of the messages said here, each of 20 characters."""


@dataclass
class Subject:
    """A storage that is measured."""

    name: str
    storage: Storage
    sessions: list[Session] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    trips: float = 0

    async def prepare(self, sessions: int) -> None:
        """Makes sessions with a history."""
        chatbot = a_chatbot()
        await self.storage.add_chatbot(chatbot)
        for _ in range(sessions):
            session = Session(new_id(), chatbot.id)
            await self.storage.create_session(session)
            self.sessions.append(session)
        for _ in range(10):
            await asyncio.gather(*(self.turn(session) for session in self.sessions))

    async def turn(self, session: Session) -> None:
        """One turn, without a model."""
        request = a_turn(session, "20 characters of it.", history_chars=HISTORY_CHARS)
        await self.storage.begin_turn(request)
        reply = "as many characters.."
        await self.storage.finish_turn(FinishTurn(request.turn_id, TurnStatus.COMPLETED, reply))

    async def round(self, turns: int) -> None:
        """So many turns, as many at once as there are sessions."""
        left = iter(range(turns))

        async def talk(session: Session) -> None:
            for _ in left:
                await self.turn(session)

        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.gather(*(talk(session) for session in self.sessions))
        self.rates.append(turns / (time.perf_counter() - began))
        self.cpu.append((time.process_time() - cpu) / turns * 1e6)


async def measured(database: Supabase, folder: Path) -> list[Subject]:
    """The three storages, measured in turn."""
    url, key = database.postgrest.url, jwt("service_role")
    opened: dict[str, Callable[[], Awaitable[Storage]]] = {
        "sqlite": lambda: open_sqlite({"path": str(folder / "chatd.db")}),
        "supabase": lambda: open_supabase({"url": url, "rest_path": "", "key": key}),
        "postgres": lambda: open_postgres({"url": database.postgres.url}),
    }
    subjects = [Subject(name, await open()) for name, open in opened.items()]
    for subject in subjects:
        await subject.prepare(wording.SESSIONS)
    for _ in range(ROUNDS):
        for subject in subjects:
            before = len(database.postgrest.requests())
            await subject.round(TURNS)
            subject.trips = (len(database.postgrest.requests()) - before) / TURNS
    for subject in subjects:
        await subject.storage.close()
    return subjects


def measure(folder: Path) -> list[list[str]]:
    """Measures, and makes a table: medians of the rounds."""
    folder.mkdir(parents=True)
    database = Supabase()
    try:
        subjects = asyncio.run(measured(database, folder))
    finally:
        database.close()
    table = [["storage alone", "turns/s", "of sqlite", "CPU us/turn", "RPCs/turn"]]
    first = statistics.median(subjects[0].rates)
    for subject in subjects:
        rate, cpu = statistics.median(subject.rates), statistics.median(subject.cpu)
        trips = f"{subject.trips:.2f}" if subject.trips else "-"
        table.append([subject.name, f"{rate:.0f}", f"{rate / first:.2f}x", f"{cpu:.0f}", trips])
    return table
