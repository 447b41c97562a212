"""Storage that fails: each way that PostgREST and PostgreSQL have, for real, and what then holds."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from uuid import UUID

import aiohttp
import asyncpg
import pytest
from chatd_plugins.postgres import open_postgres
from chatd_plugins.supabase import SupabaseStorage, open_supabase
from tornado.ioloop import IOLoop

from chatd.domain import Chatbot, Session, TurnStatus, new_id
from chatd.errors import StorageUnavailable
from chatd.storage import BegunTurn, FinishTurn, Storage
from chatd.testing.fake_provider import FakeProvider, http_response
from chatd.testing.storage import a_chatbot, a_turn
from tests.conftest import Serve
from tests.postgres import PostgREST, Supabase, jwt
from tests.support import ECHO_CONFIG, KEY, Answer, Served
from tests.test_http import assert_problem

T = TypeVar("T")

PATIENCE = 25
"""Seconds after which what should come back by itself has not: PostgREST waits 1, 2, 4, 8 s …"""

RELOAD = "NOTIFY pgrst, 'reload schema';"
MODEL_CONFIG = """
storage: %(storage)s
providers:
  model: {use: openai_compatible, base_url: "URL/v1"}
models:
  - {match: "*", ask: [model]}
"""
BOTH = pytest.mark.parametrize("plugin", ["supabase", "postgres"])


@pytest.fixture
def supabase(database: Supabase) -> Supabase:
    database.postgrest.wait()  # the test before may have shaken it
    database.empty()
    return database


@pytest.fixture
def another_postgrest(supabase: Supabase) -> Iterator[Callable[..., PostgREST]]:
    """Starts one more PostgREST over the database. To be asked for before `serve`."""
    with ExitStack() as stack:

        def start(**settings: str) -> PostgREST:
            postgrest = PostgREST(supabase.postgres, settings)
            stack.callback(postgrest.stop)
            return postgrest

        yield start
    # The first one was not asked meanwhile, and may have lost its database.
    supabase.postgrest.wait()


@pytest.fixture
def model(io_loop: IOLoop) -> Iterator[FakeProvider]:
    """A provider's server."""
    fake = FakeProvider()
    io_loop.run_sync(fake.start)
    yield fake
    io_loop.run_sync(fake.stop)


def echoing(storage: str, seconds: float = 0) -> str:
    """A configuration whose answers, of one word, take so many seconds."""
    text = ECHO_CONFIG.replace("You said: {message}", "re:{message}")
    text = text.replace("server:", "server:\n  max_connections_per_address: 1000")
    text = text.replace("use: echo,", f"use: echo, word_seconds: {seconds},")
    return text.replace("%(storage)s", storage)


def modelled(storage: str, model: FakeProvider) -> str:
    """A configuration that asks a provider's server."""
    return MODEL_CONFIG.replace("URL", model.url).replace("%(storage)s", storage)


def completion(text: str, **more: Any) -> bytes:
    """A provider's answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return http_response(200, {"model": "a/model", "choices": [choice], **more})


async def open_with(url: str, key: str | None = None, timeout: float = 4) -> SupabaseStorage:
    key = jwt("service_role") if key is None else key
    return await open_supabase({"url": url, "rest_path": "", "key": key, "timeout": timeout})


async def open_plugin(database: Supabase, plugin: str, **settings: Any) -> Storage:
    if plugin == "postgres":
        return await open_postgres({"url": database.postgres.url, **settings})
    return await open_with(database.postgrest.url, **settings)


async def a_session(storage: Storage) -> Session:
    chatbot = a_chatbot()
    await storage.add_chatbot(chatbot)
    session = Session(new_id(), chatbot.id)
    await storage.create_session(session)
    return session


async def said_in(storage: Storage, session: Session) -> list[str]:
    page = await storage.list_messages(session.id, session.chatbot_id, limit=100)
    return [message.content for message in page.data]


async def detail_of(work: Awaitable[object]) -> str:
    """What the operator reads of work that storage fails."""
    with pytest.raises(StorageUnavailable) as caught:
        await work
    return caught.value.detail


async def in_time(work: Callable[[], Awaitable[T]], wanted: Callable[[T], bool]) -> T:
    """Does `work` again and again until its outcome is the wanted one, within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not wanted(outcome := await work()) and time.monotonic() < end:
        await asyncio.sleep(0.1)
    assert wanted(outcome), outcome
    return outcome


async def ready_again(served: Served) -> None:
    """Returns once /readyz says so: nobody restarts the server."""
    await in_time(lambda: served.get("/readyz"), lambda answer: answer.status == 200)


