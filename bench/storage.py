"""Turns a second and CPU per turn of the three storages, side by side in one run.

`.venv/bin/python -m bench.storage` starts a PostgreSQL and a PostgREST of its own on loopback and
takes about a minute. A turn here is `begin_turn` with a history of 20 messages and `finish_turn`;
CPU is that of this process alone, chatd's share. Round trips are counted in the last round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from chatd_plugins.postgres import open_postgres
from chatd_plugins.sqlite import open_sqlite
from chatd_plugins.supabase import open_supabase

from chatd.domain import Session, TurnStatus, new_id
from chatd.storage import FinishTurn, Storage
from chatd.testing.storage import a_chatbot, a_turn
from tests.postgres import Supabase, jwt

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


async def measure(database: Supabase, folder: Path, rounds: int, turns: int, sessions: int) -> None:
    """Measures the three in turn, and prints a table."""
    url, key = database.postgrest.url, jwt("service_role")
    opened: dict[str, Callable[[], Awaitable[Storage]]] = {
        "sqlite": lambda: open_sqlite({"path": str(folder / "chatd.db")}),
        "supabase": lambda: open_supabase({"url": url, "rest_path": "", "key": key}),
        "postgres": lambda: open_postgres({"url": database.postgres.url}),
    }
    subjects = [Subject(name, await open()) for name, open in opened.items()]
    for subject in subjects:
        await subject.prepare(sessions)
    before = 0
    for number in range(rounds):
        for subject in subjects:
            if number == rounds - 1 and subject.name == "supabase":
                before = len(database.postgrest.requests())
            await subject.round(turns)
    shared = (len(database.postgrest.requests()) - before) / turns
    print(f"{sessions} turns at once, {rounds} rounds of {turns} turns, medians")
    print(f"{'storage':<10}{'turns/s':>9}{'of sqlite':>11}{'CPU/turn':>11}")
    first = statistics.median(subjects[0].rates)
    for subject in subjects:
        rate, cpu = statistics.median(subject.rates), statistics.median(subject.cpu)
        print(f"{subject.name:<10}{rate:>9.0f}{rate / first:>10.2f}x{cpu:>8.0f} us")
        await subject.storage.close()
    print(f"supabase: {shared:.2f} RPCs a turn, 2 for a turn that is alone")


def main() -> None:
    """Reads the options and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=1000, help="turns a round")
    parser.add_argument("--sessions", type=int, default=64, help="turns at once")
    options = parser.parse_args()
    database = Supabase()
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = measure(database, Path(folder), options.rounds, options.turns, options.sessions)
            asyncio.run(work)
    finally:
        database.close()


if __name__ == "__main__":
    main()
