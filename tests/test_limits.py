"""How much: who is refused how long, what it says, and whom it does not touch."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from chatd.app import packaged_configs
from chatd.config import ConfigFile
from chatd.domain import Chatbot, new_id, rates
from chatd.limits import counted_address
from chatd.memory import MemoryWindows, WindowCounters
from chatd.shared import Window
from tests.conftest import Serve
from tests.support import ECHO_CONFIG, Answer, Served
from tests.test_http import ORIGIN, assert_problem
from tests.test_identity import SECRET, token

WIDGET = "/api/chat/widget"
NAMES = (
    "sessions_per_ip",
    "sessions_per_visitor",
    "sessions_per_chatbot",
    "turns_per_ip",
    "turns_per_session",
    "turns_per_visitor",
    "turns_per_chatbot",
    "turns_per_key",
)


def limited(*, proxies: int = 0, **limits: str) -> str:
    """A configuration with these limits, and none of the others."""
    lines = [f"  {name}: {limits.get(name, 'none')}" for name in NAMES]
    server = f"server:\n  trusted_proxies: {proxies}"
    return ECHO_CONFIG.replace("server:", server) + "\n".join(["limits:", *lines]) + "\n"


async def begin(served: Served, bot: Chatbot, *, user: str = "", **headers: str) -> Answer:
    """Begins a widget's session; the headers are written with `_`."""
    body = {"chatbot_id": bot.id, **({"user_token": token(user)} if user else {})}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await served.post(f"{WIDGET}/session", body, headers=named)


async def say(served: Served, session: str, *, user: str = "", **headers: str) -> Answer:
    body = {"session_id": session, "message": "hi", **({"user_token": token(user)} if user else {})}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await served.post(WIDGET, body, headers=named)


async def session_of(served: Served, bot: Chatbot, **more: str) -> str:
    answer = await begin(served, bot, **more)
    assert answer.status == 200, answer.body
    return str(answer.json["session_id"])


async def from_address(served: Served, address: str, stack: AsyncExitStack) -> Served:
    """The same server, asked from another address of this machine."""
    connector = aiohttp.TCPConnector(local_addr=(address, 0))
    http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
    return Served(served.runtime, served.url, http, served.bots)


# What a refusal says


async def test_a_refusal_says_which_limit_and_how_long_to_wait(serve: Serve) -> None:
    served = await serve(limited(sessions_per_ip="2/minute, 5/hour", sessions_per_chatbot="9/day"))
    bot = await served.add_bot()
    policy = '"sessions_per_ip/60";q=2;w=60, "sessions_per_ip/3600";q=5;w=3600, '
    policy += '"sessions_per_chatbot/86400";q=9;w=86400'
    for left in (1, 0):
        answer = await begin(served, bot, Origin=ORIGIN)
        assert answer.status == 200
        assert answer.headers["RateLimit-Policy"] == policy
        told = re.fullmatch(r'"sessions_per_ip/60";r=(\d+);t=(\d+)', answer.headers["RateLimit"])
        assert told is not None
        assert int(told[1]) == left
        assert 1 <= int(told[2]) <= 60
    answer = await begin(served, bot, Origin=ORIGIN)
    problem = assert_problem(answer, 429, "rate_limited")
    assert problem["detail"].startswith("At most 2 in a minute are taken (sessions_per_ip).")
    assert answer.headers["RateLimit-Policy"] == policy
    wait = answer.headers["Retry-After"]
    assert 1 <= int(wait) <= 60
    assert answer.headers["RateLimit"] == f'"sessions_per_ip/60";r=0;t={wait}'
    # The page can read all of that.
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"RateLimit", "RateLimit-Policy", "Retry-After"} <= set(exposed)


async def test_who_waits_as_long_as_it_says_is_taken_again(serve: Serve) -> None:
    served = await serve(limited(sessions_per_ip="2/2 seconds"))
    bot = await served.add_bot()
    await begin(served, bot)
    await begin(served, bot)
    refused = await begin(served, bot)
    assert_problem(refused, 429, "rate_limited")
    await asyncio.sleep(int(refused.headers["Retry-After"]))
    assert (await begin(served, bot)).status == 200