def assert_unavailable(answer: Answer) -> None:
    """What every client reads of every failure of storage: when to come back, and no more."""
    problem = assert_problem(answer, 503, "storage_unavailable")
    assert answer.headers["Retry-After"] == "2"
    assert problem["detail"] == StorageUnavailable.client_detail


@asynccontextmanager
async def locked(database: Supabase, statement: str, *values: Any) -> AsyncIterator[None]:
    """Holds a lock as some other client of the database would."""
    connection = await asyncpg.connect(database.postgres.url)
    try:
        await connection.execute("BEGIN")
        await connection.execute(statement, *values)
        yield
    finally:
        connection.terminate()


LOCK_SESSIONS = "LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE"


async def waiting_backend(database: Supabase, function: str, user: str = "authenticator") -> int:
    """The process of PostgreSQL that runs a function, for PostgREST, and waits for a lock."""
    sql = f"""SELECT min(pid) FROM pg_stat_activity WHERE usename = '{user}'
        AND wait_event_type = 'Lock' AND query LIKE '%{function}%'"""
    found = await in_time(
        lambda: asyncio.to_thread(database.postgres.execute, sql), lambda pid: pid.strip() != ""
    )
    return int(found)


# PostgREST and PostgreSQL are away for a while


@asynccontextmanager
async def gone(_: Supabase, postgrest: PostgREST) -> AsyncIterator[None]:
    postgrest.stop()
    try:
        yield
    finally:
        await asyncio.to_thread(postgrest.start)


@asynccontextmanager
async def without_database(database: Supabase, _: PostgREST) -> AsyncIterator[None]:
    await asyncio.to_thread(database.postgres.stop)
    try:
        yield
    finally:
        await asyncio.to_thread(database.postgres.start)


@asynccontextmanager
async def without_schema_cache(database: Supabase, _: PostgREST) -> AsyncIterator[None]:
    # What PostgREST asks for when it reads the schema, and nobody else in these tests.
    catalog = "{} SELECT ON pg_catalog.pg_proc {} PUBLIC"
    await asyncio.to_thread(database.postgres.execute, catalog.format("REVOKE", "FROM"), RELOAD)
    try:
        yield
    finally:
        await asyncio.to_thread(database.postgres.execute, catalog.format("GRANT", "TO"), RELOAD)


@asynccontextmanager
async def without_connections(database: Supabase, postgrest: PostgREST) -> AsyncIterator[None]:
    async with locked(database, LOCK_SESSIONS):
        holds = asyncio.create_task(
            asyncio.to_thread(postgrest.ask, "chatd_get_session", id=new_id())
        )
        await waiting_backend(database, "chatd_get_session")
        yield
    assert (await holds)[0] == 200


Outage = Callable[[Supabase, PostgREST], AbstractAsyncContextManager[None]]
ONE_CONNECTION = {"PGRST_DB_POOL": "1", "PGRST_DB_POOL_ACQUISITION_TIMEOUT": "1"}


@pytest.mark.parametrize(
    ("outage", "settings", "status", "code"),
    [
        pytest.param(gone, {}, None, "Cannot connect", id="PostgREST is gone"),
        pytest.param(without_database, {}, 503, "PGRST000", id="PGRST000"),
        pytest.param(without_schema_cache, {}, 503, "PGRST002", id="PGRST002"),
        pytest.param(without_connections, ONE_CONNECTION, 504, "PGRST003", id="PGRST003"),
    ],
)
async def test_an_outage_is_retried_shortly_then_told_and_over_by_itself(
    another_postgrest: Callable[..., PostgREST],
    serve: Serve,
    supabase: Supabase,
    outage: Outage,
    settings: dict[str, str],
    status: int | None,
    code: str,
) -> None:
    postgrest = another_postgrest(**settings)
    storage = await open_with(postgrest.url)
    config = echoing(supabase.configured("supabase", postgrest))
    # So that a chat gets as far as to begin its turn, however long the outage takes to show.
    served = await serve(config.replace("server:", "server:\n  chatbot_cache_seconds: 60"))
    bot = await served.add_bot()
    own, session = await a_session(storage), await served.session(bot)
    turn = a_turn(own, "begun twice")
    assert (await served.chat(bot, session, "one")).status == 200
    async with outage(supabase, postgrest):
        if status is not None:
            await until_told(postgrest, status, code)
        before = len(postgrest.requests())
        read, begun, added, answer, ready = await asyncio.gather(
            detail_of(storage.get_session(own.id)),
            detail_of(storage.begin_turn(turn)),
            detail_of(storage.add_chatbot(a_chatbot())),
            served.chat(bot, session, "two"),
            served.get("/readyz"),
        )
        assert code in read
        assert code in begun
        assert code in added
        assert_unavailable(answer)
        assert_unavailable(ready)
        assert (await served.get("/healthz")).status == 200
        if status is not None:
            requests = "\n".join(postgrest.requests()[before:])
            assert requests.count(f'/chatd_get_session HTTP/1.1" {status}') == 5
            assert requests.count(f'/chatd_begin_turns HTTP/1.1" {status}') == 10  # of both
            # Repeated, it might call its own success a conflict.
            assert requests.count("/chatd_add_chatbot") == 1
    await ready_again(served)
    assert (await served.chat(bot, session, "three")).status == 200
    assert isinstance(await storage.begin_turn(turn), BegunTurn)
    assert await said_in(storage, own) == ["begun twice"]
    transcript = [text for _, text in await served.transcript(bot, session)]
    assert transcript == ["one", "re:one", "three", "re:three"]
    await storage.close()


