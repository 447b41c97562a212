"""Turns over HTTP that are streamed, left, found again, stopped and replayed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import apsw
import pytest

from chatd.domain import Chatbot, Session, TurnStatus, Usage, new_id
from chatd.storage import FinishTurn
from chatd.testing.fake_provider import SSE_HEAD, FakeProvider, Hold, Reset, http_response, sse
from chatd.testing.storage import a_turn
from tests.conftest import Serve
from tests.postgres import Supabase
from tests.support import ECHO_CONFIG, KEY, Served, chatd_command, open_served, server_process
from tests.test_http import assert_problem

SLOW_CONFIG = """
storage: %(storage)s
providers:
  main: {use: echo, reply: "one two three four five six seven eight {message}", word_seconds: 0.05}
models:
  - {match: "*", ask: [main]}
"""
SLOW_REPLY = "one two three four five six seven eight hi"

Events = list[tuple[int | None, Any]]


def parsed(text: str) -> Events:
    """The events of a stream: id and JSON, or the text of what is no JSON; comments are left out."""
    events: Events = []
    for block in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")
        )
        if data := fields.get("data"):
            number = int(fields["id"]) if "id" in fields else None
            events.append((number, data if data == "[DONE]" else json.loads(data)))
    return events


def types(events: Events) -> list[str]:
    return [e if isinstance(e, str) else e["type"] for _, e in events]


def said(events: Events) -> str:
    """The text of the deltas."""
    return "".join(e["delta"] for _, e in events if e != "[DONE]" and e["type"] == "text-delta")


async def read_some(answer: aiohttp.ClientResponse, deltas: int) -> Events:
    """A running stream's events up to its n-th delta."""
    text = ""
    async for chunk in answer.content.iter_any():
        text += chunk.decode()
        if text.count('"text-delta"') >= deltas and text.endswith("\n\n"):
            break
    return parsed(text)


class Talk:
    """A chatbot, a session with it, and the ways of a client to talk in it."""

    def __init__(self, served: Served, bot: Chatbot, session: str) -> None:
        self.served = served
        self.bot = bot
        self.session = session
        self.headers = {"X-API-Key": KEY}

    @classmethod
    async def open(cls, served: Served, **settings: Any) -> Talk:
        bot = await served.add_bot(**settings)
        return cls(served, bot, await served.session(bot))

    def say(self, text: str = "hi", *, stream: bool = True, key: str | None = None) -> Any:
        """Posts a message; use it with `async with`."""
        body = {
            "assistant_id": self.bot.id,
            "session_id": self.session,
            "type": "message",
            "messages": [{"role": "user", "content": text}],
            "stream": stream,
        }
        headers = self.headers | ({"Idempotency-Key": key} if key else {})
        return self.served.http.post(self.served.url + "/api/chat", json=body, headers=headers)

    async def events(self, turn_id: str, after: int = 0) -> Events:
        headers = self.headers | {"Last-Event-ID": str(after)}
        answer = await self.served.get(f"/api/chat/turns/{turn_id}/events", headers=headers)
        assert answer.status == 200, answer.body
        return parsed(answer.body.decode())

    async def turn(self, turn_id: str) -> Any:
        return (await self.served.get(f"/api/chat/turns/{turn_id}", headers=self.headers)).json

    async def ended(self, turn_id: str) -> Any:
        """The turn once it does not run any more."""
        async with asyncio.timeout(20):
            while (turn := await self.turn(turn_id))["status"] == "running":
                await asyncio.sleep(0.05)
        return turn


