"""`chatd usage`: what turns took, as an operator reads it."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from chatd_plugins.postgres import open_postgres
from chatd_plugins.sqlite import open_sqlite

from chatd.domain import Session, StoredMessage, TurnStatus, Usage, new_id
from chatd.storage import ExportedTurn, SessionPart, Storage, TurnRecord
from chatd.testing.storage import a_chatbot
from tests.postgres import Supabase
from tests.support import chatd_command
from tests.test_cli import added, say, serving, session_of


def usage(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return chatd_command("usage", *words, cwd=folder)


def told(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What it says as JSON."""
    done = usage(folder, "--json", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return list(json.loads(done.stdout))


async def took(storage: Storage, chatbot_id: str, day: str, took: Usage, **more: Any) -> None:
    """Stores a turn of a past day."""
    time = datetime.fromisoformat(f"{day}T12:00:00Z")
    session, id = Session(new_id(), chatbot_id, created_at=time), new_id()
    turn = TurnRecord(
        **{
            "id": id,
            "session_id": session.id,
            "chatbot_id": chatbot_id,
            "status": TurnStatus.COMPLETED,
            "usage": took,
            "started_at": time,
            "finished_at": time,
            **more,
        }
    )
    said = [StoredMessage(1, "user", "Hello", time, id)]
    await storage.import_session(SessionPart(session, 0, said, [ExportedTurn(turn, 1)], False))


async def fill(storage: Storage) -> list[str]:
    """Two chatbots with turns of two days; their ids."""
    bots = [
        a_chatbot(id=f"0000000{i}-0000-4000-8000-000000000000", name=name)
        for i, name in enumerate(("Support", "Shop"))
    ]
    for bot in bots:
        await storage.add_chatbot(bot)
    support, shop = (bot.id for bot in bots)
    await took(
        storage, support, "2026-01-30", Usage(1000, 20, 5, 3, 0.25), model="a", side="main/a"
    )
    await took(storage, support, "2026-01-31", Usage(500, 10), model="a", side="b/a", rating="up")
    await took(storage, support, "2026-01-31", Usage(cost_usd=0.5), model="b", side="b/a")
    await took(storage, shop, "2026-01-31", Usage(), status=TurnStatus.FAILED, model="\x1b[31mred")
    return [support, shop]


async def filled(folder: Path) -> list[str]:
    storage = await open_sqlite({"path": str(folder / "chatd.db")})
    ids = await fill(storage)
    await storage.close()
    return ids


def cells(text: str) -> list[list[str]]:
    """The rows of a table, without its spaces."""
    return [line.split("  ") for line in _squeezed(text).splitlines()]


def _squeezed(text: str) -> str:
    while "   " in text:
        text = text.replace("   ", "  ")
    return text


async def test_it_shows_a_row_for_each_chatbot_and_day_and_their_sum(tmp_path: Path) -> None:
    await filled(tmp_path)
    done = usage(tmp_path)
    assert done.returncode == 0
    assert cells(done.stdout) == [
        ["chatbot", "day", "turns", "input", "output", "cached", "reasoning", "USD", "unknown"],
        ["Support", "2026-01-30", "1", "1,000", "20", "5", "3", "0.250000", "0"],
        ["Support", "2026-01-31", "2", "500", "10", "-", "-", "0.500000", "1"],
        ["Shop", "2026-01-31", "1", "-", "-", "-", "-", "-", "1"],
        ["all", "4", "1,500", "30", "5", "3", "0.750000", "2"],
    ]
    assert done.stderr == "The cost of 2 turns is unknown and not in the sum.\n"
    assert len({len(line) for line in done.stdout.splitlines()}) == 1, "the columns are straight"


async def test_it_compares_the_sides_of_a_chatbot(tmp_path: Path) -> None:
    await filled(tmp_path)
    head, *rows = cells(usage(tmp_path, "Support", "--by", "side").stdout)
    assert head == [
        *("side", "turns", "completed", "failed", "stopped", "interrupted", "input", "output"),
        *("cached", "reasoning", "USD", "unknown", "up", "down"),
    ]
    assert rows == [
        ["b/a", "2", "2", "0", "0", "0", "500", "10", "-", "-", "0.500000", "1", "1", "0"],
        ["main/a", "1", "1", "0", "0", "0", "1,000", "20", "5", "3", "0.250000", "0", "0", "0"],
        ["all", "3", "3", "0", "0", "0", "1,500", "30", "5", "3", "0.750000", "1", "1", "0"],
    ]


async def test_a_models_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    await filled(tmp_path)
    shown = usage(tmp_path, "Shop", "--by", "model").stdout
    assert "?[31mred" in shown
    assert "\x1b" not in shown


async def test_scripts_get_every_figure_and_null_for_what_is_unknown(tmp_path: Path) -> None:
    support, shop = await filled(tmp_path)
    first, _, third = told(tmp_path)
    assert first == {
        "chatbot_id": support,
        "name": "Support",
        "day": "2026-01-30",
        "turns": 1,
        "completed": 1,
        "failed": 0,
        "stopped": 0,
        "interrupted": 0,
        "input_tokens": 1000,
        "output_tokens": 20,
        "cached_tokens": 5,
        "reasoning_tokens": 3,
        "cost_usd": 0.25,
        "unknown_cost": 0,
        "rated_up": 0,
        "rated_down": 0,
    }
    assert (third["chatbot_id"], third["cost_usd"], third["unknown_cost"]) == (shop, None, 1)
    assert [row["model"] for row in told(tmp_path, support, "--by", "model")] == ["a", "b"]


async def test_since_and_until_are_days_and_both_count(tmp_path: Path) -> None:
    await filled(tmp_path)
    for words, days in [
        (["--since", "2026-01-31"], ["2026-01-31"]),
        (["--until", "2026-01-30"], ["2026-01-30"]),
        (["--since", "2026-01-30", "--until", "2026-01-31"], ["2026-01-30", "2026-01-31"]),
        (["--since", "2026-02-01"], []),
    ]:
        assert [row["day"] for row in told(tmp_path, "Support", *words)] == days
    nothing = usage(tmp_path, "--since", "2026-02-01")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert nothing.stderr == "No turn has ended that would be counted.\n"


def test_what_cannot_be_told_is_said_in_a_sentence(tmp_path: Path) -> None:
    missing = usage(tmp_path)
    assert missing.returncode == 1
    assert missing.stderr == f"chatd: there is no database at {tmp_path / 'chatd.db'}\n"
    assert not (tmp_path / "chatd.db").exists()
    added(tmp_path)
    for words, sentence in [
        (["Nobody"], 'there is no chatbot "Nobody"'),
        (["--since", "yesterday"], "--since yesterday: must be a date like 2026-01-31"),
        (["--until", "20260131"], "--until 20260131: must be a date"),
        (["--until", "9999-12-31"], "--until 9999-12-31: must be a date"),
        (["--since", "2026-02-01", "--until", "2026-01-31"], "is after --until 2026-01-31"),
    ]:
        done = usage(tmp_path, *words)
        assert done.returncode == 1, words
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert usage(tmp_path, "--by", "week").returncode == 2


def test_turns_of_a_server_are_counted_beside_it_also_when_their_session_is_erased(
    tmp_path: Path,
) -> None:
    bot = added(tmp_path, "--name", "Bot")
    with serving(tmp_path) as server:
        session = session_of(server.url, bot).json["session_id"]
        for i in range(3):
            assert say(server.url, bot, session, f"{i}").status == 200
        (before,) = told(tmp_path, "Bot")
        assert (before["turns"], before["cost_usd"], before["unknown_cost"]) == (3, 0, 0)
        request = Request(
            f"{server.url}/api/chat/session/{session}",
            headers={"Authorization": f"Bearer {bot['api_key']}"},
            method="DELETE",
        )
        with urlopen(request, timeout=10) as answer:
            assert answer.status == 204
        assert told(tmp_path, "Bot") == [before]
        assert server.stop() == 0


async def test_it_is_the_same_with_supabase(database: Supabase, tmp_path: Path) -> None:
    await filled(tmp_path)
    database.empty()
    (tmp_path / "supabase.yaml").write_text(f"storage: {database.configured('supabase')}\n")
    storage = await open_postgres({"url": database.postgres.url})
    await fill(storage)
    await storage.close()
    for by in ("day", "model", "side"):
        there = told(tmp_path, "--by", by, "--config", "supabase.yaml")
        assert there == told(tmp_path, "--by", by)
