"""Supabase and PostgreSQL: the contract, over real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID

import asyncpg
import pytest
from chatd_plugins.postgres import open_postgres
from chatd_plugins.supabase import SupabaseStorage, open_supabase
from chatd_plugins.supabase import _headers as supabase_headers

from chatd.domain import Session, new_id
from chatd.errors import PluginError, StorageUnavailable
from chatd.storage import BegunTurn, Storage
from chatd.testing import StorageConformance
from chatd.testing.storage import a_chatbot, a_turn
from tests.conftest import Serve
from tests.postgres import Supabase, jwt
from tests.support import ECHO_CONFIG
from tests.test_http import assert_problem


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


async def open_with(
    database: Supabase, key: str | None = None, timeout: float = 4
) -> SupabaseStorage:
    key = jwt("service_role") if key is None else key
    url = database.postgrest.url
    return await open_supabase({"url": url, "rest_path": "", "key": key, "timeout": timeout})


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


@pytest.mark.parametrize("plugin", ["supabase", "postgres"])
async def test_a_database_that_stops_is_a_503_and_comes_back_by_itself(
    serve: Serve, supabase: Supabase, plugin: str
) -> None:
    configured = supabase.configured(plugin).replace("}", ", timeout: 0.5}")
    served = await serve(ECHO_CONFIG.replace("%(storage)s", configured))
    bot = await served.add_bot()
    session = await served.session(bot)
    assert (await served.chat(bot, session, "one")).status == 200
    await asyncio.to_thread(supabase.postgres.stop)
    try:
        answer = await served.chat(bot, session, "two")
        assert_problem(answer, 503, "storage_unavailable")
        assert answer.headers["Retry-After"] == "2"
        assert_problem(await served.get("/readyz"), 503, "storage_unavailable")
    finally:
        await asyncio.to_thread(supabase.postgres.start)
        await asyncio.to_thread(supabase.postgrest.wait)
    async with asyncio.timeout(20):
        while (await served.get("/readyz")).status != 200:
            await asyncio.sleep(0.1)
    assert (await served.chat(bot, session, "three")).status == 200
    transcript = await served.transcript(bot, session)
    assert [text for _, text in transcript if "two" not in text] == [
        "one",
        "You said: one",
        "three",
        "You said: three",
    ]


async def test_a_postgrest_that_restarts_is_waited_for(supabase: Supabase) -> None:
    storage = await open_with(supabase)
    session = await a_session(storage)
    supabase.postgrest.stop()
    begun = asyncio.create_task(storage.begin_turn(a_turn(session)))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(supabase.postgrest.start)
    assert isinstance(await begun, BegunTurn)
    page = await storage.list_messages(session.id, session.chatbot_id, limit=10)
    assert len(page.data) == 1
    await storage.close()


async def test_turns_under_way_while_the_database_restarts_are_stored_once(
    serve: Serve, supabase: Supabase
) -> None:
    served = await serve(ECHO_CONFIG.replace("%(storage)s", supabase.configured("supabase")))
    bot = await served.add_bot()
    sessions = [await served.session(bot) for _ in range(200)]
    acknowledged: dict[str, list[str]] = {session: [] for session in sessions}

    async def talk(session: str) -> None:
        for i in range(3):
            answer = await served.chat(bot, session, f"{i}")
            if answer.status == 200 and answer.json["stored"]:
                acknowledged[session].append(f"You said: {i}")
            else:
                assert answer.status in (200, 409, 503)
                await asyncio.sleep(0.3)

    talking = [asyncio.create_task(talk(session)) for session in sessions]
    await asyncio.sleep(0.3)
    await asyncio.to_thread(supabase.postgres.stop, "immediate")
    await asyncio.to_thread(supabase.postgres.start)
    await asyncio.gather(*talking)
    await asyncio.to_thread(supabase.postgrest.wait)
    assert sum(map(len, acknowledged.values())) > 0
    for session, replies in acknowledged.items():
        said = [text for role, text in await served.transcript(bot, session) if role == "assistant"]
        for reply in replies:
            assert said.count(reply) == 1, (session, reply, said)
        assert len(said) == len(set(said))


@pytest.mark.parametrize(
    ("break_it", "mend_it", "told"),
    [
        (
            "ALTER FUNCTION chatd_get_session(jsonb) RENAME TO chatd_was_get_session;",
            "ALTER FUNCTION chatd_was_get_session(jsonb) RENAME TO chatd_get_session;",
            "PGRST202",
        ),
        (
            "REVOKE EXECUTE ON FUNCTION chatd_get_session(jsonb) FROM service_role;",
            "GRANT EXECUTE ON FUNCTION chatd_get_session(jsonb) TO service_role;",
            "42501",
        ),
        (
            "REVOKE SELECT ON sessions FROM service_role;",
            "GRANT SELECT ON sessions TO service_role;",
            "42501",
        ),
    ],
)
async def test_a_database_that_is_not_set_up_says_what_to_run(
    supabase: Supabase, break_it: str, mend_it: str, told: str
) -> None:
    storage = await open_with(supabase)
    reload = "NOTIFY pgrst, 'reload schema';"
    supabase.postgres.execute(break_it + reload)
    await asyncio.sleep(0.5)
    try:
        with pytest.raises(StorageUnavailable) as caught:
            await storage.get_session(new_id())
    finally:
        supabase.postgres.execute(mend_it + reload)
        await asyncio.sleep(0.5)
    assert told in caught.value.detail
    assert "schema.sql" in caught.value.detail
    assert await storage.get_session(new_id()) is None
    await storage.close()


async def test_a_wrong_key_is_said_to_be_one(supabase: Supabase) -> None:
    key = jwt("service_role")[:-4] + "AAAA"
    storage = await open_with(supabase, key)
    with pytest.raises(StorageUnavailable) as caught:
        await storage.check()
    assert "SUPABASE_KEY is not this project's secret key" in caught.value.detail
    assert key not in caught.value.detail
    await storage.close()


async def test_an_older_schema_says_so(supabase: Supabase) -> None:
    storage = await open_with(supabase)
    version = "CREATE OR REPLACE FUNCTION public.chatd_schema_version() RETURNS integer"
    version += " LANGUAGE sql STABLE SET search_path = '' AS 'SELECT {}'"
    supabase.postgres.execute(version.format(0))
    try:
        with pytest.raises(StorageUnavailable, match="run schema.sql again"):
            await storage.check()
    finally:
        supabase.postgres.execute(version.format(1))
    await storage.check()
    await storage.close()


async def test_a_slow_query_is_given_up_and_others_go_on(supabase: Supabase) -> None:
    storage = await open_with(supabase, timeout=0.5)
    slow, other = await a_session(storage), await a_session(storage)
    lock = await asyncpg.connect(supabase.postgres.url)
    transaction = lock.transaction()
    await transaction.start()
    await lock.execute("SELECT 1 FROM sessions WHERE session_id = $1 FOR UPDATE", UUID(slow.id))
    waiting = asyncio.create_task(storage.begin_turn(a_turn(slow)))
    await asyncio.sleep(0.1)
    assert isinstance(await storage.begin_turn(a_turn(other)), BegunTurn)
    with pytest.raises(StorageUnavailable):
        await waiting
    await transaction.rollback()
    await lock.close()
    await storage.close()