@pytest.fixture(params=["sqlite", "supabase", "postgres"])
def storage_config(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"{{use: sqlite, path: {tmp_path / 'chatd.db'}}}"
    database: Supabase = request.getfixturevalue("database")
    database.empty()
    return database.configured(request.param)


# Streaming


async def test_an_answer_is_streamed_in_the_ui_message_protocol(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say() as answer:
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-vercel-ai-ui-message-stream"] == "v1"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Accel-Buffering"] == "no"
        events = parsed(await answer.text())
    assert types(events)[:2] == ["start", "text-start"]
    assert types(events)[-3:] == ["text-end", "finish", "[DONE]"]
    assert said(events) == "You said: hi"
    ids = [number for number, _ in events[:-1]]
    assert ids == sorted(set(ids), key=lambda n: n or 0)
    start, finish = events[0][1]["messageMetadata"], events[-2][1]["messageMetadata"]
    assert start == {"turn_id": finish["turn_id"], "session_id": talk.session}
    assert finish["model"] == "echo"
    assert finish["usage"]["cost_usd"] == 0
    assert (finish["finish_reason"], finish["stored"]) == ("stop", True)


async def test_a_widgets_stream_tells_neither_model_nor_cost(serve: Serve) -> None:
    served = await serve(ECHO_CONFIG)
    bot = await served.add_bot()
    session = (await served.post("/api/chat/widget/session", {"chatbot_id": bot.id})).json
    body = {"session_id": session["session_id"], "message": "hi"}
    headers = {"Accept": "text/event-stream"}
    answer = await served.post("/api/chat/widget", body, headers=headers)
    events = parsed(answer.body.decode())
    assert said(events) == "You said: hi"
    assert not {"model", "usage"} & events[-2][1]["messageMetadata"].keys()


async def test_a_failure_in_a_stream_has_the_code_of_a_plain_answer(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG.replace('match: "*"', "match: other")))
    async with talk.say() as answer:
        assert answer.status == 200
        events = parsed(await answer.text())
    assert types(events) == ["start", "error", "[DONE]"]
    assert events[1][1]["code"] == "provider_failed"
    async with talk.say(stream=False) as plain:
        assert (await plain.json())["code"] == "provider_failed"


# Left and found again


async def test_a_turn_goes_on_when_its_reader_leaves_and_can_be_read_to_its_end(
    serve: Serve,
) -> None:
    talk = await Talk.open(await serve(SLOW_CONFIG))
    async with talk.say() as answer:
        seen = await read_some(answer, 3)
    turn_id = seen[0][1]["messageMetadata"]["turn_id"]
    last = seen[-1][0]
    assert last is not None
    rest = await talk.events(turn_id, last)
    assert said(seen) + said(rest) == SLOW_REPLY
    assert types(rest)[-3:] == ["text-end", "finish", "[DONE]"]
    ids = [number for number, _ in [*seen, *rest] if number is not None]
    assert ids == sorted(set(ids))
    assert (await talk.turn(turn_id))["response"] == SLOW_REPLY


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        (None, 200),
        ("*/*", 200),
        ("text/event-stream", 200),
        ("text/*;q=0.1, application/json", 200),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", 200),
        ("application/json", 406),
        ("text/html", 406),
        ("*/*, text/event-stream;q=0", 406),
    ],
)
async def test_events_are_refused_to_who_does_not_take_them(
    serve: Serve, accept: str | None, status: int
) -> None:
    talk = await Talk.open(await serve(SLOW_CONFIG))
    headers = talk.headers | ({"Accept": accept} if accept else {})
    skipped = [] if accept else ["Accept"]
    running = f"/api/chat/session/{talk.session}/stream"
    # There is nothing to take when no turn runs.
    answer = await talk.served.get(running, headers=headers, skip_auto_headers=skipped)
    assert answer.status == 204
    async with talk.say() as streamed:
        turn_id = (await read_some(streamed, 1))[0][1]["messageId"]
        for path in (running, f"/api/chat/turns/{turn_id}/events"):
            answer = await talk.served.get(path, headers=headers, skip_auto_headers=skipped)
            if status == 406:
                problem = assert_problem(answer, 406, "not_acceptable")
                assert "text/event-stream" in problem["detail"]
            else:
                assert said(parsed(answer.body.decode())) == SLOW_REPLY


@pytest.mark.parametrize("running", [True, False])
async def test_head_of_events_has_the_headers_of_their_get_and_no_length(
    serve: Serve, running: bool
) -> None:
    talk = await Talk.open(await serve(SLOW_CONFIG))
    async with talk.say() as streamed:
        turn_id = (await read_some(streamed, 1))[0][1]["messageId"]
        if not running:
            await streamed.read()
        paths = [f"/api/chat/turns/{turn_id}/events"]
        paths += [f"/api/chat/session/{talk.session}/stream"] if running else []
        for path in paths:
            async with asyncio.timeout(20):
                head = await talk.served.request("HEAD", path, headers=talk.headers)
            async with talk.served.http.get(talk.served.url + path, headers=talk.headers) as get:
                pass
            assert (head.status, head.body) == (200, b"")
            assert "Content-Length" not in head.headers
            told = [
                {
                    name.lower(): value
                    for name, value in answer.headers.items()
                    if name.lower() not in ("x-request-id", "date", "transfer-encoding")
                }
                for answer in (head, get)
            ]
            assert told[0] == told[1]