async def until_told(postgrest: PostgREST, status: int, code: str) -> None:
    """Returns once PostgREST itself answers so."""
    await in_time(
        lambda: asyncio.to_thread(postgrest.ask, "chatd_get_chatbot", id=new_id()),
        lambda told: told[0] == status and told[1]["code"] == code,
    )


async def test_without_postgrest_a_database_that_stops_is_a_503_and_comes_back_by_itself(
    serve: Serve, supabase: Supabase
) -> None:
    served = await serve(echoing(supabase.configured("postgres")))
    bot = await served.add_bot()
    session = await served.session(bot)
    assert (await served.chat(bot, session, "one")).status == 200
    await asyncio.to_thread(supabase.postgres.stop)
    try:
        answers = await asyncio.gather(served.chat(bot, session, "two"), served.get("/readyz"))
    finally:
        await asyncio.to_thread(supabase.postgres.start)
    for answer in answers:
        assert_unavailable(answer)
    await ready_again(served)
    assert (await served.chat(bot, session, "three")).status == 200
    transcript = [text for _, text in await served.transcript(bot, session)]
    assert transcript == ["one", "re:one", "three", "re:three"]
    await asyncio.to_thread(supabase.postgrest.wait)


async def test_a_turn_whose_backend_dies_is_begun_once(serve: Serve, supabase: Supabase) -> None:
    storage = await open_with(supabase.postgrest.url)
    served = await serve(echoing(supabase.configured("supabase")))
    session = await a_session(storage)
    turn = a_turn(session, "hi")

    async def begin() -> object:
        """What came of it. How long PostgreSQL takes to recover is its own affair."""
        try:
            return await storage.begin_turn(turn)
        except StorageUnavailable as error:
            return error

    async with locked(supabase, LOCK_SESSIONS):
        told = asyncio.create_task(
            asyncio.to_thread(supabase.postgrest.ask, "chatd_get_session", id=new_id())
        )
        begun = asyncio.create_task(begin())
        await waiting_backend(supabase, "chatd_begin_turns")
        # All others die with it: PostgreSQL trusts no memory that it may have been writing.
        os.kill(await waiting_backend(supabase, "chatd_get_session"), signal.SIGKILL)
        status, body = await told
        assert (status, body["code"]) == (503, "PGRST001")
    if not isinstance(await begun, BegunTurn):
        await in_time(begin, lambda outcome: isinstance(outcome, BegunTurn))
    await ready_again(served)
    assert await said_in(storage, session) == ["hi"]
    await storage.close()
    await asyncio.to_thread(supabase.postgrest.wait)


async def test_a_postgrest_that_restarts_is_waited_for(supabase: Supabase) -> None:
    storage = await open_with(supabase.postgrest.url)
    session = await a_session(storage)
    supabase.postgrest.stop()
    begun = asyncio.create_task(storage.begin_turn(a_turn(session)))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(supabase.postgrest.start)
    assert isinstance(await begun, BegunTurn)
    assert len(await said_in(storage, session)) == 1
    await storage.close()


# Under load

SESSIONS = 300
EARLY_SESSIONS = 240
ANSWER_SECONDS = 0.8
LONG_ANSWER_SECONDS = 3.0
OUTAGE_SECONDS = 2.0
PAUSE_SECONDS = 1.5
SHORT_LEASE = 10.0


