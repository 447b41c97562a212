"""Servers over one storage and one Redis: what each knows of the others, with Redis and without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatd.errors import RequestError
from tests.conftest import Serve
from tests.redis_server import PASSWORD, RedisServer
from tests.support import Served, chatd_command
from tests.test_budgets import MANY, priced, spent, talk_until_refused
from tests.test_streaming import SLOW_CONFIG, SLOW_REPLY, Talk, parsed, read_some, said, types

SHARED = 'server: {chatbot_cache_seconds: 60}\nshared: {use: redis, url: "URL"}\n'


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


def slow(redis: RedisServer, reply: str = "") -> str:
    """A configuration whose turns take most of a second."""
    config = SLOW_CONFIG.replace("one two three", f"{reply}one two three")
    return config + SHARED.replace("URL", redis.url)


def at(served: Served, talk: Talk) -> Talk:
    """The same talk, at another server."""
    return Talk(served, talk.bot, talk.session)


async def up(served: Served, wanted: bool = True) -> None:
    """Waits until a server knows that Redis is there, or that it is not."""
    sharing = served.runtime.services.sharing
    async with asyncio.timeout(20):
        while sharing.is_up is not wanted:
            await asyncio.sleep(0.02)


async def begun(answer: Any, deltas: int = 2) -> tuple[str, int]:
    """The turn of a stream that runs, and the id of the last event that was read of it."""
    events = await read_some(answer, deltas)
    return events[0][1]["messageMetadata"]["turn_id"], events[-1][0] or 0


# Streams and stopping


async def test_a_reader_elsewhere_sees_words_as_they_come_and_under_the_same_ids(
    redis: RedisServer, serve: Serve
) -> None:
    one, two = await serve(slow(redis)), await serve(slow(redis))
    talk = await Talk.open(one)
    async with talk.say() as here:
        turn_id, _ = await begun(here)
        path = f"{two.url}/api/chat/turns/{turn_id}/events"
        async with two.http.get(path, headers=talk.headers) as there:
            first = await read_some(there, 2)
            assert (await talk.turn(turn_id))["status"] == "running"
            rest = parsed((await there.read()).decode())
    stored = await talk.events(turn_id)
    events = [*first, *rest]
    assert said(events) == said(stored) == SLOW_REPLY
    assert types(first)[:2] == ["start", "text-start"]
    assert len([kind for kind in types(events) if kind == "text-delta"]) > 2
    assert events[-2] == stored[-2]


async def test_a_stream_goes_on_at_another_server_where_it_broke_off(
    redis: RedisServer, serve: Serve
) -> None:
    one, two = await serve(slow(redis)), await serve(slow(redis))
    talk = await Talk.open(one)
    async with talk.say() as here:
        events = await read_some(here, 3)
    turn_id, last = events[0][1]["messageMetadata"]["turn_id"], events[-1][0]
    more = await at(two, talk).events(turn_id, last or 0)
    assert said(events) + said(more) == SLOW_REPLY
    assert types(more)[-3:] == ["text-end", "finish", "[DONE]"]


async def test_the_same_request_and_the_sessions_stream_join_the_turn_elsewhere(
    redis: RedisServer, serve: Serve
) -> None:
    one, two = await serve(slow(redis)), await serve(slow(redis))
    talk = await Talk.open(one)
    async with talk.say(key="k") as here:
        await begun(here)
        there = at(two, talk)
        path = f"{two.url}/api/chat/session/{talk.session}/stream"
        async with there.say(key="k") as joined, two.http.get(path, headers=talk.headers) as live:
            assert joined.headers["Idempotency-Replayed"] == "true"
            first, also = await read_some(joined, 1), await read_some(live, 1)
            assert (await talk.turn(first[0][1]["messageMetadata"]["turn_id"]))[
                "status"
            ] == "running"
            for begin, answer in ((first, joined), (also, live)):
                events = [*begin, *parsed((await answer.read()).decode())]
                assert said(events) == SLOW_REPLY
    assert await one.transcript(talk.bot, talk.session) == [
        ("user", "hi"),
        ("assistant", SLOW_REPLY),
    ]


async def test_a_turn_is_stopped_at_once_from_another_server(
    redis: RedisServer, serve: Serve
) -> None:
    one, two = await serve(slow(redis, "a " * 400)), await serve(slow(redis))
    talk = await Talk.open(one)
    async with talk.say() as here:
        turn_id, _ = await begun(here)
        stop = f"/api/chat/turns/{turn_id}/stop"
        stopped = (await two.post(stop, headers=talk.headers)).json
        assert stopped["status"] == "stopped"
        assert stopped["response"].startswith("a a")
        assert types(parsed((await here.read()).decode()))[-2:] == ["abort", "[DONE]"]


async def test_a_session_that_is_erased_elsewhere_is_forgotten_and_its_turn_ends(
    redis: RedisServer, serve: Serve
) -> None:
    one, two = await serve(slow(redis, "a " * 400)), await serve(slow(redis))
    bot = await one.add_bot(allowed_origins=["*"])
    begin = await one.post("/api/chat/widget/session", {"chatbot_id": bot.id})
    session = begin.json["session_id"]
    message = {"session_id": session, "message": "hi", "stream": True}
    async with one.http.post(f"{one.url}/api/chat/widget", json=message) as here:
        await begun(here)
        bearer = {"Authorization": f"Bearer {session}"}
        erased = await two.request("DELETE", "/api/chat/widget/session", headers=bearer)
        assert erased.status == 204
        assert types(parsed((await here.read()).decode()))[-1] == "[DONE]"
    async with asyncio.timeout(5):
        while (await one.get("/api/chat/widget/messages", headers=bearer)).status != 404:
            await asyncio.sleep(0.02)


async def test_what_gets_lost_between_servers_is_sent_again(
    redis: RedisServer, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatd.sharing.RETRY_SECONDS", 0.1)
    one, two = await serve(slow(redis, "a " * 20)), await serve(slow(redis))
    talk = await Talk.open(one)
    async with talk.say() as here:
        turn_id, _ = await begun(here)
        path = f"{two.url}/api/chat/turns/{turn_id}/events"
        async with two.http.get(path, headers=talk.headers) as there:
            first = await read_some(there, 2)
            redis.ask("CLIENT", "KILL", "TYPE", "pubsub")
            events = [*first, *parsed((await there.read()).decode())]
    assert said(events) == "a " * 20 + SLOW_REPLY
    ids = [number for number, _ in events if number is not None]
    assert ids == sorted(set(ids))


async def test_a_reader_elsewhere_gets_the_rest_from_storage_when_redis_dies(
    redis: RedisServer, serve: Serve
) -> None:
    one, two = await serve(slow(redis)), await serve(slow(redis))
    talk = await Talk.open(one)
    async with talk.say() as here:
        turn_id, _ = await begun(here)
        path = f"{two.url}/api/chat/turns/{turn_id}/events"
        async with two.http.get(path, headers=talk.headers) as there:
            first = await read_some(there, 2)
            redis.kill()
            events = [*first, *parsed((await there.read()).decode())]
    assert said(events) == SLOW_REPLY
    ids = [number for number, _ in events if number is not None]
    assert ids == sorted(set(ids))


# Limits and budgets


async def test_four_servers_take_as_many_turns_as_one_would(
    redis: RedisServer, serve: Serve
) -> None:
    config = SLOW_CONFIG.replace("one two three four five six seven eight ", "")
    limits = "limits: {turns_per_key: 40/minute}\n"
    servers = [await serve(config + SHARED.replace("URL", redis.url) + limits) for _ in range(4)]
    bot = await servers[0].add_bot()
    sessions = [await servers[0].session(bot) for _ in range(60)]

    async def ask(i: int) -> int:
        return (await servers[i % 4].chat(bot, sessions[i], "hi")).status

    statuses = await asyncio.gather(*map(ask, range(60)))
    assert sorted(statuses) == [200] * 40 + [429] * 20


async def test_what_did_not_begin_is_given_back_everywhere(
    redis: RedisServer, serve: Serve
) -> None:
    limits = "limits: {turns_per_key: 2/minute}\n"
    one, two = [await serve(slow(redis) + limits) for _ in range(2)]
    bot = await one.add_bot()
    session = await one.session(bot)
    async with Talk(one, bot, session).say() as here:
        await begun(here, 1)
        for _ in range(4):
            assert (await two.chat(bot, session, "hi")).json["code"] == "turn_in_progress"
        await here.read()
    assert (await two.chat(bot, session, "hi")).status == 200
    assert (await one.chat(bot, session, "hi")).status == 429


async def test_a_budget_is_overrun_by_no_more_than_one_turn_over_two_servers(
    redis: RedisServer, serve: Serve
) -> None:
    async with priced(serve) as service:
        servers = [await service.serve(SHARED.replace("URL", redis.url)) for _ in range(2)]
        bot = await servers[0].add_bot(daily_budget_usd=1)
        answers = await asyncio.gather(
            *(talk_until_refused(servers[i % 2], bot) for i in range(MANY))
        )
        # What ends while storage is read may count twice for a while, but nothing counts never.
        assert 0.9 <= await spent(servers[0], bot) <= 1.03 + 1e-9
        assert 30 <= sum(answers) <= 34


async def test_a_budget_holds_when_redis_forgets_what_was_spent(
    redis: RedisServer, serve: Serve
) -> None:
    async with priced(serve) as service:
        served = await service.serve(SHARED.replace("URL", redis.url))
        bot = await served.add_bot(daily_budget_usd=0.08)
        session = await served.session(bot)
        for status in (200, 200, 200, 429):
            redis.ask("FLUSHALL")
            assert (await served.chat(bot, session, "hi")).status == status


# What changed


async def test_a_change_on_the_command_line_is_seen_at_once_however_long_chatbots_are_kept(
    redis: RedisServer, serve: Serve, tmp_path: Path
) -> None:
    served = await serve(slow(redis))
    talk = await Talk.open(served)
    assert (await talk.turn(talk.session))["code"] == "not_found"  # by now it is in the cache
    config = ("--config", str(tmp_path / "chatd.yaml"))
    rotate = ("bots", "rotate-key", talk.bot.id, *config)
    loop = asyncio.get_running_loop()
    done = await loop.run_in_executor(None, lambda: chatd_command(*rotate, cwd=tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    async with asyncio.timeout(5):
        while (await talk.turn(talk.session))["code"] != "invalid_api_key":
            await asyncio.sleep(0.02)


async def test_a_command_does_its_work_without_redis_and_says_what_that_means(
    redis: RedisServer, serve: Serve, tmp_path: Path
) -> None:
    served = await serve(slow(redis))
    bot = await served.add_bot()
    loop = asyncio.get_running_loop()
    check = ("check", "--online", "--config", str(tmp_path / "chatd.yaml"))
    done = await loop.run_in_executor(None, lambda: chatd_command(*check, cwd=tmp_path))
    assert "shared: answers" in done.stdout
    redis.kill()
    arguments = ("bots", "set", bot.id, "--name", "New", "--config", str(tmp_path / "chatd.yaml"))
    done = await loop.run_in_executor(None, lambda: chatd_command(*arguments, cwd=tmp_path))
    assert done.returncode == 0
    assert "running servers cannot be told" in done.stderr
    changed = await served.runtime.services.storage.get_chatbot(bot.id)
    assert changed is not None
    assert changed.name == "New"


# Redis gone


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of sharing."""
    return [record.getMessage() for record in caplog.records if record.name == "chatd.sharing"]


