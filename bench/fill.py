"""A SQLite file with as many rows as wished, written by SQL.

It knows the columns of the plugin's tables: through chatd a million sessions would take an hour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import apsw
from chatd_plugins.sqlite import open_sqlite

from bench.seeding import Seeds, add_chatbot
from bench.wording import KEY, QUESTION, REPLY
from chatd.domain import new_id

_UUID = (
    "lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2)"
    " || '-8' || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))"
)
_COUNT = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {} - 1)"
_LONG_AGO = "unixepoch() - 172800 - {} % 300 * 86400"
"""The turns of today would count against the day's budget."""


def fill(path: Path, bots: Sequence[str], sessions: int, messages: int) -> list[str]:
    """The ids of new sessions, over the chatbots in turn, in each of which so much was said."""
    asyncio.run(_tables(path, bots, messages))
    db = apsw.Connection(str(path))
    db.pragma("synchronous", "off")
    db.pragma("cache_size", -400_000)
    with db:
        db.execute("CREATE TEMP TABLE bot (n INTEGER PRIMARY KEY, id TEXT)")
        db.executemany("INSERT INTO bot VALUES (?, ?)", list(enumerate(bots)))
        db.execute(
            f"CREATE TEMP TABLE new AS {_COUNT.format(sessions)} SELECT i, {_UUID} AS id,"
            f" {_LONG_AGO.format('i')} AS at FROM n"
        )
        db.execute(
            "INSERT INTO sessions (session_id, chatbot_id, created_at, channel)"
            " SELECT new.id, bot.id, at, 'api' FROM new JOIN bot ON bot.n = i % ?",
            (len(bots),),
        )
        for turn in range(messages // 2):
            _say(db, turn)
        found = [str(id) for (id,) in db.execute("SELECT id FROM new")]
    db.pragma("wal_checkpoint(TRUNCATE)")
    db.close()
    return found


def _say(db: apsw.Connection, turn: int) -> None:
    """One more turn of each new session."""
    last = db.execute("SELECT coalesce(max(id), 0) FROM conversations").get
    db.execute("DROP TABLE IF EXISTS temp.said")
    db.execute(f"CREATE TEMP TABLE said AS SELECT i, id, at, {_UUID} AS turn FROM new")
    db.execute(
        "INSERT INTO turns (turn_id, seq, session_id, status, lease_until, reply_id, cost_usd,"
        " started_at, finished_at)"
        " SELECT turn, ?, id, 'completed', at, ? + 2 * i + 2, 0, at, at FROM said",
        (turn + 1, last),
    )
    for place, role, text in ((1, "user", QUESTION), (2, "assistant", REPLY)):
        db.execute(
            "INSERT INTO conversations (id, session_id, role, content, timestamp, turn_id)"
            " SELECT ? + 2 * i + ?, id, ?, ?, at, turn FROM said ORDER BY i",
            (last, place, role, text),
        )


async def _tables(path: Path, bots: Sequence[str], messages: int) -> None:
    storage = await open_sqlite({"path": str(path), "synchronous": "off"})
    try:
        for bot in bots:
            await add_chatbot(storage, Seeds(bot, messages), key=bot_key(bot, bots))
    finally:
        await storage.close()


def bot_key(bot: str, bots: Sequence[str]) -> str:
    """A chatbot's API key: the first one's is the usual, each other one's holds its id."""
    return KEY if bot == bots[0] else f"{KEY}-{bot}"


def new_bots(count: int) -> list[str]:
    """So many ids."""
    return [new_id() for _ in range(count)]