@dataclass
class Talk:
    """A session, and what came of each thing that was said in it."""

    session: str
    said: list[tuple[str, Answer]] = field(default_factory=list)

    async def say(self, served: Served, bot: Chatbot) -> Answer:
        text = f"{self.session[:8]}-{len(self.said)}"
        answer = await served.chat(bot, self.session, text)
        self.said.append((text, answer))
        return answer

    async def say_until_answered(self, served: Served, bot: Chatbot) -> None:
        async def say() -> Answer:
            return await self.say(served, bot)

        await in_time(say, lambda answer: answer.status == 200)


def restart_postgrest(database: Supabase) -> Iterator[None]:
    database.postgrest.stop()
    yield
    database.postgrest.start()


def stop_fast(database: Supabase) -> Iterator[None]:
    database.postgres.stop("fast")
    yield
    database.postgres.start()


def stop_immediately(database: Supabase) -> Iterator[None]:
    database.postgres.stop("immediate")
    yield
    time.sleep(OUTAGE_SECONDS)
    database.postgres.start()


def pause_postgrest(database: Supabase) -> Iterator[None]:
    with database.postgrest.paused():
        yield
        time.sleep(PAUSE_SECONDS)


def pause_postgres(database: Supabase) -> Iterator[None]:
    with database.postgres.paused():
        yield
        time.sleep(PAUSE_SECONDS)


FAULTS = [
    ("supabase", restart_postgrest),
    ("supabase", stop_fast),
    ("supabase", stop_immediately),
    ("supabase", pause_postgrest),
    ("supabase", pause_postgres),
    ("postgres", stop_fast),
    ("postgres", stop_immediately),
    ("postgres", pause_postgres),
]


@pytest.mark.parametrize(
    ("plugin", "fault"), [pytest.param(p, f, id=f"{p}-{f.__name__}") for p, f in FAULTS]
)
async def test_under_load_nothing_acknowledged_is_lost_and_nothing_doubled(
    serve: Serve,
    supabase: Supabase,
    plugin: str,
    fault: Callable[[Supabase], Iterator[None]],
) -> None:
    # A turn that storage began too late, when nobody waited for it any more, ends with its lease.
    config = echoing(supabase.configured(plugin), LONG_ANSWER_SECONDS)
    served = await serve(config.replace("server:", f"server:\n  lease_seconds: {SHORT_LEASE}"))
    bot = await served.add_bot()
    # aiohttp has 100 requests under way at once, and lets others wait, unless told otherwise.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        served = replace(served, http=http)
        talks = [Talk(session) for session in await sessions(served, bot)]
        talking = [asyncio.create_task(t.say(served, bot)) for t in talks[:EARLY_SESSIONS]]
        await until_running(supabase, 200)
        course = fault(supabase)
        await asyncio.to_thread(next, course)
        began = time.time()
        talking += [asyncio.create_task(t.say(served, bot)) for t in talks[EARLY_SESSIONS:]]
        await asyncio.to_thread(next, course, None)
        await asyncio.gather(*talking)
        await ready_again(served)
        await asyncio.gather(*(talk.say_until_answered(served, bot) for talk in talks))
    assert await running_at(supabase, began) >= 200
    assert_all_there(talks, await stored(supabase))
    await asyncio.to_thread(supabase.postgrest.wait)


async def sessions(served: Served, bot: Chatbot) -> list[str]:
    return await asyncio.gather(*(served.session(bot) for _ in range(SESSIONS)))


async def until_running(database: Supabase, count: int) -> None:
    """Returns as soon as so many turns run, by the database's word."""
    connection = await asyncpg.connect(database.postgres.url)
    running = "SELECT count(*) FROM turns WHERE status = 'running'"
    await in_time(lambda: connection.fetchval(running), lambda found: found >= count)
    await connection.close()


async def running_at(database: Supabase, moment: float) -> int:
    """How many turns ran at a moment, looked at afterwards."""
    connection = await asyncpg.connect(database.postgres.url)
    sql = """SELECT count(*) FROM turns WHERE started_at <= to_timestamp($1)
        AND finished_at > to_timestamp($1)"""
    found: int = await connection.fetchval(sql, moment)
    await connection.close()
    return found


async def stored(database: Supabase) -> dict[str, list[str]]:
    """What is stored of each session, in its order."""
    connection = await asyncpg.connect(database.postgres.url)
    rows = await connection.fetch("SELECT session_id, content FROM conversations ORDER BY id")
    await connection.close()
    found: dict[str, list[str]] = {}
    for session, content in rows:
        found.setdefault(str(session), []).append(content)
    return found


