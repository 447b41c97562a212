"""Supabase and PostgreSQL: the contract, over real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from chatd_plugins.postgres import open_postgres
from chatd_plugins.supabase import (
    SCHEMA_VERSION,
    SHARED_CALLS,
    SharedCall,
    SupabaseStorage,
    open_supabase,
)
from chatd_plugins.supabase import _headers as supabase_headers

from chatd.domain import Session, new_id
from chatd.errors import PluginError, StorageUnavailable
from chatd.storage import BegunTurn, Storage
from chatd.testing import StorageConformance
from chatd.testing.storage import a_chatbot, a_turn
from tests.conftest import Serve
from tests.postgres import Supabase, jwt
from tests.support import ECHO_CONFIG


class TestSupabase(StorageConformance):
    @pytest.fixture
    def open_storage(self, database: Supabase) -> Callable[[], Awaitable[Storage]]:
        database.empty()

        async def open() -> Storage:
            key = jwt("service_role")
            return await open_supabase({"url": database.postgrest.url, "rest_path": "", "key": key})

        return open


class TestPostgres(StorageConformance):
    @pytest.fixture
    def open_storage(self, database: Supabase) -> Callable[[], Awaitable[Storage]]:
        database.empty()

        async def open() -> Storage:
            return await open_postgres({"url": database.postgres.url})

        return open


@pytest.fixture
def supabase(database: Supabase) -> Supabase:
    database.empty()
    return database


async def open_with(database: Supabase) -> SupabaseStorage:
    key, url = jwt("service_role"), database.postgrest.url
    return await open_supabase({"url": url, "rest_path": "", "key": key})


async def a_session(storage: Storage) -> Session:
    chatbot = a_chatbot()
    await storage.add_chatbot(chatbot)
    session = Session(new_id(), chatbot.id)
    await storage.create_session(session)
    return session


# Keys


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("sb_publishable_abc", "is the publishable key"),
        (jwt("anon"), "is the anon key"),
        (jwt("authenticated"), "is the authenticated key"),
        ("not-a-key", "neither a secret key (sb_secret_…) nor a legacy service_role key"),
        ("a.b.c", "neither a secret key"),
    ],
)
async def test_a_key_that_can_do_nothing_is_refused_at_the_start(key: str, told: str) -> None:
    with pytest.raises(PluginError) as caught:
        await open_supabase({"url": "http://127.0.0.1:9", "key": key})
    assert told in str(caught.value)
    assert key not in str(caught.value)


def test_new_keys_go_in_one_header_and_legacy_keys_in_both() -> None:
    assert supabase_headers("sb_secret_abc") == {"apikey": "sb_secret_abc"}
    key = jwt("service_role")
    assert supabase_headers(key) == {"apikey": key, "Authorization": f"Bearer {key}"}


# Round trips


async def test_a_warm_turn_makes_two_rpcs_and_no_other_request(
    serve: Serve, supabase: Supabase
) -> None:
    served = await serve(ECHO_CONFIG.replace("%(storage)s", supabase.configured("supabase")))
    bot = await served.add_bot()
    session = await served.session(bot)
    await served.chat(bot, session, "warm up")
    before = len(supabase.postgrest.requests())
    for i in range(5):
        assert (await served.chat(bot, session, f"{i}")).status == 200
    lines = supabase.postgrest.requests()[before:]
    names = [line.split("/rpc/")[1].split(" ")[0] for line in lines]
    assert names == ["chatd_begin_turns", "chatd_finish_turns"] * 5


async def test_turns_that_wait_at_the_same_moment_share_an_rpc(supabase: Supabase) -> None:
    storage = await open_with(supabase)
    sessions = [await a_session(storage) for _ in range(100)]
    before = len(supabase.postgrest.requests())
    begun = await asyncio.gather(*(storage.begin_turn(a_turn(s)) for s in sessions))
    assert len({b.turn_id for b in begun if isinstance(b, BegunTurn)}) == 100
    assert len(supabase.postgrest.requests()) - before <= 20
    await storage.close()


async def test_what_is_asked_the_moment_that_all_calls_end_is_sent_too() -> None:
    answered = asyncio.Event()

    async def call(_: str, args: Mapping[str, Any]) -> list[Any]:
        await answered.wait()
        return [item["number"] for item in args["items"]]

    shared = SharedCall("a_function", call)

    async def ask_twice() -> list[Any]:
        return [await shared.ask({"number": 1}), await shared.ask({"number": 2})]

    first = asyncio.create_task(ask_twice())
    others = []
    for number in range(SHARED_CALLS - 1):
        await asyncio.sleep(0.01)
        others.append(asyncio.create_task(shared.ask({"number": number})))
    await asyncio.sleep(0.01)
    answered.set()
    async with asyncio.timeout(10):
        assert await first == [1, 2]
        assert await asyncio.gather(*others) == [*range(SHARED_CALLS - 1)]


async def test_one_turns_bad_item_is_not_its_neighbours_failure(supabase: Supabase) -> None:
    storage = await open_with(supabase)
    sessions = [await a_session(storage) for _ in range(5)]
    bad = [a_turn(s, turn_id="no-uuid") for s in sessions]
    good = [a_turn(s) for s in sessions]
    outcomes = await asyncio.gather(
        *(storage.begin_turn(turn) for pair in zip(bad, good, strict=True) for turn in pair),
        return_exceptions=True,
    )
    assert [type(o) for o in outcomes[::2]] == [StorageUnavailable] * 5
    assert [type(o) for o in outcomes[1::2]] == [BegunTurn] * 5
    await storage.close()


# What goes wrong


async def test_an_older_schema_says_so(supabase: Supabase) -> None:
    storage = await open_with(supabase)
    version = "CREATE OR REPLACE FUNCTION public.chatd_schema_version() RETURNS integer"
    version += " LANGUAGE sql STABLE SET search_path = '' AS ' SELECT {} '"
    supabase.postgres.execute(version.format(0))
    try:
        with pytest.raises(StorageUnavailable, match="run schema.sql again"):
            await storage.check()
    finally:
        supabase.postgres.execute(version.format(SCHEMA_VERSION))
    await storage.check()
    await storage.close()