async def test_a_stream_says_what_is_left(serve: Serve) -> None:
    served = await serve(limited(turns_per_session="5/minute"))
    session = await session_of(served, await served.add_bot())
    body = {"session_id": session, "message": "hi", "stream": True}
    answer = await served.post(WIDGET, body)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["RateLimit"].startswith('"turns_per_session/60";r=4;t=')


async def test_a_turn_that_cannot_begin_is_told_what_is_left_without_it(serve: Serve) -> None:
    config = limited(turns_per_session="9/minute").replace("reply:", "word_seconds: 0.2, reply:")
    served = await serve(config)
    session = await session_of(served, await served.add_bot())
    first = asyncio.create_task(say(served, session))
    await asyncio.sleep(0.1)
    refused = await say(served, session)
    assert_problem(refused, 409, "turn_in_progress")
    assert refused.headers["RateLimit"].startswith('"turns_per_session/60";r=8;')
    assert (await first).status == 200


# Who is counted


async def test_a_flood_from_one_address_does_not_refuse_another(serve: Serve) -> None:
    served = await serve(
        limited(
            sessions_per_ip="5/minute",
            sessions_per_chatbot="10/minute",
            turns_per_ip="5/minute",
            turns_per_chatbot="10/minute",
        )
    )
    bot = await served.add_bot()
    async with AsyncExitStack() as stack:
        other = await from_address(served, "127.0.0.2", stack)
        flood = await asyncio.gather(*(begin(served, bot) for _ in range(200)))
        assert sorted(answer.status for answer in flood) == [200] * 5 + [429] * 195
        mine = [answer.json["session_id"] for answer in flood if answer.status == 200]
        theirs = [await session_of(other, bot) for _ in range(5)]
        said = await asyncio.gather(*(say(served, mine[i % 5]) for i in range(200)))
        assert sum(answer.status == 429 for answer in said) == 195
        assert [(await say(other, session)).status for session in theirs] == [200] * 5


async def test_what_is_refused_for_another_reason_does_not_count_for_all(serve: Serve) -> None:
    served = await serve(limited(sessions_per_chatbot="2/minute", turns_per_chatbot="2/minute"))
    bot = await served.add_bot(require_identity=True, identity_secrets=(SECRET,))
    for _ in range(5):
        assert (await begin(served, bot)).status == 403
        assert (await begin(served, bot, user="ann", Origin="https://evil.example")).status == 403
    session = await session_of(served, bot, user="ann")
    for _ in range(5):
        assert (await say(served, session, user="bob")).status == 404
        assert (await served.post(WIDGET, {"session_id": session})).status == 422
        assert (await say(served, session, user="ann", Idempotency_Key="a b")).status == 422
    assert (await say(served, session, user="ann")).status == 200


async def test_turns_that_cannot_begin_do_not_count_for_all(serve: Serve) -> None:
    config = limited(turns_per_chatbot="2/minute").replace("reply:", "word_seconds: 0.3, reply:")
    served = await serve(config)
    bot = await served.add_bot()
    sessions = [await session_of(served, bot) for _ in range(2)]
    first = asyncio.create_task(say(served, sessions[0]))
    await asyncio.sleep(0.1)
    assert {(await say(served, sessions[0])).status for _ in range(5)} == {409}
    assert (await say(served, sessions[1])).status == 200
    assert (await first).status == 200
    assert_problem(await say(served, sessions[1]), 429, "rate_limited")


async def test_turns_that_cannot_begin_take_nothing_from_who_asks(serve: Serve) -> None:
    limits = {"turns_per_ip": "3/minute", "turns_per_session": "2/minute"}
    config = limited(**limits).replace("reply:", "word_seconds: 0.3, reply:")
    served = await serve(config)
    session = await session_of(served, await served.add_bot())
    first = asyncio.create_task(say(served, session))
    await asyncio.sleep(0.1)
    assert [(await say(served, session)).status for _ in range(5)] == [409] * 5
    assert (await first).status == 200
    assert [(await say(served, session)).status for _ in range(2)] == [200, 429]