def assert_all_there(talks: list[Talk], found: dict[str, list[str]]) -> None:
    """What was acknowledged is stored once, what was refused at most once, and in its order."""
    for talk in talks:
        there = Counter(found[talk.session])
        order = []
        for text, answer in talk.said:
            question, reply = there.pop(text, 0), there.pop(f"re:{text}", 0)
            told = (talk.session, text, answer.status, answer.body, question, reply)
            match answer.status:
                case 200:
                    assert answer.json["response"] == f"re:{text}", told
                    assert question == 1, told
                    assert reply == 1 or (reply == 0 and not answer.json["stored"]), told
                case 503:
                    assert_unavailable(answer)
                    assert (question, reply) in ((0, 0), (1, 0)), told
                case _:
                    assert_problem(answer, 409, "turn_in_progress")
                    assert (question, reply) == (0, 0), told
            order += [text] * question + [f"re:{text}"] * reply
        assert not there
        assert found[talk.session] == order


# Turns at the moment that storage fails


@BOTH
async def test_an_answer_that_cannot_be_stored_is_given_and_stored_when_the_database_is_back(
    serve: Serve, supabase: Supabase, plugin: str
) -> None:
    served = await serve(echoing(supabase.configured(plugin), ANSWER_SECONDS))
    bot = await served.add_bot()
    session = await served.session(bot)
    asked = asyncio.create_task(served.chat(bot, session, "hi"))
    await until_running(supabase, 1)
    await asyncio.to_thread(supabase.postgres.stop)
    try:
        answer = await asked
    finally:
        await asyncio.to_thread(supabase.postgres.start)
    assert (answer.status, answer.json["response"]) == (200, "re:hi")
    assert answer.json["stored"] is False
    await ready_again(served)
    transcript = await in_time(
        lambda: served.transcript(bot, session), lambda found: len(found) == 2
    )
    assert transcript == [("user", "hi"), ("assistant", "re:hi")]
    assert (await served.chat(bot, session, "on")).json["stored"] is True
    await asyncio.to_thread(supabase.postgrest.wait)