async def test_chat_goes_on_without_redis_and_the_log_says_once_that_it_is_gone_and_back(
    redis: RedisServer,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("chatd.sharing.RETRY_SECONDS", 0.1)
    limits = "limits: {turns_per_key: 4/minute}\n"
    served = await serve(SLOW_CONFIG + SHARED.replace("URL", redis.url) + limits)
    bot = await served.add_bot()
    session = await served.session(bot)
    assert (await served.chat(bot, session, "hi")).status == 200
    redis.kill()
    statuses = [(await served.chat(bot, session, "hi")).status for _ in range(4)]
    # It goes on counting with what it counted before.
    assert statuses == [200, 200, 200, 429]
    assert (await served.get("/readyz")).status == 200
    await up(served, False)
    sharing = served.runtime.services.sharing
    assert sharing.fallbacks >= 4
    redis.start()
    await up(served)
    assert (await served.chat(bot, session, "hi")).status == 200
    lines = told(caplog)
    assert [line.partition(":")[0] for line in lines] == [
        "what processes share is gone, and each goes on by itself",
        "what processes share is back",
    ]
    assert sharing.losses == 1


async def test_chat_goes_on_while_redis_stands_still(redis: RedisServer, serve: Serve) -> None:
    limits = "limits: {turns_per_key: 3/minute}\n"
    one, two = [
        await serve(SLOW_CONFIG + SHARED.replace("URL", redis.url) + limits) for _ in range(2)
    ]
    bot = await one.add_bot()
    sessions = [await one.session(bot) for _ in range(6)]
    with redis.paused():
        for served in (one, two):
            statuses = [(await served.chat(bot, s, "hi")).status for s in sessions[:4]]
            assert sorted(statuses) == [200, 200, 200, 429]
    for served in (one, two):
        await up(served)


async def test_a_server_starts_without_redis_and_shares_once_it_is_there(
    redis: RedisServer,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatd.sharing.RETRY_SECONDS", 0.1)
    redis.kill()
    one, two = await serve(slow(redis)), await serve(slow(redis))
    talk = await Talk.open(one)
    assert (await one.chat(talk.bot, talk.session, "hi")).status == 200
    redis.start()
    await up(one)
    await up(two)
    async with talk.say() as here:
        turn_id, _ = await begun(here, 1)
        stop = f"/api/chat/turns/{turn_id}/stop"
        assert (await two.post(stop, headers=talk.headers)).json["status"] == "stopped"
    assert len(told(caplog)) == 4


@pytest.mark.parametrize(
    ("arguments", "user", "cure"),
    [
        (("--requirepass", "another"), ":PASSWORD@", "check user and password"),
        (("--replicaof", "127.0.0.1", "1"), "", "name the primary"),
    ],
)
async def test_a_redis_that_cannot_be_used_is_told_with_what_to_do_and_without_its_password(
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    arguments: tuple[str, ...],
    user: str,
    cure: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    server = RedisServer(*arguments)
    try:
        password = "a-canary%2Fpass%40word"
        url = server.url.replace("//", "//" + user.replace("PASSWORD", password))
        served = await serve(SLOW_CONFIG + SHARED.replace("URL", url))
        talk = await Talk.open(served)
        assert (await served.chat(talk.bot, talk.session, "hi")).status == 200
    finally:
        server.close()
    (line,) = [line for line in told(caplog) if "is gone" in line]
    assert cure in line
    assert PASSWORD not in caplog.text
    assert password not in caplog.text


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://u:a-canary@host:port/0", "shared.url cannot be read"),
        ("http://u:a-canary@host", "shared.url: must be an address like redis://"),
    ],
)
async def test_an_address_that_cannot_be_read_stops_the_start_without_its_password(
    serve: Serve, url: str, told: str
) -> None:
    with pytest.raises(Exception, match=told) as error:
        await serve(SLOW_CONFIG + SHARED.replace("URL", url))
    assert not isinstance(error.value, RequestError)
    assert "canary" not in str(error.value)


async def test_what_one_process_has_by_itself_is_shared_with_nobody_and_asks_nobody(
    serve: Serve,
) -> None:
    served = await serve(SLOW_CONFIG + "shared: {use: memory}\n")
    talk = await Talk.open(served)
    assert (await served.chat(talk.bot, talk.session, "hi")).status == 200
    sharing = served.runtime.services.sharing
    assert (sharing.is_shared, sharing._tasks) == (False, set())