async def test_a_turn_that_is_replayed_counts(serve: Serve) -> None:
    served = await serve(limited(turns_per_session="3/minute"))
    session = await session_of(served, await served.add_bot())
    said = [await say(served, session, Idempotency_Key="once") for _ in range(4)]
    assert [answer.status for answer in said] == [200, 200, 200, 429]


async def test_a_flood_of_turns_that_cannot_begin_is_refused(serve: Serve) -> None:
    config = limited(turns_per_ip="2/minute").replace("reply:", "word_seconds: 0.7, reply:")
    served = await serve(config)
    bot = await served.add_bot()
    session = await session_of(served, bot)
    first = asyncio.create_task(say(served, session))
    await asyncio.sleep(0.1)
    said = [await say(served, session) for _ in range(12)]
    assert [answer.status for answer in said] == [409] * 10 + [429] * 2
    problem = assert_problem(said[-1], 429, "rate_limited")
    assert problem["detail"].startswith("At most 10 in a minute are taken (failed_turns_per_ip).")
    assert said[-1].headers["RateLimit"].startswith('"failed_turns_per_ip/60";r=0;t=')
    assert 1 <= int(said[-1].headers["Retry-After"]) <= 60
    assert (await first).status == 200


async def test_many_failures_at_once_are_not_more_than_may_be_tried(serve: Serve) -> None:
    served = await serve(limited(turns_per_ip="4/minute"))
    await served.add_bot()
    bot = served.bots[0]
    session = await session_of(served, bot)
    said = await asyncio.gather(
        *(say(served, session, Idempotency_Key=f"key-{i}") for i in range(60))
    )
    statuses = [answer.status for answer in said]
    assert 1 <= statuses.count(200) <= 4
    assert statuses.count(409) <= 20


async def test_many_at_once_are_not_more_than_a_chatbots_limit(serve: Serve) -> None:
    served = await serve(limited(turns_per_chatbot="7/minute"))
    bot = await served.add_bot()
    sessions = [await session_of(served, bot) for _ in range(20)]
    said = await asyncio.gather(*(say(served, session) for session in sessions))
    assert sorted(answer.status for answer in said) == [200] * 7 + [429] * 13


async def test_each_session_has_its_own_turns(serve: Serve) -> None:
    served = await serve(limited(turns_per_session="2/minute"))
    bot = await served.add_bot()
    sessions = [await session_of(served, bot) for _ in range(2)]
    for session in sessions:
        assert [(await say(served, session)).status for _ in range(3)] == [200, 200, 429]


async def test_a_visitor_is_counted_over_all_its_sessions_and_addresses(serve: Serve) -> None:
    served = await serve(
        limited(proxies=1, turns_per_visitor="2/minute", sessions_per_visitor="3/minute")
    )
    bot = await served.add_bot(require_identity=True, identity_secrets=(SECRET,))
    sessions = [
        await session_of(served, bot, user="ann", X_Forwarded_For=f"192.0.2.{i}") for i in range(3)
    ]
    assert_problem(await begin(served, bot, user="ann"), 429, "rate_limited")
    said = [
        await say(served, session, user="ann", X_Forwarded_For=f"192.0.2.{i}")
        for i, session in enumerate(sessions)
    ]
    assert [answer.status for answer in said] == [200, 200, 429]
    assert (await say(served, await session_of(served, bot, user="bob"), user="bob")).status == 200


async def test_chatbots_do_not_share_limits(serve: Serve) -> None:
    served = await serve(limited(sessions_per_ip="1/minute", sessions_per_chatbot="1/minute"))
    for _ in range(2):
        bot = await served.add_bot(key=new_id())
        assert [(await begin(served, bot)).status for _ in range(2)] == [200, 429]


async def test_a_chatbots_own_limits_replace_the_servers_one_by_one(serve: Serve) -> None:
    served = await serve(limited(sessions_per_ip="1/minute", turns_per_ip="1/minute"))
    bot = await served.add_bot(limits={"sessions_per_ip": "3/minute"})
    sessions = [await begin(served, bot) for _ in range(4)]
    assert [answer.status for answer in sessions] == [200, 200, 200, 429]
    session = sessions[0].json["session_id"]
    assert [(await say(served, session)).status for _ in range(2)] == [200, 429]
    free = await served.add_bot(key=new_id(), limits={"sessions_per_ip": "none"})
    assert {(await begin(served, free)).status for _ in range(5)} == {200}


