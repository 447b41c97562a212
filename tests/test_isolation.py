"""What belongs to one chatbot is, to every other, as what does not exist."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chatd_plugins.postgres import open_postgres
from chatd_plugins.sqlite import open_sqlite
from chatd_plugins.supabase import open_supabase

from chatd.domain import Chatbot, Session, TurnStatus, new_id
from chatd.errors import NotFound
from chatd.storage import FinishTurn, Storage
from chatd.testing.storage import a_chatbot, a_turn
from tests.postgres import Supabase, jwt

PAIRS = 10_000
AT_ONCE = 200
CHATBOTS = 20
SESSIONS = 3


@dataclass(frozen=True)
class Owned:
    """A chatbot with a session and a turn of its own."""

    chatbot: Chatbot
    session: Session
    turn: str


async def opened(name: str, folder: Path, request: pytest.FixtureRequest) -> Storage:
    """An empty storage."""
    if name == "sqlite":
        return await open_sqlite({"path": str(folder / "chatd.db"), "synchronous": "off"})
    database: Supabase = request.getfixturevalue("database")
    database.empty()
    if name == "postgres":
        return await open_postgres({"url": database.postgres.url})
    url = database.postgrest.url
    return await open_supabase({"url": url, "rest_path": "", "key": jwt("service_role")})


async def populate(storage: Storage) -> list[Owned]:
    """Chatbots with sessions in which something was said."""
    owned = []
    for _ in range(CHATBOTS):
        chatbot = a_chatbot()
        await storage.add_chatbot(chatbot)
        for _ in range(SESSIONS):
            session = Session(new_id(), chatbot.id)
            await storage.create_session(session)
            turn = a_turn(session, f"the secret of {session.id}")
            await storage.begin_turn(turn)
            await storage.finish_turn(FinishTurn(turn.turn_id, TurnStatus.COMPLETED, "kept"))
            owned.append(Owned(chatbot, session, turn.turn_id))
    return owned


async def told(work: Awaitable[Any]) -> str:
    """What came of a call: its answer, or the kind of its refusal."""
    try:
        return repr(await work)
    except NotFound as error:
        return f"NotFound: {error.detail}"


async def try_to_reach(storage: Storage, mine: Owned, theirs: Owned, way: int) -> tuple[str, str]:
    """What `mine` gets of `theirs`, and what it gets of what does not exist."""
    id = mine.chatbot.id
    foreign, unknown = theirs.session.id, new_id()
    match way:
        case 0:
            return (
                await told(storage.get_turn(theirs.turn, id)),
                await told(storage.get_turn(unknown, id)),
            )
        case 1:
            return (
                await told(storage.list_messages(foreign, id, limit=10)),
                await told(storage.list_messages(unknown, id, limit=10)),
            )
        case 2:
            return (
                await told(storage.delete_session(foreign, id)),
                await told(storage.delete_session(unknown, id)),
            )
        case 3:
            return (
                await told(storage.begin_turn(a_turn(Session(foreign, id)))),
                await told(storage.begin_turn(a_turn(Session(unknown, id)))),
            )
        case _:
            return (
                await told(storage.rate_turn(theirs.turn, mine.session.id, "up", "mine now")),
                await told(storage.rate_turn(unknown, mine.session.id, "up", "mine now")),
            )


@pytest.mark.parametrize("name", ["sqlite", "supabase", "postgres"])
async def test_nothing_of_another_chatbot_can_be_reached(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage = await opened(name, tmp_path, request)
    owned = await populate(storage)
    choose = random.Random(20)
    pairs = []
    while len(pairs) < PAIRS:
        mine, theirs = choose.sample(owned, 2)
        if mine.chatbot.id != theirs.chatbot.id:
            pairs.append((mine, theirs, choose.randrange(5)))
    for start in range(0, PAIRS, AT_ONCE):
        outcomes = await asyncio.gather(
            *(try_to_reach(storage, *pair) for pair in pairs[start : start + AT_ONCE])
        )
        for of_theirs, of_nothing in outcomes:
            assert of_theirs == of_nothing
    for each in owned:
        page = await storage.list_messages(each.session.id, each.chatbot.id, limit=10)
        said = [message.content for message in page.data]
        assert said == [f"the secret of {each.session.id}", "kept"]
        turn = await storage.get_turn(each.turn, each.chatbot.id)
        assert turn is not None
        assert turn.rating is None
    await storage.close()