async def test_a_connection_serves_on_after_head_of_events(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say(stream=False) as answer:
        turn_id = (await answer.json())["turn_id"]
    host, port = talk.served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"HEAD /api/chat/turns/{turn_id}/events HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n\r\n"
    last = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    writer.write((head + last).encode())
    async with asyncio.timeout(20):
        got = (await reader.read()).decode()
    writer.close()
    first, second, rest = got.split("\r\n\r\n")
    assert first.startswith("HTTP/1.1 200 ")
    assert second.startswith("HTTP/1.1 200 ")
    assert json.loads(rest) == {"status": "ok"}


async def test_a_session_tells_which_turn_runs_now(serve: Serve) -> None:
    talk = await Talk.open(await serve(SLOW_CONFIG))
    path = f"/api/chat/session/{talk.session}/stream"
    assert (await talk.served.get(path, headers=talk.headers)).status == 204
    async with talk.say() as answer:
        await read_some(answer, 2)
        again = await talk.served.get(path, headers=talk.headers)
    assert said(parsed(again.body.decode())) == SLOW_REPLY
    assert (await talk.served.get(path, headers=talk.headers)).status == 204


async def test_from_every_event_on_the_rest_is_the_same(serve: Serve) -> None:
    talk = await Talk.open(await serve(SLOW_CONFIG))
    async with talk.say() as answer:
        events = parsed(await answer.text())
    turn_id = events[0][1]["messageMetadata"]["turn_id"]
    for place, (number, _) in enumerate(events[:-1], start=1):
        assert number is not None
        rest = await talk.events(turn_id, number)
        assert said(events[:place]) + said(rest) == SLOW_REPLY
        assert types(rest)[-1] == "[DONE]"
        assert all(n is None or n > number for n, _ in rest)


@pytest.mark.parametrize("bad", ["x", "-1", "1.5", "9" * 17, "٣"])
async def test_a_last_event_id_that_is_none_is_refused(served: Served, bad: str) -> None:
    talk = await Talk.open(served)
    headers = talk.headers | {"Last-Event-ID": bad.encode().decode("latin-1")}
    answer = await served.get(f"/api/chat/turns/{new_id()}/events", headers=headers)
    assert_problem(answer, 400, "malformed_request")


async def test_a_turn_is_read_on_after_the_server_was_started_again(
    serve: Serve, tmp_path: Path
) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say() as answer:
        events = parsed(await answer.text())
    turn_id = events[0][1]["messageMetadata"]["turn_id"]
    async with AsyncExitStack() as stack:
        again = Talk(await open_served(tmp_path / "chatd.yaml", stack), talk.bot, talk.session)
        assert (await again.events(turn_id))[:2] == events[:2]
        rest = await again.events(turn_id, 4 * 5)
        assert said(rest) == "You said: hi"[5:]
        assert rest[-2] == events[-2]


async def test_another_process_gives_the_rest_once_it_is_stored_and_can_stop_the_turn(
    serve: Serve, tmp_path: Path
) -> None:
    slow = SLOW_CONFIG.replace("0.05", "0.2") + "server: {lease_seconds: 0.6}\n"
    talk = await Talk.open(await serve(slow))
    async with AsyncExitStack() as stack:
        other = Talk(await open_served(tmp_path / "chatd.yaml", stack), talk.bot, talk.session)
        async with talk.say(key="k") as answer:
            seen = await read_some(answer, 2)
            turn_id = seen[0][1]["messageMetadata"]["turn_id"]
            last = seen[-1][0]
            assert last is not None
            following = asyncio.create_task(other.events(turn_id, last))
            await asyncio.sleep(0.3)
            assert_problem(
                await other.served.chat(talk.bot, talk.session, "x"), 409, "turn_in_progress"
            )
            path = f"/api/chat/turns/{turn_id}/stop"
            stopped = await other.served.post(path, headers=talk.headers)
            assert stopped.json["status"] == "running"
            rest = await following
            assert types(rest)[-2:] == ["abort", "[DONE]"]
            here = parsed(await answer.text())
            assert types(here)[-2:] == ["abort", "[DONE]"]
            assert said(rest) == said(here)
        turn = await other.turn(turn_id)
        assert turn["status"] == "stopped"
        assert turn["response"] == said(seen) + said(here)


async def test_erasing_a_session_through_another_process_ends_its_turn(
    serve: Serve, tmp_path: Path
) -> None:
    slow = SLOW_CONFIG.replace("0.05", "0.5") + "server: {lease_seconds: 0.6}\n"
    talk = await Talk.open(await serve(slow))
    async with AsyncExitStack() as stack:
        other = await open_served(tmp_path / "chatd.yaml", stack)
        async with talk.say() as answer:
            await read_some(answer, 1)
            path = f"/api/chat/session/{talk.session}"
            erased = await other.request("DELETE", path, headers=talk.headers)
            assert erased.status == 204
            rest = parsed(await answer.text())
        assert types(rest)[-2:] == ["abort", "[DONE]"]
        assert "eight" not in said(rest)


@pytest.mark.parametrize("bad", [3, 7, 4 * 12 + 2, 4 * 5 + 1, 4 * 13, 4 * 100 + 3])
async def test_an_id_that_no_event_has_is_taken_for_none(serve: Serve, bad: int) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say() as answer:
        events = parsed(await answer.text())
    assert said(events) == "You said: hi"
    turn_id = events[0][1]["messageMetadata"]["turn_id"]
    assert await talk.events(turn_id, bad) == events


@pytest.mark.parametrize("bad", [3, 4 * 1 + 1, 4 * 2 + 3, 4 * 1000, 4 * 1000 + 1])
async def test_an_id_that_no_event_has_yet_is_taken_for_none_while_the_turn_runs(
    serve: Serve, bad: int
) -> None:
    talk = await Talk.open(await serve(SLOW_CONFIG))
    async with talk.say() as answer:
        seen = await read_some(answer, 2)
        turn_id = seen[0][1]["messageMetadata"]["turn_id"]
        rest = await talk.events(turn_id, bad)
    assert types(rest)[0] == "start" and types(rest)[-2:] == ["finish", "[DONE]"]
    assert said(rest) == said(await talk.events(turn_id, 0))


async def test_a_client_of_http_1_0_sees_the_end_of_a_stream(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say(stream=False) as answer:
        turn_id = (await answer.json())["turn_id"]
    host, port = talk.served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"GET /api/chat/turns/{turn_id}/events HTTP/1.0\r\nConnection: keep-alive\r\n"
    writer.write(f"{head}X-API-Key: {KEY}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        assert (await reader.read()).endswith(b"data: [DONE]\n\n")
    writer.close()


# Stopping


UPSTREAM_CONFIG = """
storage: %(storage)s
providers:
  main: {use: openai_compatible, base_url: "%(upstream)s"}
models:
  - {match: "*", ask: [main]}
"""


def delta(text: str) -> bytes:
    """A chunk of a provider's answer."""
    return sse({"model": "m", "choices": [{"index": 0, "delta": {"content": text}}]})


DONE = sse(
    {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, "[DONE]"
)


def whole(text: str) -> dict[str, Any]:
    """A provider's answer in one piece."""
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return {"model": "m", "choices": [choice]}


async def with_upstream(serve: Serve, fake: FakeProvider, **settings: Any) -> Talk:
    return await Talk.open(
        await serve(UPSTREAM_CONFIG.replace("%(upstream)s", fake.url)), **settings
    )


async def test_stop_ends_the_upstream_request_and_keeps_what_was_said(serve: Serve) -> None:
    async with FakeProvider() as fake:
        talk = await with_upstream(serve, fake)
        fake.answer(SSE_HEAD, delta("Half of"), Hold())
        async with talk.say() as answer:
            seen = await read_some(answer, 1)
            turn_id = seen[0][1]["messageMetadata"]["turn_id"]
            path = f"/api/chat/turns/{turn_id}/stop"
            stopped = await talk.served.post(path, headers=talk.headers)
            await fake.requests[0].closed_within(1)
            rest = parsed(await answer.text())
        assert types(rest) == ["text-end", "abort", "[DONE]"]
        expected = {"turn_id": turn_id, "status": "stopped", "response": "Half of", "stored": True}
        assert stopped.json == expected
        again = await talk.served.post(path, headers=talk.headers)
        assert again.json == expected
        assert (await talk.turn(turn_id))["finish_reason"] == "stopped"
        transcript = await talk.served.transcript(talk.bot, talk.session)
        assert transcript == [("user", "hi"), ("assistant", "Half of")]
        fake.answer(SSE_HEAD, delta("Next."), DONE)
        async with talk.say("go on") as answer:
            assert said(parsed(await answer.text())) == "Next."
        asked = fake.requests[1].json["messages"]
        assert [m["content"] for m in asked] == ["hi", "Half of", "go on"]


async def test_a_turn_that_is_stopped_before_a_word_is_an_empty_answer(serve: Serve) -> None:
    async with FakeProvider() as fake:
        talk = await with_upstream(serve, fake)
        fake.answer(Hold())
        plain = asyncio.create_task(talk.served.chat(talk.bot, talk.session, "hi"))
        request = await fake.received()
        running = await talk.served.runtime.services.storage.running_turn(talk.session, talk.bot.id)
        assert running is not None
        await talk.served.post(f"/api/chat/turns/{running.id}/stop", headers=talk.headers)
        await request.closed_within(1)
        answer = await plain
        assert (answer.status, answer.json["response"]) == (200, "")
        assert answer.json["finish_reason"] == "stopped"


async def test_how_a_turn_ended_is_told_alike_by_its_answer_and_by_its_state(serve: Serve) -> None:
    async with FakeProvider() as fake:
        talk = await with_upstream(serve, fake)
        for steps, status, reason, code in (
            ((SSE_HEAD, delta("Some"), Reset()), "interrupted", "interrupted", "provider_failed"),
            ((SSE_HEAD, delta("Some"), DONE), "completed", "stop", None),
        ):
            fake.answer(*steps)
            async with talk.say() as answer:
                events = parsed(await answer.text())
            turn = await talk.turn(events[0][1]["messageId"])
            assert (turn["status"], turn["error"]) == (status, code)
            assert events[-2][1].get("code") == code
            assert turn["finish_reason"] == reason


async def test_a_turn_whose_process_was_lost_has_one_code_for_whoever_asks(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    storage = talk.served.runtime.services.storage
    lost = a_turn(Session(talk.session, talk.bot.id), "hi", lease_seconds=0.1)
    await storage.begin_turn(lost)
    turn = await talk.ended(lost.turn_id)
    assert (turn["status"], turn["response"], turn["finish_reason"]) == ("interrupted", None, None)
    record = await storage.get_turn(lost.turn_id, talk.bot.id)
    assert record is not None
    assert record.error_code == "process_lost"
    assert turn["error"] == "shutting_down"
    assert (await talk.events(lost.turn_id))[-2][1]["code"] == "shutting_down"


@pytest.mark.parametrize("stream", [True, False])
async def test_on_disconnect_stop_ends_a_turn_whose_last_reader_left(
    serve: Serve, stream: bool
) -> None:
    async with FakeProvider() as fake:
        talk = await with_upstream(serve, fake, on_disconnect="stop")
        fake.answer(SSE_HEAD, delta("Some words"), Hold())
        posted = asyncio.create_task(talk.say(stream=stream).__aenter__())
        request = await fake.received()
        await asyncio.sleep(0.3)
        if stream:
            (await posted).close()
        else:
            posted.cancel()
        await request.closed_within(2)
        storage = talk.served.runtime.services.storage
        async with asyncio.timeout(5):
            while await storage.running_turn(talk.session, talk.bot.id) is not None:
                await asyncio.sleep(0.05)
        transcript = await talk.served.transcript(talk.bot, talk.session)
        assert transcript[0] == ("user", "hi")
        if stream:
            assert transcript[1] == ("assistant", "Some words")


# Retrying safely


async def test_fifty_requests_with_one_key_are_one_turn_with_one_answer(serve: Serve) -> None:
    async with FakeProvider() as fake:
        talk = await with_upstream(serve, fake)
        fake.answer(http_response(200, whole("Once.")))

        async def ask() -> tuple[str | None, Any]:
            async with talk.say(stream=False, key="the-key") as answer:
                assert answer.status == 200, await answer.text()
                return answer.headers.get("Idempotency-Replayed"), await answer.json()

        answers = await asyncio.gather(*(ask() for _ in range(50)))
        assert all(answer == answers[0][1] for _, answer in answers)
        assert [replayed for replayed, _ in answers].count(None) == 1
        assert len(fake.requests) == 1
        assert await talk.served.transcript(talk.bot, talk.session) == [
            ("user", "hi"),
            ("assistant", "Once."),
        ]


async def test_a_key_still_replays_after_the_server_was_started_again(
    serve: Serve, tmp_path: Path
) -> None:
    async with FakeProvider() as fake:
        talk = await with_upstream(serve, fake)
        fake.answer(http_response(200, whole("Once.")))
        async with talk.say(stream=False, key="k") as answer:
            first = await answer.json()
        async with AsyncExitStack() as stack:
            again = Talk(await open_served(tmp_path / "chatd.yaml", stack), talk.bot, talk.session)
            async with again.say(stream=False, key="k") as answer:
                assert answer.headers["Idempotency-Replayed"] == "true"
                assert await answer.json() == first
            async with again.say(stream=True, key="k") as answer:
                assert said(parsed(await answer.text())) == "Once."
        assert len(fake.requests) == 1


async def test_a_key_with_another_body_is_refused(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say("one", stream=False, key="k") as answer:
        assert answer.status == 200
    async with talk.say("two", stream=False, key="k") as answer:
        assert (answer.status, (await answer.json())["code"]) == (422, "idempotency_key_reused")
    assert len(await talk.served.transcript(talk.bot, talk.session)) == 2


async def test_a_failure_that_reached_no_model_is_not_remembered(serve: Serve) -> None:
    async with FakeProvider() as fake:
        talk = await with_upstream(serve, fake)
        fake.answer(http_response(401, {"error": {"message": "bad key"}}))
        async with talk.say(stream=False, key="k") as answer:
            assert answer.status == 502
        fake.answer(http_response(200, whole("Now.")))
        async with talk.say(stream=False, key="k") as answer:
            assert (await answer.json())["response"] == "Now."
            assert "Idempotency-Replayed" not in answer.headers
        assert await talk.served.transcript(talk.bot, talk.session) == [
            ("user", "hi"),
            ("assistant", "Now."),
        ]


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
async def test_a_key_that_is_none_is_refused(served: Served, key: str) -> None:
    talk = await Talk.open(served)
    headers = talk.headers | {"Idempotency-Key": key}
    body = {"assistant_id": talk.bot.id, "session_id": talk.session, "type": "m"}
    body["messages"] = [{"role": "user", "content": "hi"}]  # type: ignore[assignment]
    assert_problem(await served.post("/api/chat", body, headers=headers), 422, "invalid_request")


# History


async def test_history_is_read_page_by_page(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    for i in range(5):
        async with talk.say(str(i), stream=False) as answer:
            assert answer.status == 200
    path, seen, query = f"/api/chat/session/{talk.session}/messages", [], "?limit=3"
    while True:
        page = (await talk.served.get(path + query, headers=talk.headers)).json
        seen = [m["content"] for m in page["data"]] + seen
        if not page["has_more"]:
            assert page["next_cursor"] is None
            break
        assert len(page["data"]) == 3
        query = f"?limit=3&before={page['next_cursor']}"
    assert seen == [text for i in range(5) for text in (str(i), f"You said: {i}")]
    for bad in ("limit=0", "limit=201", "limit=x", "before=-1", "before=9999999999999999999"):
        refused = await talk.served.get(f"{path}?{bad}", headers=talk.headers)
        assert_problem(refused, 422, "invalid_request")


async def test_feedback_is_kept_and_taken_back(serve: Serve) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say(stream=False) as answer:
        turn_id = (await answer.json())["turn_id"]
    path = f"/api/chat/turns/{turn_id}/feedback"
    body = {"rating": "up", "comment": "Good."}
    rated = await talk.served.post(path, body, headers=talk.headers)
    assert rated.json == {"turn_id": turn_id, **body}
    assert (await talk.turn(turn_id))["rating"] == "up"
    await talk.served.post(path, {"rating": None}, headers=talk.headers)
    assert (await talk.turn(turn_id))["rating"] is None
    assert (await talk.turn(turn_id))["comment"] is None
    for bad in ({"rating": "good"}, {}, {"rating": "up", "comment": "x" * 2001}):
        refused = await talk.served.post(path, bad, headers=talk.headers)
        assert_problem(refused, 422, "invalid_request")


async def test_a_turn_tells_its_side_and_its_attempts_and_nothing_that_a_provider_said(
    serve: Serve,
) -> None:
    talk = await Talk.open(await serve(ECHO_CONFIG))
    async with talk.say(stream=False) as answer:
        told = await talk.turn((await answer.json())["turn_id"])
    (attempt,) = told["attempts"]
    assert attempt.keys() == {"provider", "model", "error", "ms", "lost"}
    assert (attempt["error"], attempt["lost"]) == (None, False)
    assert told["side"] is None
    storage = talk.served.runtime.services.storage
    session = await storage.get_session(talk.session)
    assert session is not None
    turn = a_turn(session)
    await storage.begin_turn(turn)
    known = [{"provider": "p", "model": "m", "error": "overloaded", "ms": 7, "lost": True}]
    attempts = [{**known[0], "detail": "a provider's words", "tool_calls": [{"id": "call"}]}]
    usage = Usage(1, 2, 3, 4, 0.5)
    failed = FinishTurn(turn.turn_id, TurnStatus.FAILED, usage=usage, attempts=attempts)
    await storage.finish_turn(dataclasses.replace(failed, side="main/m"))
    told = await talk.turn(turn.turn_id)
    assert (told["attempts"], told["side"]) == (known, "main/m")
    assert told["usage"] == dataclasses.asdict(usage)


async def test_erasing_a_session_stops_its_turn_and_leaves_nothing(serve: Serve) -> None:
    talk = await Talk.open(await serve(SLOW_CONFIG))
    async with talk.say() as answer:
        seen = await read_some(answer, 2)
        path = f"/api/chat/session/{talk.session}"
        assert (await talk.served.request("DELETE", path, headers=talk.headers)).status == 204
        assert types(parsed(await answer.text()))[-2:] == ["abort", "[DONE]"]
    turn_id = seen[0][1]["messageMetadata"]["turn_id"]
    for gone in (f"/api/chat/turns/{turn_id}", f"{path}/messages", f"{path}/stream"):
        assert_problem(await talk.served.get(gone, headers=talk.headers), 404, "not_found")
    again = await talk.served.request("DELETE", path, headers=talk.headers)
    assert_problem(again, 404, "not_found")


# Who may


async def test_another_chatbots_turns_and_sessions_are_as_unknown_ones(serve: Serve) -> None:
    served = await serve(ECHO_CONFIG)
    talk = await Talk.open(served)
    async with talk.say(stream=False) as answer:
        turn_id = (await answer.json())["turn_id"]
    other = await served.add_bot(key="another-key-0123456789")
    own = await served.session(other, "another-key-0123456789")
    headers = {"Authorization": "Bearer another-key-0123456789", "X-Request-Id": "same"}
    paths = [
        ("GET", "/api/chat/turns/{turn}"),
        ("GET", "/api/chat/turns/{turn}/events"),
        ("POST", "/api/chat/turns/{turn}/stop"),
        ("POST", "/api/chat/turns/{turn}/feedback"),
        ("GET", "/api/chat/session/{session}/messages"),
        ("GET", "/api/chat/session/{session}/stream"),
        ("DELETE", "/api/chat/session/{session}"),
    ]
    for method, path in paths:
        body = {"json": {"rating": "up"}} if path.endswith("feedback") else {}
        theirs = path.format(turn=turn_id, session=talk.session)
        unknown = path.format(turn=new_id(), session=new_id())
        answers = [
            await served.request(method, p, headers=headers, **body) for p in (theirs, unknown)
        ]
        assert_problem(answers[0], 404, "not_found")
        assert answers[0].body == answers[1].body
        without = await served.request(method, theirs, **body)
        assert_problem(without, 401, "invalid_api_key")
    assert len(await served.transcript(talk.bot, talk.session)) == 2
    assert (await served.get(f"/api/chat/session/{own}/messages", headers=headers)).status == 200


async def test_a_widget_sees_its_own_session_alone(serve: Serve) -> None:
    served = await serve(ECHO_CONFIG)
    bot = await served.add_bot()
    ids, turns = [], []
    for _ in range(2):
        begun = await served.post("/api/chat/widget/session", {"chatbot_id": bot.id})
        ids.append(begun.json["session_id"])
        body = {"session_id": ids[-1], "message": "hi"}
        turns.append((await served.post("/api/chat/widget", body)).json["turn_id"])
    headers = {"Authorization": f"Bearer {ids[0]}", "Origin": "https://site.example"}
    page = await served.get("/api/chat/widget/messages", headers=headers)
    assert [m["content"] for m in page.json["data"]] == ["hi", "You said: hi"]
    assert page.headers["Access-Control-Allow-Origin"] == "https://site.example"
    own = await served.get(f"/api/chat/widget/turns/{turns[0]}", headers=headers)
    assert own.json["response"] == "You said: hi"
    assert not {"model", "usage", "side", "attempts"} & own.json.keys()
    for path in ("", "/events"):
        other = await served.get(f"/api/chat/widget/turns/{turns[1]}{path}", headers=headers)
        assert_problem(other, 404, "not_found")
    evil = {**headers, "Origin": "https://evil.example"}
    for method, path in [("GET", "messages"), ("DELETE", "session"), ("GET", "stream")]:
        refused = await served.request(method, f"/api/chat/widget/{path}", headers=evil)
        assert_problem(refused, 403, "origin_not_allowed")
    erased = await served.request("DELETE", "/api/chat/widget/session", headers=headers)
    assert erased.status == 204
    assert_problem(await served.get("/api/chat/widget/messages", headers=headers), 404, "not_found")
    other_headers = {"Authorization": f"Bearer {ids[1]}"}
    assert (await served.get("/api/chat/widget/messages", headers=other_headers)).status == 200


# The process


def test_sigterm_ends_streams_in_good_order(tmp_path: Path) -> None:
    config = SLOW_CONFIG.replace("%(storage)s", "{use: sqlite, path: chatd.db}")
    config = config.replace("0.05", "0.5") + "server: {drain_seconds: 1}\n"
    (tmp_path / "chatd.yaml").write_text(config)
    made = chatd_command("bots", "add", "--api-key", KEY, "--json", cwd=tmp_path)
    bot = json.loads(made.stdout)["id"]

    async def talk(url: str) -> str:
        async with aiohttp.ClientSession() as http:
            headers = {"X-API-Key": KEY}
            body: dict[str, Any] = {"assistant_id": bot}
            async with http.post(url + "/api/chat/session", json=body, headers=headers) as answer:
                session = (await answer.json())["session_id"]
            body |= {"session_id": session, "type": "m", "stream": True}
            body["messages"] = [{"role": "user", "content": "hi"}]
            async with http.post(url + "/api/chat", json=body, headers=headers) as answer:
                text = ""
                async for chunk in answer.content.iter_any():
                    text += chunk.decode()
                    if text.count("text-delta") == 1:
                        server.process.send_signal(signal.SIGTERM)
                return text

    with server_process(tmp_path) as server:
        loop = asyncio.new_event_loop()
        events = parsed(loop.run_until_complete(talk(server.url)))
        loop.close()
        assert server.stop() == 0
    assert types(events)[-3:] == ["text-end", "error", "[DONE]"]
    assert events[-2][1]["code"] == "shutting_down"
    assert said(events).startswith("one two")
    with apsw.Connection(str(tmp_path / "chatd.db")) as db:
        stored = db.execute(
            "SELECT t.status, c.content FROM turns t JOIN conversations c ON c.id = t.reply_id"
        ).fetchall()
    assert stored == [("interrupted", said(events))]