@BOTH
async def test_storing_an_answer_is_given_up_after_a_while(
    serve: Serve,
    supabase: Supabase,
    plugin: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("chatd.bookkeeping.STORE_SECONDS", 0.2)
    monkeypatch.setattr("chatd.bookkeeping.STORE_LATER_SECONDS", 0.5)
    config = echoing(supabase.configured(plugin), 0.3)
    served = await serve(config.replace("server:", "server:\n  lease_seconds: 1"))
    bot = await served.add_bot()
    session = await served.session(bot)
    asked = asyncio.create_task(served.chat(bot, session, "hi"))
    await until_running(supabase, 1)
    async with locked(supabase, LOCK_SESSIONS):
        answer = await asked
        assert (answer.status, answer.json["stored"]) == (200, False)

        async def log() -> str:
            return caplog.text

        await in_time(log, lambda text: "could not be stored: its reply is lost" in text)
    assert "re:hi" not in caplog.text
    answer = await in_time(
        lambda: served.chat(bot, session, "on"), lambda answer: answer.status == 200
    )
    assert answer.json["stored"] is True


@BOTH
async def test_what_nobody_waits_for_any_more_is_not_begun(supabase: Supabase, plugin: str) -> None:
    storage = await open_plugin(supabase, plugin)
    chosen = [await a_session(storage) for _ in range(10)]
    async with locked(supabase, LOCK_SESSIONS):
        # The first occupy all shared calls; the others wait for one to be free.
        occupying = []
        for session in chosen[:5]:
            occupying.append(asyncio.create_task(storage.begin_turn(a_turn(session))))
            await asyncio.sleep(0.05)
        given_up = [asyncio.create_task(storage.begin_turn(a_turn(s))) for s in chosen[5:9]]
        waited_for = asyncio.create_task(storage.begin_turn(a_turn(chosen[9])))
        await asyncio.sleep(0.05)
        for task in given_up:
            task.cancel()
        await asyncio.sleep(0)
    begun = await asyncio.gather(*occupying, waited_for)
    assert {type(one) for one in begun} == {BegunTurn}
    assert [len(await said_in(storage, s)) for s in chosen] == [1] * 5 + [0] * 4 + [1]
    await storage.close()


@pytest.mark.parametrize(
    "function",
    [
        "chatd_begin_turns",
        "chatd_finish_turns",
    ],
)
async def test_calls_that_share_sessions_lock_them_in_one_order(
    supabase: Supabase, function: str
) -> None:
    storage = await open_plugin(supabase, "postgres")
    first, last = sorted([await a_session(storage) for _ in range(2)], key=lambda s: s.id)
    turns = [a_turn(last), a_turn(first)]
    if function == "chatd_finish_turns":
        for turn in turns:
            await storage.begin_turn(turn)
        work = [storage.finish_turn(FinishTurn(t.turn_id, TurnStatus.FAILED)) for t in turns]
    else:
        work = [storage.begin_turn(turn) for turn in turns]  # type: ignore[misc]
    lock = "SELECT FROM sessions WHERE session_id = $1 FOR UPDATE"
    other = await asyncpg.connect(supabase.postgres.url)
    try:
        async with locked(supabase, lock, UUID(first.id)):
            both = asyncio.gather(*work)
            await waiting_backend(supabase, function, "postgres")
            # It waits for the first, so it is not to hold the last, for which others may wait.
            await other.execute(f"{lock} NOWAIT", UUID(last.id))
    finally:
        await other.close()
        await both
        await storage.close()


@BOTH
async def test_of_turns_at_two_servers_one_runs_and_their_order_is_that_of_their_messages(
    serve: Serve, supabase: Supabase, plugin: str
) -> None:
    config = echoing(supabase.configured(plugin), LONG_ANSWER_SECONDS)
    servers = [await serve(config), await serve(config)]
    bot = await servers[0].add_bot()
    session = await servers[0].session(bot)
    said = []
    for round_ in range(3):
        answers = await asyncio.gather(
            *(servers[i % 2].chat(bot, session, f"{round_}-{i}") for i in range(50))
        )
        assert Counter(answer.status for answer in answers) == {200: 1, 409: 49}
        run = next(answer for answer in answers if answer.status == 200)
        for answer in answers:
            if answer.status == 409:
                problem = assert_problem(answer, 409, "turn_in_progress")
                assert problem["turn_id"] == run.json["turn_id"]
        said += [run.json["response"].removeprefix("re:"), run.json["response"]]
    for server in servers:
        assert [text for _, text in await server.transcript(bot, session)] == said
    sql = "SELECT c.content FROM turns t JOIN conversations c USING (turn_id) ORDER BY t.seq, c.id"
    assert supabase.postgres.execute(sql).split() == said


# A database that is not set up


@pytest.mark.parametrize(
    ("break_it", "mend_it", "told"),
    [
        (
            "ALTER FUNCTION chatd_begin_turns(jsonb) RENAME TO chatd_was_begin_turns;",
            "ALTER FUNCTION chatd_was_begin_turns(jsonb) RENAME TO chatd_begin_turns;",
            "PGRST202",
        ),
        (
            "REVOKE EXECUTE ON FUNCTION chatd_begin_turns(jsonb) FROM service_role;",
            "GRANT EXECUTE ON FUNCTION chatd_begin_turns(jsonb) TO service_role;",
            "42501",
        ),
        (
            "REVOKE INSERT ON turns FROM service_role;",
            "GRANT INSERT ON turns TO service_role;",
            "42501",
        ),
    ],
    ids=["PGRST202", "42501 function", "42501 table"],
)
async def test_a_database_that_is_not_set_up_tells_the_operator_what_to_run(
    serve: Serve,
    supabase: Supabase,
    caplog: pytest.LogCaptureFixture,
    break_it: str,
    mend_it: str,
    told: str,
) -> None:
    served = await serve(echoing(supabase.configured("supabase")))
    bot = await served.add_bot()
    session = await served.session(bot)
    item = {
        "session_id": session,
        "chatbot_id": bot.id,
        "turn_id": new_id(),
        "messages": [],
        "history_chars": 0,
        "overhead_chars": 0,
        "lease_seconds": 0,
    }

    async def code() -> Any:
        """What PostgREST itself says; None when the turn is begun."""
        ask = supabase.postgrest.ask_with
        status, body = await asyncio.to_thread(ask, "chatd_begin_turns", items=[item])
        return None if status == 200 else body["code"]

    supabase.postgres.execute(break_it, RELOAD)
    try:
        await in_time(code, lambda found: found == told)
        answer = await served.chat(bot, session, "hi")
    finally:
        supabase.postgres.execute(mend_it)
    assert_unavailable(answer)
    assert told in caplog.text
    assert "schema.sql" in caplog.text
    if told == "PGRST202":
        # The function is there again, and PostgREST has not looked yet.
        assert await code() == told
        assert_unavailable(await served.chat(bot, session, "hi"))
        assert "NOTIFY pgrst, 'reload schema'" in caplog.text
    supabase.postgres.execute(RELOAD)
    await in_time(lambda: served.chat(bot, session, "hi"), lambda answer: answer.status == 200)


async def test_a_missing_table_says_to_run_the_schema(model: FakeProvider) -> None:
    # Functions are all that is asked for, which PostgREST never calls a table: what it says of
    # one is played to the plugin.
    body = {
        "code": "PGRST205",
        "details": None,
        "hint": None,
        "message": "Could not find the table 'public.sessions' in the schema cache",
    }
    model.always(http_response(404, body))
    storage = await open_with(model.url)
    told = await detail_of(storage.get_session(new_id()))
    assert "PGRST205" in told
    assert "run schema.sql" in told
    assert "NOTIFY pgrst, 'reload schema'" in told
    assert len(model.requests) == 1
    await storage.close()


async def test_a_wrong_key_is_said_to_be_one(
    serve: Serve, supabase: Supabase, caplog: pytest.LogCaptureFixture
) -> None:
    key = jwt("service_role")[:-4] + "AAAA"
    storage = supabase.configured("supabase").replace(jwt("service_role"), key)
    served = await serve(echoing(storage))
    answer = await served.post("/api/chat/session", {"api_key": KEY, "assistant_id": new_id()})
    assert_unavailable(answer)
    assert_unavailable(await served.get("/readyz"))
    assert "HTTP 401" in caplog.text or "PGRST301" in caplog.text
    assert "SUPABASE_KEY is not this project's secret key" in caplog.text
    assert key not in caplog.text


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgres@127.0.0.1:{port}/nowhere", 'database "nowhere" does not exist'),
        ("nobody@127.0.0.1:{port}/postgres", 'role "nobody" does not exist'),
        ("anon@127.0.0.1:{port}/postgres", "not permitted to log in"),
    ],
)
async def test_a_wrong_database_url_is_said_to_be_one_at_once(
    supabase: Supabase, url: str, told: str
) -> None:
    given = "postgresql://" + url.format(port=supabase.postgres.port)
    storage = await open_postgres({"url": given})
    before = complaints(supabase, told)
    detail = await detail_of(storage.check())
    assert told in detail
    assert "DATABASE_URL" in detail
    assert complaints(supabase, told) - before == 1  # it would be the same again
    await storage.close()


