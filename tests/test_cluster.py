"""Many processes behind a proxy that are killed while 500 clients talk: nothing lost or doubled."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.postgres import Supabase
from tests.redis_server import RedisServer
from tests.support import KEY, chatd_command
from tests.talkers import Flood, Talker, new_client

ROUNDS = int(os.environ.get("CHATD_CLUSTER_ROUNDS", "0"))
"""How often everything is killed in turn; by hand, since a round takes two minutes. 0 is a short form."""

SESSIONS = 500 if ROUNDS else 60
REST = 24.0 if ROUNDS else 2.0
"""Seconds that a client rests between two turns, at most."""

BETWEEN = 3.0 if ROUNDS else 0.5
"""Seconds before the next thing is killed."""

LIMIT = 60
"""Turns a minute that the flooded chatbot lets through."""

OTHERS = ("sessions_per_ip", "sessions_per_chatbot", "turns_per_ip", "turns_per_session")


@dataclass
class Shaken:
    """What is killed and started again while clients talk."""

    cluster: Cluster
    database: Supabase
    redis: RedisServer
    outages: list[tuple[float, float]] = field(default_factory=list)

    def short(self) -> list[Callable[[], object]]:
        """One after the other: each is made good at once."""
        one, two = self.cluster.dynos
        return [
            one.kill,
            one.start,
            two.stop,
            two.start,
            one.kill_worker,
            self.postgrest,
            self.memory,
        ]

    def whole(self) -> list[Callable[[], object]]:
        """Each server, PostgREST and Redis by SIGKILL and by SIGTERM, a worker, a parent, PostgreSQL."""
        one, two = self.cluster.dynos
        term = signal.SIGTERM
        return [
            *(one.kill, one.start, two.stop, two.start, self.postgrest, one.kill_worker),
            *(two.kill_parent, two.start, lambda: self.postgrest(term), two.kill_worker),
            *(two.kill, two.start, one.stop, one.start, one.kill_parent, one.start),
            *(self.postgres, self.memory, one.kill_worker, lambda: self.memory(term)),
        ]

    def postgrest(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends PostgREST and starts it again."""
        self.database.postgrest.stop(number)
        self.database.postgrest.start()

    def postgres(self) -> None:
        """PostgreSQL goes as if by a power cut, and comes back."""
        self.database.postgres.stop("immediate")
        self.database.postgres.start()
        self.database.postgrest.wait()

    def memory(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Redis goes for a while, and comes back with nothing in it."""
        began = time.time()
        self.redis.process.send_signal(number)
        self.redis.process.wait(10)
        time.sleep(2)
        self.redis.start()
        time.sleep(2)  # that servers take to notice
        self.outages.append((began, time.time()))

    def begun(self, bot: str) -> list[float]:
        """When turns of a chatbot began, in order."""
        rows = self.database.postgres.execute(
            "SELECT extract(epoch FROM started_at) FROM turns JOIN sessions USING (session_id)"
            f" WHERE chatbot_id = '{bot}' ORDER BY 1"
        )
        return [float(row) for row in rows.split()]


@pytest.fixture
def shaken(tmp_path: Path, database: Supabase) -> Iterator[Shaken]:
    database.postgrest.wait()
    database.empty()
    redis = RedisServer()
    cluster = Cluster(tmp_path, database, redis.url, words=20, word_seconds=0.05)
    yield Shaken(cluster, database, redis)
    cluster.close()
    redis.close()


def add_bot(shaken: Shaken, *settings: str) -> str:
    """The id of a new chatbot."""
    folder = shaken.cluster.dynos[0].folder
    made = chatd_command("bots", "add", "--json", *settings, cwd=folder)
    assert made.returncode == 0, made.stderr
    return str(json.loads(made.stdout)["id"])


@pytest.mark.alone
async def test_of_many_processes_that_are_killed_in_turn_nothing_acknowledged_is_lost_or_doubled(
    shaken: Shaken,
) -> None:
    limits = [f"--limit={name}=none" for name in OTHERS]
    bot = add_bot(shaken, "--api-key", KEY)
    flooded = add_bot(
        shaken, "--allowed-origin=*", f"--limit=turns_per_chatbot={LIMIT}/minute", *limits
    )
    counted: Counter[str] = Counter()
    url = shaken.cluster.proxy.url
    talkers = [Talker(url, bot, f"127.0.1.{1 + n % 250}", counted, REST) for n in range(SESSIONS)]
    if ROUNDS:
        # A stream whose model is silent for longer than the proxy waits.
        await Talker(url, bot, "127.0.1.254", counted, 0).run(asyncio.Event(), ["pause"])
    stop = asyncio.Event()
    talking = [asyncio.create_task(talker.run(stop)) for talker in talkers]
    talking.append(asyncio.create_task(Flood(url, flooded, 20, counted).run(stop)))
    try:
        await shake(shaken, talking)
        stop.set()
        await asyncio.gather(*talking)
    finally:
        print("\n".join(f"{many:8} {what}" for what, many in sorted(counted.items())))
    await check_transcripts(talkers)
    check_totals(shaken, bot, counted)
    check_limit(shaken, shaken.begun(flooded))
    for dyno in shaken.cluster.dynos:
        dyno.stop()


async def shake(shaken: Shaken, talking: Sequence[asyncio.Task[None]]) -> None:
    """Kills and starts everything in turn, as long as all clients go on talking."""
    for action in shaken.whole() * ROUNDS or shaken.short():
        await asyncio.sleep(BETWEEN)
        for task in talking:
            if task.done():
                task.result()
        await asyncio.to_thread(action)
    await asyncio.sleep(BETWEEN)


async def check_transcripts(talkers: Sequence[Talker]) -> None:
    """Holds that each transcript is what was acknowledged, word by word."""
    async with new_client("127.0.3.1") as http:
        for talker in talkers:
            expected = [
                (role, text)
                for pair in talker.acknowledged
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            assert await talker.transcript(http) == expected


def check_totals(shaken: Shaken, bot: str, counted: Counter[str]) -> None:
    """Holds that storage has a turn for each acknowledgement, and that streams were resumed."""
    assert len(shaken.begun(bot)) == counted["turns"] > 2 * SESSIONS
    assert counted["streams resumed"] > SESSIONS / 4


def check_limit(shaken: Shaken, begun: Sequence[float]) -> None:
    """Holds that between outages of Redis no minute had more turns than one process would allow."""
    since = begun[0] - 1
    for gone, back in [*shaken.outages, (time.time(), 0.0)]:
        span = [at for at in begun if since <= at < gone]
        most = max((sum(at <= b < at + 60 for b in span) for at in span), default=0)
        told = f"{len(span)} turns in {gone - since:.0f} s, at most {most} in a minute"
        print(told, f"(limit {LIMIT})")
        assert most <= 1.1 * LIMIT, told
        minutes = max(1, (gone - since) // 60) if since < begun[0] else (gone - since) // 60
        assert len(span) >= 0.9 * LIMIT * minutes, told
        since = back