async def test_clients_with_a_key_are_counted_by_it_and_apart_from_visitors(serve: Serve) -> None:
    served = await serve(limited(turns_per_key="2/minute", turns_per_chatbot="1/minute"))
    bot = await served.add_bot()
    session = await served.session(bot)
    assert [(await served.chat(bot, session, "hi")).status for _ in range(2)] == [200, 200]
    refused = await served.chat(bot, session, "hi")
    assert_problem(refused, 429, "rate_limited")
    assert refused.headers["RateLimit"].startswith('"turns_per_key/60";r=0;t=')
    asked = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
    bearer = {"Authorization": "Bearer test-key-0123456789abcdef"}
    refused = await served.post("/v1/chat/completions", asked, headers=bearer)
    assert (refused.status, refused.json["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["Retry-After"]) >= 1
    assert (await say(served, await session_of(served, bot))).status == 200


async def test_clients_with_a_key_are_not_limited_unless_it_is_set(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    answers = [await served.chat(bot, session, "hi") for _ in range(40)]
    assert {answer.status for answer in answers} == {200}
    assert "RateLimit" not in answers[0].headers


async def test_a_widget_is_limited_without_any_configuration(served: Served) -> None:
    bot = await served.add_bot()
    sessions = [await begin(served, bot) for _ in range(21)]
    assert [answer.status for answer in sessions] == [200] * 20 + [429]
    session = sessions[0].json["session_id"]
    assert [(await say(served, session)).status for _ in range(11)] == [200] * 10 + [429]


# Where a client is


async def test_a_claimed_address_counts_only_behind_a_trusted_proxy(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(limited(sessions_per_ip="1/minute"))
    bot = await served.add_bot()
    claims = [f"192.0.2.{i}" for i in range(3)]
    answers = [await begin(served, bot, X_Forwarded_For=claim) for claim in claims]
    assert [answer.status for answer in answers] == [200, 429, 429]
    # An operator who has forgotten the setting is told once.
    assert [r.message for r in caplog.records if "server.trusted_proxies" in r.message] == [
        "requests come with X-Forwarded-For: if a proxy of yours adds it, set "
        "server.trusted_proxies, or all its clients are counted as one"
    ]


@pytest.mark.parametrize("dyno", [True, False])
def test_the_carried_configurations_trust_herokus_router_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, dyno: bool
) -> None:
    for name in ("SUPABASE_URL", "SUPABASE_KEY", "DATABASE_URL"):
        monkeypatch.setenv(name, "https://abcdefghijkl.supabase.co")
    if dyno:
        monkeypatch.setenv("DYNO", "web.1")
    else:
        monkeypatch.delenv("DYNO", raising=False)
    for path in packaged_configs():
        values = ConfigFile.read(path).values
        assert values["server"]["trusted_proxies"] == (1 if dyno else None)
        assert values["limits"]["daily_budget_usd"] > 0


async def test_behind_a_proxy_the_address_that_it_added_counts(serve: Serve) -> None:
    served = await serve(limited(proxies=1, sessions_per_ip="1/minute"))
    bot = await served.add_bot()
    for claimed in ["192.0.2.1", "10.0.0.1, 192.0.2.2", "junk, 192.0.2.3"]:
        assert (await begin(served, bot, X_Forwarded_For=claimed)).status == 200
        forged = f"203.0.113.9, {claimed}"
        assert_problem(await begin(served, bot, X_Forwarded_For=forged), 429, "rate_limited")


async def test_an_ipv6_network_is_counted_as_one(serve: Serve) -> None:
    served = await serve(limited(proxies=1, sessions_per_ip="1/minute"))
    bot = await served.add_bot()
    for address, status in [
        ("2001:db8::1", 200),
        ("2001:db8::ffff:1", 429),
        ("2001:db8:0:0:abcd::2", 429),
        ("2001:db8:0:1::1", 200),
    ]:
        assert (await begin(served, bot, X_Forwarded_For=address)).status == status


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "counted"),
    [
        ("192.0.2.1", "", 0, "192.0.2.1"),
        ("192.0.2.1", "198.51.100.1", 0, "192.0.2.1"),
        ("192.0.2.1", "", 2, "192.0.2.1"),
        ("192.0.2.1", " , ", 1, "192.0.2.1"),
        ("192.0.2.1", "198.51.100.1", 1, "198.51.100.1"),
        ("192.0.2.1", "203.0.113.1, 198.51.100.1,10.0.0.1", 2, "198.51.100.1"),
        ("192.0.2.1", "198.51.100.1", 3, "198.51.100.1"),
        ("192.0.2.1", "unknown", 1, "192.0.2.1"),
        ("192.0.2.1", "198.51.100.1:4711", 1, "198.51.100.1"),
        ("192.0.2.1", "[2001:db8::1]:4711", 1, "2001:db8::/64"),
        ("192.0.2.1", "::ffff:198.51.100.1", 1, "198.51.100.1"),
        ("2001:db8:1:2:3:4:5:6", "", 0, "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "", 0, "fe80::/64"),
        ("", "", 0, ""),
    ],
)
def test_a_client_is_where_the_last_trusted_proxy_saw_it(
    peer: str, forwarded: str, trusted: int, counted: str
) -> None:
    assert counted_address(peer, forwarded, trusted) == counted


# Counting


async def taken(counters: WindowCounters, window: Window) -> bool:
    """Takes one; whether there was one."""
    (left,) = await counters.take([window])
    return left.left > 0


async def test_windows_that_ran_out_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = MemoryWindows()
    counters = WindowCounters(windows)
    for i in range(1000):
        assert await taken(counters, Window(f"key-{i}", 5, 60))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert await taken(counters, Window("another", 5, 60))
    assert sum(len(keys) for keys in windows._taken.values()) == 1


async def test_who_asks_the_most_is_not_forgotten_for_those_who_ask_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatd.memory.MAX_KEYS", 10)
    counters = WindowCounters()
    for i in range(50):
        assert await taken(counters, Window("flood", 50, 60))
        assert await taken(counters, Window(f"key-{i}", 50, 60))
    assert not await taken(counters, Window("flood", 50, 60))
    assert (await counters.left(Window("key-0", 50, 60))).left == 50


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("20/minute", [(20, 60)]),
        ("20/minute, 200/hour", [(20, 60), (200, 3600)]),
        ("1/10 seconds,5/2days", [(1, 10), (5, 172800)]),
        ("none", []),
    ],
)
def test_a_limit_is_read_as_it_is_written(text: str, read: list[Any]) -> None:
    assert [(rate.count, rate.seconds) for rate in rates(text)] == read