async def test_without_postgrest_a_database_that_is_not_set_up_says_what_to_run(
    supabase: Supabase,
) -> None:
    url = supabase.postgres.url.replace("postgres@", "stranger@")
    supabase.postgres.execute("CREATE ROLE stranger LOGIN")
    storage = await open_postgres({"url": url})
    try:
        before = complaints(supabase, "permission denied")
        detail = await detail_of(storage.get_session(new_id()))
        assert "permission denied" in detail
        assert "a grant is missing" in detail
        assert complaints(supabase, "permission denied") - before == 1
    finally:
        await storage.close()
        supabase.postgres.execute("DROP ROLE stranger")
    empty = supabase.postgres.url.removesuffix("postgres") + "template1"
    storage = await open_postgres({"url": empty})
    before = complaints(supabase, "does not exist")
    assert "run schema.sql" in await detail_of(storage.get_session(new_id()))
    assert complaints(supabase, "does not exist") - before == 1
    await storage.close()


def complaints(database: Supabase, text: str) -> int:
    """How often PostgreSQL logged an error with these words."""
    lines = (database.postgres.folder / "log").read_text().splitlines()
    return sum(text in line for line in lines if "ERROR:" in line or "FATAL:" in line)


# What is said


@BOTH
async def test_u0000_from_a_model_is_removed_and_from_a_client_refused(
    serve: Serve, supabase: Supabase, model: FakeProvider, plugin: str
) -> None:
    model.always(completion("He\0llo \ud83d!", id="a\0b"))
    served = await serve(modelled(supabase.configured(plugin), model))
    bot = await served.add_bot()
    chosen = [await served.session(bot) for _ in range(5)]
    answers = await asyncio.gather(*(served.chat(bot, session, "hi") for session in chosen))
    for session, answer in zip(chosen, answers, strict=True):
        assert (answer.status, answer.json["stored"]) == (200, True)
        [_, (_, reply)] = await served.transcript(bot, session)
        assert reply == answer.json["response"]
        assert "\0" not in reply
        assert reply.startswith("Hello ")
    answer = await served.chat(bot, chosen[0], "a\0b")
    assert_problem(answer, 400, "malformed_request")
    assert len(await served.transcript(bot, chosen[0])) == 2


