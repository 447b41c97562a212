"""Which pages may use a widget, what they are told of the chatbot, and what they cannot change."""

from __future__ import annotations

from typing import Any

import pytest

from chatd.domain import new_id
from chatd.errors import ConfigError
from chatd.origins import canonical_origin
from tests.conftest import Serve
from tests.support import ECHO_CONFIG, Answer, Served
from tests.test_http import assert_problem

OWN = "https://own.example"


async def begin(served: Served, chatbot_id: str, origin: str | None = None, **body: Any) -> Answer:
    """Begins a widget's session from a page of an origin."""
    headers = {"Origin": origin} if origin is not None else {}
    body = {"chatbot_id": chatbot_id, **body}
    return await served.post("/api/chat/widget/session", body, headers=headers)


# From which pages


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.example.com",
        "https://a.b.example.com",
        "https://xn--bcher-kva.example.com",
        "https://shop-1.own.example:8443",
    ],
)
async def test_a_star_stands_for_one_label_or_more(served: Served, origin: str) -> None:
    bot = await served.add_bot(
        allowed_origins=("https://*.example.com", "https://*.own.example:8443")
    )
    answer = await begin(served, bot.id, origin)
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = await served.request("OPTIONS", "/api/chat/widget", headers=preflight)
    assert answer.headers["Access-Control-Allow-Origin"] == origin