@pytest.mark.parametrize(
    "text", ["20", "0/minute", "20/month", "-1/day", "20/minute; 2/day", "off", "''", "[]", "5"]
)
async def test_a_limit_that_cannot_be_read_stops_the_start(serve: Serve, text: str) -> None:
    with pytest.raises(Exception, match=r"limits\.turns_per_ip: must be"):
        await serve(ECHO_CONFIG + f"limits: {{turns_per_ip: {text}}}\n")


PLUGIN = """
import chatd


class Lookup(chatd.Handler):
    async def get(self, chatbot_id):
        chatbot = await self.services.access.chatbot(chatbot_id)
        self.serve_chatbot(chatbot, check_origin=True)
        async with self.admitted("turns", ip=self.client_address()):
            self.answer({"found": True})


@chatd.hookimpl
def chatd_register_routes(register):
    register.add(r"/x/lookup/([^/]+)", Lookup)
"""


async def test_a_plugins_endpoint_can_count_under_the_same_limits(
    serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "lookup.py").write_text(PLUGIN)
    served = await serve(
        limited(turns_per_ip="2/minute") + f"plugins: {{folder: {tmp_path}/plugins}}"
    )
    bot = await served.add_bot()
    session = await session_of(served, bot)
    assert (await served.get(f"/x/lookup/{bot.id}")).status == 200
    assert (await say(served, session)).status == 200
    assert_problem(await served.get(f"/x/lookup/{bot.id}"), 429, "rate_limited")