@BOTH
async def test_a_reply_of_a_mebibyte_is_stored_whole_and_the_next_turn_goes_on(
    serve: Serve, supabase: Supabase, model: FakeProvider, plugin: str
) -> None:
    reply = "0123456789abcdef" * 2**16
    assert len(reply) == 2**20
    model.answer(completion(reply))
    model.always(completion("short"))
    served = await serve(modelled(supabase.configured(plugin), model))
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session, "one")
    assert answer.status == 200, answer.body
    assert answer.json["stored"] is True
    assert answer.json["response"] == reply
    answer = await served.chat(bot, session, "two")
    assert answer.status == 200, answer.body
    assert answer.json["stored"] is True
    asked = [message["content"] for message in model.requests[-1].json["messages"]]
    assert asked == ["two"]  # the turn before does not fit this chatbot's context
    assert answer.json["history_truncated"] is True
    transcript = [text for _, text in await served.transcript(bot, session)]
    assert transcript == ["one", reply, "two", "short"]


@BOTH
async def test_of_ten_thousand_messages_only_those_that_fit_are_read(
    supabase: Supabase, plugin: str
) -> None:
    storage = await open_plugin(supabase, plugin)
    session = await a_session(storage)
    connection = await asyncpg.connect(supabase.postgres.url)
    await fill(connection, session)
    begun = await storage.begin_turn(a_turn(session, history_chars=2_800))
    assert isinstance(begun, BegunTurn)
    assert begun.history_truncated
    assert 80 <= len(begun.history) <= 100
    assert [m.content for m in begun.history][-2:] == ["message 9998", "message 9999"]
    page = await storage.list_messages(session.id, session.chatbot_id, limit=50)
    assert len(page.data) == 50
    assert page.has_more
    await connection.close()
    await storage.close()


async def test_history_is_read_only_as_far_as_the_budget_goes(supabase: Supabase) -> None:
    storage = await open_plugin(supabase, "postgres")
    session = await a_session(storage)
    await storage.close()
    connection = await asyncpg.connect(supabase.postgres.url)
    await fill(connection, session)
    # By the database's own count of the rows that were read in this transaction.
    count = """SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)
        FROM pg_stat_xact_user_tables WHERE relname = 'conversations'"""
    try:
        for statistics in ("SELECT 1", "ANALYZE conversations, turns"):
            await connection.execute(statistics)
            async with connection.transaction():
                history = "SELECT chatd_history($1, $2, 2800, 16)"
                await connection.fetchval(history, UUID(session.id), UUID(new_id()))
                assert await connection.fetchval(count) < 1_000
    finally:
        await connection.close()


async def fill(connection: asyncpg.Connection, session: Session) -> None:
    """Stores 5,000 turns with 10,000 messages, as they would be after a long time."""
    turns = """INSERT INTO turns (turn_id, session_id, seq, status, lease_until)
        SELECT lpad(to_hex(i), 32, '0')::uuid, $1, i, 'completed', now()
        FROM generate_series(1, 5000) i"""
    messages = """INSERT INTO conversations (session_id, role, content, turn_id)
        SELECT $1, (ARRAY['user', 'assistant'])[i % 2 + 1], 'message ' || lpad(i::text, 4, '0'),
            lpad(to_hex(i / 2 + 1), 32, '0')::uuid FROM generate_series(0, 9999) i"""
    for statement in (turns, messages):
        await connection.execute(statement, UUID(session.id))


@BOTH
async def test_a_slow_query_is_given_up_and_other_chatbots_go_on(
    serve: Serve, supabase: Supabase, plugin: str
) -> None:
    served = await serve(echoing(supabase.configured(plugin, timeout=0.75)))
    bot, other = await served.add_bot(), await served.add_bot("another-key-0123456789abcdef")
    slow = await served.session(bot)
    others = [await served.session(other, "another-key-0123456789abcdef") for _ in range(20)]
    slow_down = f"""
        CREATE FUNCTION slow_down() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep(5); RETURN NEW; END $$;
        CREATE TRIGGER slow_down BEFORE INSERT ON turns FOR EACH ROW
            WHEN (NEW.session_id = '{slow}') EXECUTE FUNCTION slow_down();"""
    supabase.postgres.execute(slow_down)
    try:
        waiting = asyncio.create_task(served.chat(bot, slow, "slow"))
        await asyncio.sleep(0.1)
        answers = await asyncio.gather(
            *(served.chat(other, s, "hi", key="another-key-0123456789abcdef") for s in others)
        )
        assert [answer.status for answer in answers] == [200] * 20
        assert not waiting.done()
        assert_unavailable(await waiting)
    finally:
        supabase.postgres.execute(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND state = 'active' AND query LIKE '%chatd_begin_turns%'",
            "DROP FUNCTION slow_down CASCADE",
        )
    await in_time(lambda: served.chat(bot, slow, "fast"), lambda answer: answer.status == 200)