@pytest.mark.parametrize(
    "origin",
    [
        "https://example.com",
        "https://.example.com",
        "https://evilexample.com",
        "https://example.com.evil.example",
        "https://evil.example/.example.com",
        "https://evil.example?.example.com",
        "https://user@a.example.com",
        "https://a..example.com",
        "https://*.example.com",
        "http://a.example.com",
        "https://a.example.com:8443",
        "https://A.example.com",
        "https://a.example.com.",
        "https://shop.own.example",
        "https://shop.own.example:8444",
        "null",
        "",
    ],
)
async def test_a_star_stands_for_nothing_else(served: Served, origin: str) -> None:
    bot = await served.add_bot(
        allowed_origins=("https://*.example.com", "https://*.own.example:8443")
    )
    answer = await begin(served, bot.id, origin)
    assert_problem(answer, 403, "origin_not_allowed")
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("https://a.example", "https://a.example"),
        ("HTTPS://A.Example", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("https://a.example:0443", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("https://Straße.example", "https://xn--strae-oqa.example"),
        ("https://*.Bücher.example:8443", "https://*.xn--bcher-kva.example:8443"),
        ("http://[0:0::1]:8000", "http://[::1]:8000"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost", "http://localhost"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_an_origin_is_folded_to_what_browsers_send(written: str, sent: str) -> None:
    assert canonical_origin(written) == sent


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("a.example", "an origin like"),
        ("https://", "an origin like"),
        ("https://a.example/", "an origin like"),
        ("https://ann@a.example", "an origin like"),
        ("https://a b.example", "an origin like"),
        ("https://a..example", "an origin like"),
        ("https://a%62.example", "an origin like"),
        ("https://*.*.example", "an origin like"),
        ("https://a.example:65536", "at most 65535"),
        ("https://a.example:x", "an origin like"),
        ("https://[::x]", "an origin like"),
        ("https://[1::2::3]", "an IPv6 address"),
        ("https://127.1", "four numbers"),
        ("https://*.com", "two labels"),
        ("https://*.com.:443", "two labels"),
        ("https://*.127.0.0.1", "not an address"),
        ("https://\u2764.example", "with xn--"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(written: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        canonical_origin(written)


async def test_the_servers_list_is_folded_as_well(serve: Serve) -> None:
    served = await serve(ECHO_CONFIG.replace("https://site.example", "https://SITE.example:443"))
    bot = await served.add_bot()
    assert (await begin(served, bot.id, "https://site.example")).status == 200
    with pytest.raises(ConfigError, match=r"server\.allowed_origins\[0\]: must have two labels"):
        await serve(ECHO_CONFIG.replace("https://site.example", "https://*.com.:443"))


async def test_a_missing_origin_is_refused_when_the_chatbot_has_a_list(served: Served) -> None:
    bot = await served.add_bot(allowed_origins=(OWN,))
    assert_problem(await begin(served, bot.id), 403, "origin_not_allowed")
    session = (await begin(served, bot.id, OWN)).json["session_id"]
    said = {"session_id": session, "message": "hi"}
    assert_problem(await served.post("/api/chat/widget", said), 403, "origin_not_allowed")
    bearer = {"Authorization": f"Bearer {session}"}
    turn = f"turns/{new_id()}"
    for method, path in [
        ("GET", f"bot/{bot.id}"),
        ("GET", "messages"),
        ("GET", "stream"),
        ("GET", turn),
        ("GET", f"{turn}/events"),
        ("POST", f"{turn}/stop"),
        ("POST", f"{turn}/feedback"),
        ("DELETE", "session"),
    ]:
        answer = await served.request(method, f"/api/chat/widget/{path}", headers=bearer)
        assert_problem(answer, 403, "origin_not_allowed")
    assert await served.transcript(bot, session) == []


async def test_a_missing_origin_is_taken_where_everybody_may(served: Served) -> None:
    for origins in [None, ("*",)]:
        bot = await served.add_bot(key=new_id(), allowed_origins=origins)
        assert (await begin(served, bot.id)).status == 200


async def test_a_page_of_this_server_may_read_without_an_origin(served: Served) -> None:
    bot = await served.add_bot(allowed_origins=(OWN,))
    session = (await begin(served, bot.id, OWN)).json["session_id"]
    headers = {"Authorization": f"Bearer {session}", "Sec-Fetch-Site": "same-origin"}
    assert (await served.get("/api/chat/widget/messages", headers=headers)).status == 200
    for site in ["cross-site", "same-site", "none"]:
        headers["Sec-Fetch-Site"] = site
        refused = await served.get("/api/chat/widget/messages", headers=headers)
        assert_problem(refused, 403, "origin_not_allowed")
    headers |= {"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"}
    refused = await served.get("/api/chat/widget/messages", headers=headers)
    assert_problem(refused, 403, "origin_not_allowed")


async def test_a_client_with_the_key_needs_no_origin(served: Served) -> None:
    bot = await served.add_bot(allowed_origins=(OWN,))
    session = await served.session(bot)
    assert (await served.chat(bot, session, "hi")).status == 200


async def test_the_servers_list_takes_stars_too(serve: Serve) -> None:
    config = ECHO_CONFIG.replace("https://site.example", "https://*.site.example")
    served = await serve(config)
    bot = await served.add_bot()
    assert (await begin(served, bot.id, "https://a.site.example")).status == 200
    answer = await begin(served, bot.id, "https://site.example")
    assert_problem(answer, 403, "origin_not_allowed")


# What a page is told


async def test_a_widget_is_told_what_it_draws_and_nothing_else(served: Served) -> None:
    bot = await served.add_bot(
        system_prompt="Keep the secret.",
        allowed_origins=(OWN,),
        greeting="Hello!",
        suggestions=("Why?", "How?"),
        theme="dark",
        accent="#0a7d5c",
        language="pt-BR",
    )
    path = f"/api/chat/widget/bot/{bot.id}"
    answer = await served.get(path, headers={"Origin": OWN})
    assert answer.status == 200
    assert answer.headers["Cache-Control"] == "max-age=60"
    assert answer.headers["Access-Control-Allow-Origin"] == OWN
    assert "Origin" in answer.headers["Vary"]
    assert answer.json == {
        "chatbot_id": bot.id,
        "name": "Bot",
        "greeting": "Hello!",
        "suggestions": ["Why?", "How?"],
        "theme": {"mode": "dark", "accent": "#0a7d5c"},
        "language": "pt-BR",
        "require_identity": False,
    }
    refused = await served.get(path, headers={"Origin": "https://evil.example"})
    assert_problem(refused, 403, "origin_not_allowed")
    assert refused.headers["Cache-Control"] == "no-store"


async def test_a_chatbot_without_settings_leaves_them_to_the_widget(served: Served) -> None:
    bot = await served.add_bot()
    told = (await served.get(f"/api/chat/widget/bot/{bot.id}")).json
    assert told["theme"] == {"mode": None, "accent": None}
    assert (told["greeting"], told["suggestions"], told["language"]) == (None, [], None)


@pytest.mark.parametrize("id", ["123e4567-e89b-42d3-a456-426614174000", "17", "%00"])
async def test_a_chatbot_that_does_not_exist_is_not_found(served: Served, id: str) -> None:
    assert_problem(await served.get(f"/api/chat/widget/bot/{id}"), 404, "not_found")
