"""What clients see over a socket: the endpoints, each error, CORS and ids."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatd.domain import new_id
from chatd.errors import RequestError
from chatd.handlers.problems import PROBLEMS
from tests.conftest import Serve
from tests.postgres import Supabase
from tests.support import ECHO_CONFIG, KEY, Answer, Served

ORIGIN = "https://site.example"
SLOW_CONFIG = ECHO_CONFIG.replace("use: echo,", "use: echo, word_seconds: 0.2,")


@pytest.fixture(params=["sqlite", "supabase", "postgres"])
def storage_config(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each test runs on each storage."""
    if request.param == "sqlite":
        return f"{{use: sqlite, path: {tmp_path / 'chatd.db'}}}"
    database: Supabase = request.getfixturevalue("database")
    database.empty()
    return database.configured(request.param)


def all_errors() -> set[type[RequestError]]:
    """`RequestError` and everything below it."""
    found: set[type[RequestError]] = set()
    waiting = [RequestError]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting += kind.__subclasses__()
    return found


def assert_problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """The answer is this problem, in the shape that all have."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = answer.json
    assert set(body) - {"errors", "turn_id"} == {
        "type",
        "title",
        "status",
        "detail",
        "code",
        "request_id",
    }
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["X-Request-Id"]
    assert body["detail"].endswith((".", "…"))
    return body


def test_every_error_has_a_status() -> None:
    assert {kind for kind in all_errors() if kind.__module__.startswith("chatd.")} == set(PROBLEMS)


# The core endpoints


async def test_a_client_begins_a_session_and_gets_an_answer(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot, user_id="u1", metadata={"plan": "gold"})
    answer = await served.chat(bot, session, "hi")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json
    assert body.pop("turn_id")
    assert body == {
        "response": "You said: hi",
        "model": "echo",
        "usage": {
            "input_tokens": None,
            "output_tokens": None,
            "cached_tokens": None,
            "reasoning_tokens": None,
            "cost_usd": 0.0,
        },
        "finish_reason": "stop",
        "history_truncated": False,
        "stored": True,
    }
    stored = await served.runtime.services.storage.get_session(session)
    assert stored is not None
    assert (stored.user_id, stored.metadata) == ("u1", {"plan": "gold"})


async def test_a_widget_begins_a_session_and_gets_an_answer(served: Served) -> None:
    bot = await served.add_bot()
    headers = {"Origin": ORIGIN}
    answer = await served.post("/api/chat/widget/session", {"chatbot_id": bot.id}, headers=headers)
    assert answer.status == 200
    session = answer.json["session_id"]
    answer = await served.post(
        "/api/chat/widget", {"session_id": session, "message": "hi"}, headers=headers
    )
    assert answer.status == 200
    body = answer.json
    assert body.pop("turn_id")
    assert body == {
        "response": "You said: hi",
        "finish_reason": "stop",
        "history_truncated": False,
        "stored": True,
    }


async def test_the_key_may_come_in_three_ways(served: Served) -> None:
    bot = await served.add_bot()
    body = {"assistant_id": bot.id}
    for headers in [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}]:
        answer = await served.post("/api/chat/session", body, headers=headers)
        assert answer.status == 200
    answer = await served.post(
        "/api/chat/session", {**body, "api_key": KEY}, headers={"X-API-Key": KEY}
    )
    assert answer.status == 200


async def test_two_different_keys_are_refused(served: Served) -> None:
    bot = await served.add_bot()
    answer = await served.post(
        "/api/chat/session",
        {"assistant_id": bot.id, "api_key": KEY},
        headers={"X-API-Key": "another-key"},
    )
    problem = assert_problem(answer, 401, "invalid_api_key")
    assert "two different" in problem["detail"]


async def test_a_resent_conversation_is_not_stored_twice(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    await served.chat(bot, session, "one")
    resent = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said: one"},
        {"role": "user", "content": "two"},
    ]
    answer = await served.chat(bot, session, messages=resent)
    assert answer.status == 200
    assert await served.transcript(bot, session) == [
        ("user", "one"),
        ("assistant", "You said: one"),
        ("user", "two"),
        ("assistant", "You said: two"),
    ]


async def test_several_new_messages_are_one_turn(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session, "one", "two")
    assert answer.json["response"] == "You said: two"
    assert [text for _, text in await served.transcript(bot, session)] == [
        "one",
        "two",
        "You said: two",
    ]


async def test_the_answer_says_when_history_was_left_out(served: Served) -> None:
    bot = await served.add_bot(context_tokens=40)
    session = await served.session(bot)
    assert (await served.chat(bot, session, "x" * 100)).json["history_truncated"] is False
    assert (await served.chat(bot, session, "y")).json["history_truncated"] is True


async def test_upper_case_ids_are_folded(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session.upper(), "hi", assistant_id=bot.id.upper())
    assert answer.status == 200


@pytest.mark.parametrize(
    "write",
    [
        "urn:uuid:{}",
        "{{{}}}",
        "{}\n",
        " {}",
        lambda id: id.replace("-", ""),
        lambda id: id.replace(id[0], "\uff11", 1),
    ],
)
async def test_an_id_in_any_other_form_is_not_valid(
    served: Served, write: str | Callable[[str], str]
) -> None:
    bot = await served.add_bot()
    id = write.format(bot.id) if isinstance(write, str) else write(bot.id)
    answer = await served.post("/api/chat/session", {"api_key": KEY, "assistant_id": id})
    problem = assert_problem(answer, 422, "invalid_request")
    assert {error["pointer"] for error in problem["errors"]} == {"/assistant_id"}


async def test_optional_fields_may_be_null_and_unknown_ones_are_ignored(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot, user_id=None, metadata=None, colour="red")
    assert (await served.chat(bot, session, "hi", stream=False, colour="red")).status == 200


# Who may


@pytest.mark.parametrize("key", [None, "", "wrong-key-0123456789"])
async def test_a_missing_and_a_wrong_key_are_answered_alike(
    served: Served, key: str | None
) -> None:
    bot = await served.add_bot()
    answer = await served.post("/api/chat/session", {"assistant_id": bot.id, "api_key": key})
    assert_problem(answer, 401, "invalid_api_key")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_what_belongs_to_others_is_answered_as_what_does_not_exist(served: Served) -> None:
    mine = await served.add_bot()
    theirs = await served.add_bot(key="their-key-0123456789ab")
    their_session = await served.session(theirs, key="their-key-0123456789ab")
    id = {"X-Request-Id": "same"}

    async def session(assistant_id: str) -> bytes:
        body = {"api_key": KEY, "assistant_id": assistant_id}
        return (await served.post("/api/chat/session", body, headers=id)).body

    async def chat(session_id: str) -> bytes:
        body = {"api_key": KEY, "assistant_id": mine.id, "session_id": session_id}
        body |= {"type": "t", "messages": [{"role": "user", "content": "hi"}]}
        return (await served.post("/api/chat", body, headers=id)).body

    async def widget(session_id: str) -> bytes:
        body = {"session_id": session_id, "message": "hi"}
        return (await served.post("/api/chat/widget", body, headers=id)).body

    assert await session(theirs.id) == await session(new_id())
    assert await chat(their_session) == await chat(new_id())
    assert await widget(their_session) == await widget(new_id())
    assert json.loads(await chat(their_session))["code"] == "not_found"


async def test_an_api_session_is_not_opened_by_its_id_alone(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.post("/api/chat/widget", {"session_id": session, "message": "hi"})
    assert_problem(answer, 404, "not_found")
    assert await served.transcript(bot, session) == []


async def test_an_unknown_chatbot_has_no_widget(served: Served) -> None:
    answer = await served.post("/api/chat/widget/session", {"chatbot_id": new_id()})
    assert_problem(answer, 404, "not_found")


# What is malformed


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"a": [{"b": 1, "b": 1}]}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"a": "\\u0000"}',
        b'{"\\u0000": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        '{"a": 1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        b"[" * 30000 + b"]" * 30000,
        b'{"a": ' * 33 + b"1" + b"}" * 33,
        b'{"a": 1} {"b": 2}',
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_bytes_that_are_not_one_clear_json_document_are_malformed(
    served: Served, body: bytes
) -> None:
    answer = await served.post("/api/chat", body)
    assert_problem(answer, 400, "malformed_request")


async def test_a_backslash_before_u0000_is_text(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session, r"\u0000 is NUL")
    assert answer.json["response"] == r"You said: \u0000 is NUL"


async def test_every_fault_of_a_body_is_named_with_its_place(served: Served) -> None:
    body = {
        "assistant_id": "x",
        "session_id": 7,
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "system", "content": "obey"},
            {"role": "user"},
        ],
    }
    problem = assert_problem(await served.post("/api/chat", body), 422, "invalid_request")
    found = {error["pointer"]: error["message"] for error in problem["errors"]}
    assert set(found) == {
        "/assistant_id",
        "/session_id",
        "/type",
        "/messages/1/role",
        "/messages/2/content",
    }
    assert found["/type"] == "is required"
    assert "chatd bots set --system-prompt" in found["/messages/1/role"]


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function", ""])
async def test_a_client_cannot_speak_in_another_role(served: Served, role: str) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    messages = [{"role": "user", "content": "hi"}, {"role": role, "content": "x"}]
    answer = await served.chat(bot, session, messages=messages)
    assert_problem(answer, 422, "invalid_request")
    assert await served.transcript(bot, session) == []


async def test_a_list_without_a_new_message_is_not_valid(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    answer = await served.chat(bot, session, messages=messages)
    problem = assert_problem(answer, 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == "/messages/1/role"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", []),
        ("/api/chat", "text"),
        ("/api/chat", None),
        ("/api/chat/session", {}),
        ("/api/chat/widget/session", {"chatbot_id": None}),
        ("/api/chat/widget", {"session_id": new_id(), "message": ""}),
        ("/api/chat/widget", {"session_id": new_id(), "message": ["a"]}),
        ("/api/chat/widget", {"session_id": new_id(), "message": "a", "stream": "yes"}),
    ],
)
async def test_json_that_does_not_fit_its_schema_is_not_valid(
    served: Served, path: str, body: Any
) -> None:
    answer = await served.post(path, json.dumps(body).encode())
    assert_problem(answer, 422, "invalid_request")


# What HTTP says


async def test_an_unknown_path_is_a_problem_for_every_method(served: Served) -> None:
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]:
        assert_problem(await served.request(method, "/nothing/here"), 404, "not_found")


async def test_a_method_that_a_path_does_not_have_names_those_it_has(served: Served) -> None:
    for method in ["GET", "PUT", "PATCH", "DELETE"]:
        answer = await served.request(method, "/api/chat")
        assert_problem(answer, 405, "method_not_allowed")
        assert answer.headers["Allow"] == "POST, OPTIONS"
    answer = await served.post("/health")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


async def test_a_made_up_method_is_not_allowed(served: Served) -> None:
    assert_problem(await served.request("BREW", "/api/chat"), 405, "method_not_allowed")


async def test_head_is_get_without_a_body(served: Served) -> None:
    answer = await served.request("HEAD", "/health")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == "15"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/json; charset=utf-16"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=UTF-8"}, 422),
        ({"Content-Type": "application/vnd.api+json"}, 422),
        ({"Accept": "text/html"}, 406),
        ({"Accept": "application/json;q=0"}, 406),
        ({"Accept": "text/html, application/json;q=0.5"}, 422),
        ({"Accept": "*/*"}, 422),
    ],
)
async def test_media_types_are_minded(served: Served, headers: dict[str, str], status: int) -> None:
    code = {415: "unsupported_media_type", 406: "not_acceptable", 422: "invalid_request"}[status]
    assert_problem(await served.post("/api/chat", b"{}", headers=headers), status, code)


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("accept", "status"),
    [
        (None, 200),
        ("*/*", 200),
        (BROWSER, 200),
        ("application/*", 200),
        ("text/html, application/json;q=0.1", 200),
        ("text/html", 406),
        ("text/event-stream", 406),
        ("*/*, application/json;q=0", 406),
    ],
)
async def test_what_is_read_as_json_is_refused_to_who_does_not_take_json(
    served: Served, method: str, accept: str | None, status: int
) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    turn = (await served.chat(bot, session, "hi")).json["turn_id"]
    headers = {"Authorization": f"Bearer {KEY}"} | ({"Accept": accept} if accept else {})
    # aiohttp says */* unless it is told not to.
    skipped = [] if accept else ["Accept"]
    for path in (
        f"/api/chat/turns/{turn}",
        f"/api/chat/session/{session}/messages",
        "/v1/models",
        "/openapi.json",
        "/health",
        "/healthz",
        "/readyz",
    ):
        answer = await served.request(method, path, headers=headers, skip_auto_headers=skipped)
        assert answer.status == status, path
        if status == 406 and method == "GET" and path != "/v1/models":
            problem = assert_problem(answer, 406, "not_acceptable")
            assert "application/json" in problem["detail"]


async def test_a_page_is_not_json_and_errors_are_told_whatever_is_taken(served: Served) -> None:
    for accept in ("application/json", "text/html", "image/png"):
        assert (await served.get("/docs", headers={"Accept": accept})).status == 200
        answer = await served.get("/nothing/here", headers={"Accept": accept})
        assert_problem(answer, 404, "not_found")
    unknown = f"/api/chat/turns/{new_id()}"
    answer = await served.get(unknown, headers={"Accept": "text/html"})
    assert_problem(answer, 401, "invalid_api_key")


async def test_a_turn_is_not_stopped_by_who_cannot_read_what_came_of_it(serve: Serve) -> None:
    served = await serve(SLOW_CONFIG)
    bot = await served.add_bot()
    session = await served.session(bot)
    asked = asyncio.create_task(served.chat(bot, session, "hi"))
    storage = served.runtime.services.storage
    while (turn := await storage.running_turn(session, bot.id)) is None:
        await asyncio.sleep(0.01)
    headers = {"Authorization": f"Bearer {KEY}", "Accept": "text/event-stream"}
    path = f"/api/chat/turns/{turn.id}"
    assert_problem(await served.post(f"{path}/stop", headers=headers), 406, "not_acceptable")
    body = {"rating": "up"}
    rated = await served.post(f"{path}/feedback", body, headers=headers)
    assert_problem(rated, 406, "not_acceptable")
    assert (await asked).json["finish_reason"] == "stop"


async def test_a_body_over_the_limit_is_too_large(served: Served) -> None:
    limit = 64 * 1024
    body = b'{"a": "' + b"x" * (limit - 9) + b'"}'
    assert len(body) == limit
    assert_problem(await served.post("/api/chat", body), 422, "invalid_request")
    answer = await served.post("/api/chat", body + b" ")
    assert_problem(answer, 413, "body_too_large")
    assert "65536" in answer.json["detail"]


async def test_a_chunked_body_over_the_limit_is_too_large(served: Served) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1024

    answer = await served.request(
        "POST", "/api/chat", data=chunks(), headers={"Content-Type": "application/json"}
    )
    assert_problem(answer, 413, "body_too_large")


async def test_too_many_headers_are_refused(served: Served) -> None:
    many = {f"X-Header-{i}": "value" for i in range(5000)}
    assert_problem(await served.get("/health", headers=many), 431, "headers_too_large")
    same = [("A", "b")] * 5000
    assert_problem(await served.get("/health", headers=same), 431, "headers_too_large")
    answer = await served.get("/health", headers={"X-Long": "x" * 40_000})
    assert_problem(answer, 431, "headers_too_large")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc.DEF_1-2", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False)],
)
async def test_a_request_id_is_kept_when_it_is_a_plain_word(
    served: Served, given: str, kept: bool
) -> None:
    answer = await served.get("/health", headers={"X-Request-Id": given})
    assert (answer.headers["X-Request-Id"] == given) is kept
    assert answer.headers["X-Request-Id"]


# What fails


async def test_a_second_turn_while_one_runs_is_refused(serve: Serve) -> None:
    served = await serve(SLOW_CONFIG)
    bot = await served.add_bot()
    session = await served.session(bot)
    first = asyncio.create_task(served.chat(bot, session, "first"))
    await asyncio.sleep(0.2)
    problem = assert_problem(await served.chat(bot, session, "second"), 409, "turn_in_progress")
    answer = await first
    assert answer.json["turn_id"] == problem["turn_id"]
    assert [text for _, text in await served.transcript(bot, session)] == [
        "first",
        "You said: first",
    ]


async def test_a_client_that_goes_away_loses_nothing(serve: Serve) -> None:
    served = await serve(SLOW_CONFIG)
    bot = await served.add_bot()
    session = await served.session(bot)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(served.chat(bot, session, "hi"), 0.2)
    for _ in range(100):
        if len(transcript := await served.transcript(bot, session)) == 2:
            break
        await asyncio.sleep(0.05)
    assert transcript == [("user", "hi"), ("assistant", "You said: hi")]


async def test_a_provider_that_cannot_be_reached_is_a_502_and_does_not_poison_the_session(
    serve: Serve,
) -> None:
    served = await serve(
        ECHO_CONFIG.replace(
            "providers:",
            "providers:\n  dead: {use: openai_compatible, base_url: 'http://127.0.0.1:9'}",
        ).replace("models:", "models:\n  - {match: 'dead/*', ask: [dead]}")
    )
    bot = await served.add_bot(model="dead/model")
    session = await served.session(bot)
    answer = await served.chat(bot, session, "hi")
    assert_problem(answer, 502, "provider_failed")
    assert await served.transcript(bot, session) == [("user", "hi")]


async def test_a_chatbot_whose_model_nobody_answers_is_a_502(
    serve: Serve,
) -> None:
    served = await serve(ECHO_CONFIG.replace('match: "*"', 'match: "other/*"'))
    bot = await served.add_bot()
    assert_problem(await served.chat(bot, await served.session(bot), "hi"), 502, "provider_failed")


async def test_an_answer_that_takes_too_long_is_a_504_and_the_next_turn_works(
    serve: Serve,
) -> None:
    served = await serve(
        ECHO_CONFIG.replace("use: echo,", "use: echo, word_seconds: 5, timeouts: {plain: 0.2},")
    )
    bot = await served.add_bot()
    session = await served.session(bot)
    assert_problem(await served.chat(bot, session, "hi"), 504, "provider_timeout")
    assert_problem(await served.chat(bot, session, "again"), 504, "provider_timeout")
    assert await served.transcript(bot, session) == [("user", "hi"), ("user", "again")]


async def test_part_of_an_answer_is_shown_and_stored_and_said_to_be_one(
    serve: Serve,
) -> None:
    served = await serve(
        ECHO_CONFIG.replace("use: echo,", "use: echo, word_seconds: 0.2, timeouts: {plain: 0.3},")
    )
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session, "hi")
    assert (answer.status, answer.json["finish_reason"]) == (200, "interrupted")
    assert answer.json["response"] == "You"
    assert await served.transcript(bot, session) == [("user", "hi"), ("assistant", "You")]


async def test_a_server_that_shuts_down_takes_no_turns_and_is_not_ready(served: Served) -> None:
    bot = await served.add_bot()
    session = await served.session(bot)
    await served.runtime.services.turns.drain(0)
    answer = await served.chat(bot, session, "hi")
    assert_problem(answer, 503, "shutting_down")
    assert answer.headers["Retry-After"] == "1"
    assert_problem(await served.get("/readyz"), 503, "shutting_down")
    assert await served.transcript(bot, session) == []


# Health


async def test_health_says_what_the_first_version_said(served: Served) -> None:
    answer = await served.get("/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})
    assert (await served.get("/healthz")).json == {"status": "ok"}
    assert (await served.get("/readyz")).json == {"status": "ready"}


# CORS


async def test_a_preflight_from_an_allowed_origin_is_granted(served: Served) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    for path in ["/api/chat", "/api/chat/widget", "/api/chat/widget/session"]:
        answer = await served.request("OPTIONS", path, headers=headers)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert answer.headers["Access-Control-Max-Age"] == "600"
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        allowed = answer.headers["Access-Control-Allow-Headers"].lower()
        assert {"authorization", "content-type", "idempotency-key"} <= set(allowed.split(", "))
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://site.example",
        "https://site.example:8443",
        "https://sub.site.example",
        "https://site.example.evil.example",
        "https://SITE.example",
        "null",
    ],
)
async def test_any_other_origin_gets_no_cors_headers(served: Served, origin: str) -> None:
    bot = await served.add_bot()
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = await served.request("OPTIONS", "/api/chat/widget", headers=headers)
    assert not [name for name in answer.headers if name.startswith("Access-Control")]
    body = {"chatbot_id": bot.id}
    answer = await served.post("/api/chat/widget/session", body, headers={"Origin": origin})
    assert_problem(answer, 403, "origin_not_allowed")
    assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_chatbots_own_origins_replace_the_servers(served: Served) -> None:
    bot = await served.add_bot(allowed_origins=("https://own.example",))
    body = {"chatbot_id": bot.id}
    answer = await served.post(
        "/api/chat/widget/session", body, headers={"Origin": "https://own.example"}
    )
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://own.example"
    answer = await served.post("/api/chat/widget/session", body, headers={"Origin": ORIGIN})
    assert_problem(answer, 403, "origin_not_allowed")
    preflight = {"Origin": "https://own.example", "Access-Control-Request-Method": "POST"}
    answer = await served.request("OPTIONS", "/api/chat/widget", headers=preflight)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://own.example"


async def test_errors_can_be_read_by_allowed_pages_too(served: Served) -> None:
    headers = {"Origin": ORIGIN}
    for answer in [
        await served.get("/nothing", headers=headers),
        await served.get("/api/chat/widget", headers=headers),
        await served.post("/api/chat/widget", b"{", headers=headers),
        await served.post("/api/chat/widget", b" " * 70_000, headers=headers),
        await served.post("/api/chat/widget/session", {"chatbot_id": new_id()}, headers=headers),
    ]:
        assert answer.status >= 400
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]


async def test_a_star_allows_every_origin_but_null(serve: Serve) -> None:
    served = await serve(ECHO_CONFIG.replace('["https://site.example"]', '["*"]'))
    bot = await served.add_bot()
    body = {"chatbot_id": bot.id}
    headers = {"Origin": "https://any.example"}
    answer = await served.post("/api/chat/widget/session", body, headers=headers)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://any.example"
    answer = await served.post("/api/chat/widget/session", body, headers={"Origin": "null"})
    assert_problem(answer, 403, "origin_not_allowed")
