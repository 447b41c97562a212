"""Answers that are recorded, and replayed where there is no model and no network."""

from __future__ import annotations

import asyncio
import fcntl
import json
import re
import shutil
import stat
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chatd_plugins import record as record_plugin
from chatd_plugins import replay as replay_plugin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tornado.ioloop import IOLoop

import chatd
from chatd.app import offers
from chatd.config import ConfigFile
from chatd.domain import Message, Usage
from chatd.offers import Register
from chatd.provider import (
    Event,
    Finish,
    GenerationId,
    Provider,
    ProviderRequest,
    ReasoningDelta,
    TextDelta,
    Timeouts,
    ToolCallDelta,
    UsageReport,
)
from chatd.registry import load_registry
from chatd.testing import (
    FakeProvider,
    HttpProviderConformance,
    ProviderCase,
    ProviderConformance,
)
from chatd.testing.fake_provider import SSE_HEAD, http_response, sse
from chatd.testing.provider import collect, failure, text_of
from chatd.validation import Schema
from tests import test_providers
from tests.conftest import Serve
from tests.support import KEY, Answer, Served, chatd_command, server_process
from tests.test_cli import wait_for
from tests.test_config import faults
from tests.test_providers import ANSWER, ANSWERED_BY, ASKED, QUESTION, Aimock, ask
from tests.test_streaming import parsed, said

CANARY = "sk-canary-0123456789abcdef"
aimock = test_providers.aimock
Kind = chatd.ProviderErrorKind


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


class Scripted:
    """A provider that yields and raises what it is given; a function is asked with the request."""

    takes = frozenset({"images"})

    def __init__(self, *steps: Any) -> None:
        self.steps = steps
        self.closed = False

    async def stream(self, request: ProviderRequest) -> AsyncGenerator[Event, None]:
        for step in self.steps:
            done = step(request) if callable(step) else step
            if asyncio.iscoroutine(done):
                await done
            elif isinstance(done, Exception):
                raise done
            else:
                yield done

    async def generation(self, id: str) -> Usage | None:
        return Usage(output_tokens=len(id))

    async def check(self) -> None:
        raise chatd.ProviderError(Kind.CREDIT, "checked")

    async def close(self) -> None:
        self.closed = True


def register(inner: Any = None) -> Register[Provider]:
    """All bundled providers, and `scripted`, which is `inner`."""
    bundled = dict(load_registry().providers)
    # It opens what it wraps through the register that it was handed.
    del bundled["record"]
    register = Register[Provider]("provider", "tests", bundled)
    record_plugin.chatd_register_provider(register)

    async def open_scripted(settings: Mapping[str, Any]) -> Provider:
        provider: Provider = inner
        return provider

    register.add("scripted", open_scripted, {"type": "object"}, "does as a test says")
    return register


async def recording(file: Path, use: str, **inner: Any) -> Provider:
    """`record` around another provider."""
    return await register().open("record", {"file": str(file), "of": {"use": use, **inner}})


async def replaying(file: Path, **settings: Any) -> Provider:
    return await register().open("replay", {"file": str(file), "speed": 0, **settings})


async def scripted(file: Path, *steps: Any, **settings: Any) -> Provider:
    """`record` around a provider that does as it is told."""
    inner = {"use": "scripted", **settings}
    return await register(Scripted(*steps)).open("record", {"file": str(file), "of": inner})


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def record_one(file: Path, *steps: Any, request: ProviderRequest | None = None) -> None:
    """Records one answer, whether it ends well or not."""
    provider = await scripted(file, *steps)
    with suppress(chatd.ProviderError):
        await collect(provider, request or ask())
    await provider.close()


# The contract


class TestRecord(ProviderConformance):
    @pytest.fixture
    def case(self, aimock: Aimock, file: Path) -> ProviderCase:
        url = f"{aimock.url}/v1"
        return ProviderCase(
            open=lambda: recording(file, "openai_compatible", base_url=url),
            model=ASKED,
            question=QUESTION,
            answer=ANSWER,
            answered_by=ANSWERED_BY,
            usage=Usage(11, 7),
        )


class TestRecordOverHttp(HttpProviderConformance):
    @pytest.fixture
    def open_at(self, file: Path) -> Callable[[str], Awaitable[Provider]]:
        return lambda url: recording(file, "openai_compatible", base_url=url, api_key=self.key)


class Recorded(ProviderConformance):
    """A replay of OpenRouter's answer to one request."""

    stream: bool

    @pytest.fixture
    def case(self, io_loop: IOLoop, aimock: Aimock, file: Path) -> ProviderCase:
        usage = Usage(11, 7, cached_tokens=3, reasoning_tokens=2, cost_usd=0.00042)
        case = ProviderCase(
            open=lambda: replaying(file, speed=1),
            model=ASKED,
            question=QUESTION,
            answer=ANSWER,
            answered_by=ANSWERED_BY,
            usage=usage,
        )
        url = f"{aimock.url}/api/v1"

        async def record() -> None:
            provider = await recording(file, "openrouter", base_url=url, api_key=CANARY)
            await collect(provider, case.request(stream=self.stream))
            await provider.close()

        io_loop.run_sync(record)
        return case


class TestReplayOfAStream(Recorded):
    stream = True


class TestReplayOfAPlainAnswer(Recorded):
    stream = False


# Served


CONFIG = """
storage: %(storage)s
providers:
  main: {PROVIDER}
models:
  - {match: "*", ask: [main]}
"""


async def talk(served: Served, said_first: str, stream: bool) -> Answer:
    if not served.bots:
        await served.add_bot(system_prompt="Be brief.")
    [bot] = served.bots
    session = await served.session(bot, user_id="ann@site.example")
    headers = {"Accept": "text/event-stream"} if stream else {}
    body = {"api_key": KEY, "assistant_id": bot.id, "session_id": session, "type": "message"}
    body |= {"messages": [{"role": "user", "content": said_first}]}
    return await served.post("/api/chat", body, headers=headers)


def shown(answer: Answer) -> Any:
    """What a client sees of an answer, but for ids."""
    assert answer.status == 200, answer.body
    if answer.headers["Content-Type"].startswith("application/json"):
        return {k: v for k, v in answer.json.items() if k != "turn_id"}
    events = parsed(answer.body.decode())
    finish = next(e for _, e in events if e != "[DONE]" and e["type"] == "finish")
    kept = ("usage", "model", "finish_reason", "history_truncated", "stored")
    return said(events), {k: v for k, v in finish["messageMetadata"].items() if k in kept}


@pytest.mark.parametrize("recorded_as_stream", [True, False])
async def test_what_was_recorded_is_served_again_when_the_model_is_gone(
    serve: Serve, storage_config: str, tmp_path: Path, file: Path, recorded_as_stream: bool
) -> None:
    chunk = {"choices": [{"delta": {"content": "Hel"}}]}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "cost": 0.25}
    end = {"model": "real/model", "usage": usage}
    end |= {"choices": [{"delta": {"content": "lo, é!"}, "finish_reason": "stop"}]}
    message = {"role": "assistant", "content": "Hello, é!"}
    whole = {**end, "choices": [{"message": message, "finish_reason": "stop"}]}
    async with FakeProvider() as fake:
        if recorded_as_stream:
            fake.always(SSE_HEAD, sse(chunk, end, "[DONE]"))
        else:
            fake.always(http_response(200, whole))
        inner = f"of: {{use: openrouter, api_key: {CANARY}, base_url: '{fake.url}'}}"
        first = await serve(CONFIG.replace("PROVIDER", f"use: record, file: '{file}', {inner}"))
        real = shown(await talk(first, "Where is my parcel?", recorded_as_stream))
        assert fake.requests[0].headers["authorization"] == f"Bearer {CANARY}"
        assert fake.requests[0].json["user"]
        pseudonyms = [fake.requests[0].json[name] for name in ("user", "session_id")]
    text = file.read_text()
    assert "Where is my parcel?" in text and "Be brief." in text
    assert not any(secret in text for secret in (CANARY, "ann@", *pseudonyms))
    # Another storage, other ids.
    again = CONFIG.replace("PROVIDER", f"use: replay, file: '{file}', speed: 0")
    second = await serve(again.replace("%(storage)s", storage_config.replace("chatd.db", "2.db")))
    for stream in (True, False):
        replayed = shown(await talk(second, "Where is my parcel?", stream))
        if stream == recorded_as_stream:
            assert replayed == real
        elif stream:
            assert replayed[0] == real["response"]
            assert replayed[1] == {k: real[k] for k in replayed[1]}
        else:
            assert replayed["response"] == real[0]
            assert real[1] == {k: replayed[k] for k in real[1]}
    unknown = await talk(second, "Something new", False)
    assert (unknown.status, unknown.json["code"]) == (502, "provider_failed")
    assert str(file) not in unknown.body.decode()


async def test_a_recorded_failure_is_the_same_failure_when_it_is_served_again(
    serve: Serve, storage_config: str, file: Path
) -> None:
    async with FakeProvider() as fake:
        fake.always(http_response(429, b"slow down", {"Retry-After": "7"}))
        inner = f"of: {{use: openai_compatible, base_url: '{fake.url}'}}"
        first = await serve(CONFIG.replace("PROVIDER", f"use: record, file: '{file}', {inner}"))
        real = await talk(first, "Hello", False)
    again = CONFIG.replace("PROVIDER", f"use: replay, file: '{file}', speed: 0")
    second = await serve(again.replace("%(storage)s", storage_config.replace("chatd.db", "2.db")))
    replayed = await talk(second, "Hello", False)
    assert real.status == replayed.status == 429
    assert real.headers["Retry-After"] == replayed.headers["Retry-After"] == "7"


# The file


async def test_a_line_holds_what_was_asked_and_each_event_with_its_time(
    io_loop: IOLoop, file: Path
) -> None:
    answer = [
        GenerationId("gen-1"),
        ReasoningDelta("Hm."),
        TextDelta("é\n"),
        ToolCallDelta(0, "call-1", "look", "{}"),
        UsageReport(Usage(3, 2)),
        Finish("tool_calls", "real/model"),
    ]
    parts = [{"type": "text", "text": "See:"}, {"type": "image_url", "image_url": {"url": "x:"}}]
    request = ProviderRequest(
        "test/model",
        [
            Message("user", "See:", parts=parts),
            Message("assistant", "", tool_calls=[{"id": "call-0", "type": "function"}]),
            Message("tool", "42", tool_call_id="call-0"),
        ],
        temperature=0,
        max_output_tokens=9,
        parameters={"seed": 1},
        user="pseudonym",
        session_id="session",
        options={"sort": "price"},
    )
    await record_one(file, *answer, request=request)
    [line] = lines_of(file)
    times = [event.pop("at") for event in line["events"]]
    assert times == sorted(times) and times[0] >= 0
    assert line.pop("recorded_at").endswith("+00:00")
    assert line == {
        "version": 1,
        "stream": True,
        "request": {
            "model": "test/model",
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "tool_calls": [{"id": "call-0", "type": "function"}]},
                {"role": "tool", "content": "42", "tool_call_id": "call-0"},
            ],
            "max_output_tokens": 9,
            "temperature": 0,
            "parameters": {"seed": 1},
        },
        "events": [
            {"generation_id": "gen-1"},
            {"reasoning": "Hm."},
            {"text": "é\n"},
            {"tool_call": {"index": 0, "id": "call-1", "name": "look", "arguments": "{}"}},
            {"usage": {"input_tokens": 3, "output_tokens": 2}},
            {"finish": "tool_calls", "model": "real/model"},
        ],
    }
    assert "é" in file.read_text()
    assert await collect(await replaying(file), request) == answer


texts = st.text(st.characters(exclude_categories=["Cs"]))
counts = st.none() | st.integers(0, 2**53 - 1)
events = st.lists(
    st.one_of(
        st.builds(TextDelta, texts.filter(bool)),
        st.builds(ReasoningDelta, texts),
        st.builds(GenerationId, texts),
        st.builds(ToolCallDelta, st.integers(0, 127), st.none() | texts, st.none() | texts, texts),
        st.builds(
            UsageReport,
            st.builds(Usage, counts, counts, counts, counts, st.none() | st.floats(0, 1e6)),
        ),
    ),
    max_size=8,
)


@given(events, st.sampled_from(["stop", "length", "other"]), st.none() | texts, texts)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_a_provider_says_is_replayed_event_for_event(
    io_loop: IOLoop,
    tmp_path_factory: pytest.TempPathFactory,
    said: list[Event],
    reason: chatd.FinishReason,
    model: str | None,
    question: str,
) -> None:
    file = tmp_path_factory.mktemp("given") / "answers.jsonl"
    request = ask(question)
    answer = [*said, Finish(reason, model)]

    async def go() -> list[Event]:
        provider = await scripted(file, *answer)
        assert await collect(provider, request) == answer
        await provider.close()
        return await collect(await replaying(file), request)

    assert io_loop.run_sync(go) == answer


async def test_half_a_character_is_recorded_as_it_came(io_loop: IOLoop, file: Path) -> None:
    answer = [TextDelta("\ud83d"), TextDelta("\ude00"), Finish("stop")]
    await record_one(file, *answer)
    assert await collect(await replaying(file), ask()) == answer


async def test_only_the_user_of_this_machine_may_read_the_file(
    io_loop: IOLoop, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await record_one(file, TextDelta("Hi"), Finish("stop"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert caplog.text == ""
    file.chmod(0o644)
    await record_one(file, TextDelta("Hi"), Finish("stop"))
    assert "chmod 600" in caplog.text
    assert len(lines_of(file)) == 2


async def test_no_key_is_in_the_file_whatever_the_provider_tells_in_its_error(
    io_loop: IOLoop, file: Path
) -> None:
    told = json.dumps({"error": {"message": f"the key {CANARY} is dead"}})
    async with FakeProvider() as fake:
        provider = await recording(
            file,
            "openai_compatible",
            base_url=fake.url,
            api_key=CANARY,
            headers={"X-Key": CANARY},
            parameters={"key": CANARY},
        )
        for status in (200, 401, 500):
            fake.answer(http_response(status, told, {"Content-Type": "application/json"}))
            await failure(provider, ask())
        fake.answer(SSE_HEAD, sse({"choices": [{"delta": {"content": "Hel"}}]}, f"bad {CANARY}"))
        await failure(provider, ask())
        await provider.close()
        assert CANARY in str(fake.requests[0])
    # One that keeps the contract badly.
    careless = chatd.ProviderError(Kind.AUTHENTICATION, f"the key {CANARY} is dead")
    await record_one(file, careless)
    with pytest.raises(RuntimeError):
        await record_one(file, RuntimeError(CANARY))
    assert len(lines_of(file)) == 6
    assert CANARY not in file.read_text()
    assert CANARY not in repr(provider)


async def test_recordings_of_two_providers_go_into_one_file_each_line_whole(
    io_loop: IOLoop, file: Path
) -> None:
    long = "x" * 100_000
    providers = [await scripted(file, TextDelta(long), Finish("stop")) for _ in range(2)]
    await asyncio.gather(*(collect(p, ask(str(i))) for i in range(20) for p in providers))
    for provider in providers:
        await provider.close()
    assert [line["events"][0]["text"] for line in lines_of(file)] == [long] * 40


async def test_a_line_that_a_killed_process_left_is_passed_over_and_then_cut_off(
    io_loop: IOLoop, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await record_one(file, TextDelta("One"), Finish("stop"))
    await record_one(file, TextDelta("Two"), Finish("stop"))
    whole = file.read_bytes()
    one = whole[: whole.index(b"\n") + 1]
    for size in (len(one) + 1, len(one) + 40, len(whole) - 2):
        file.write_bytes(whole[:size])
        caplog.clear()
        assert text_of(await collect(await replaying(file), ask())) == "One"
        assert f"{file}:2: the last line is not whole" in caplog.text
    await record_one(file, TextDelta("Three"), Finish("stop"))
    assert "was not whole and is cut off" in caplog.text
    assert file.read_bytes().startswith(one)
    assert [line["events"][0]["text"] for line in lines_of(file)] == ["One", "Three"]


async def test_a_last_line_without_an_end_is_taken_when_it_is_whole(
    io_loop: IOLoop, file: Path
) -> None:
    await record_one(file, TextDelta("One"), Finish("stop"))
    file.write_bytes(file.read_bytes().rstrip())
    assert text_of(await collect(await replaying(file), ask())) == "One"
    await record_one(file, TextDelta("Two"), Finish("stop"))
    assert [line["events"][0]["text"] for line in lines_of(file)] == ["One", "Two"]


@pytest.mark.parametrize("content", ["storage: {use: sqlite}\n", "x" * 1000, '{"a": 1}\n'])
async def test_a_file_that_holds_something_else_is_not_written_to(
    io_loop: IOLoop, file: Path, content: str
) -> None:
    file.write_text(content)
    with pytest.raises(chatd.PluginError, match="answers.jsonl holds no recordings: name another"):
        await scripted(file)
    assert file.read_text() == content


async def test_a_file_that_cannot_be_written_stops_the_start(
    io_loop: IOLoop, tmp_path: Path
) -> None:
    for path in (tmp_path / "no" / "answers.jsonl", tmp_path):
        with pytest.raises(chatd.PluginError, match="cannot be written: "):
            await scripted(path)


# Recording


async def test_a_file_that_can_no_longer_be_written_harms_no_answer(
    io_loop: IOLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "folder" / "answers.jsonl"
    file.parent.mkdir()
    provider = await scripted(file, TextDelta("Hi"), Finish("stop"))
    shutil.rmtree(file.parent)
    assert text_of(await collect(provider, ask())) == "Hi"
    await provider.close()
    assert f"an answer is not recorded in {file}: No such file or directory" in caplog.text
    assert QUESTION not in caplog.text


async def test_a_disk_that_hangs_harms_no_answer(
    io_loop: IOLoop,
    file: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_plugin, "MAX_WAITING_BYTES", 10)
    provider = await scripted(file, TextDelta("Hi"), Finish("stop"))
    with file.open() as held:
        # To the writer, a lock that another process keeps.
        fcntl.flock(held, fcntl.LOCK_EX)
        async with aclosing(provider.stream(ask())) as events:
            assert [await anext(events), await anext(events)] == [TextDelta("Hi"), Finish("stop")]
        assert text_of(await collect(provider, ask())) == "Hi"
        assert file.read_text() == ""
    await provider.close()
    [line] = lines_of(file)
    assert "error" not in line
    assert "an answer is not recorded: " in caplog.text and "written too slowly" in caplog.text


def test_an_answer_that_a_client_was_given_outlives_a_killed_server(tmp_path: Path) -> None:
    rest = "storage: {use: sqlite}\nmodels: [{match: '*', ask: [main]}]\n"
    inner = "of: {use: echo, reply: 'You said: {message}'}"
    (tmp_path / "chatd.yaml").write_text(
        f"providers: {{main: {{use: record, file: answers.jsonl, {inner}}}}}\n{rest}"
        "first_chatbot: {name: Bot, model: test/model}\n"
    )
    with server_process(tmp_path) as server:
        url = server.url
        wait_for(lambda: "curl" in server.stderr)
        bot, key = (
            re.search(rf"{word} +(\S+)", server.stderr)[1]  # type: ignore[index]
            for word in ("assistant_id", "api_key")
        )
        known = {"assistant_id": bot, "api_key": key}
        session = _post(f"{url}/api/chat/session", known)["session_id"]
        messages = [{"role": "user", "content": "Hello"}]
        said_now = {"session_id": session, "type": "message", "messages": messages}
        answer = _post(f"{url}/api/chat", {**known, **said_now})
        server.kill()
    assert answer["response"] == "You said: Hello"
    (tmp_path / "chatd.yaml").write_text(
        f"providers: {{main: {{use: replay, file: answers.jsonl}}}}\n{rest}"
    )
    said_again = chatd_command("chat", "Bot", cwd=tmp_path, stdin="Hello\n")
    assert said_again.stdout == "You said: Hello\n"
    assert key not in (tmp_path / "answers.jsonl").read_text()


def _post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


async def test_an_answer_over_the_cap_is_told_whole_and_not_recorded(
    io_loop: IOLoop, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [TextDelta("x" * 1024 * 1024)] * 9
    provider = await scripted(file, *parts, Finish("stop"))
    assert len(text_of(await collect(provider, ask()))) == 9 * 1024 * 1024
    await provider.close()
    assert "an answer is not recorded: it is larger than 8388608 bytes" in caplog.text
    assert file.read_text() == ""


async def test_a_request_over_the_cap_is_answered_and_not_recorded(
    io_loop: IOLoop, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider = await scripted(file, TextDelta("Hi"), Finish("stop"))
    assert text_of(await collect(provider, ask("x" * 17 * 1024 * 1024))) == "Hi"
    await provider.close()
    assert "with what was asked it is larger than 16777216 bytes" in caplog.text
    assert file.read_text() == ""


async def test_what_is_no_event_is_handed_on_and_not_recorded(
    io_loop: IOLoop, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer = [
        TextDelta("Hi"),
        "nonsense",
        UsageReport(Usage(cost_usd=float("nan"))),
        Finish("stop"),
    ]
    provider = await scripted(file, *answer)
    assert await collect(provider, ask()) == answer
    await provider.close()
    assert "an event cannot be written (TypeError)" in caplog.text
    assert file.read_text() == ""


@pytest.mark.parametrize(
    "error",
    [
        chatd.ProviderError(Kind.RATE_LIMIT, "x", status=429, retry_after=7),
        chatd.ProviderError(Kind.OVERLOADED, "x", status=503, retry_after=0.5, reached_model=True),
        chatd.ProviderError(Kind.CONNECTION, "x", retryable=False),
        chatd.ProviderError(Kind.CREDIT, "x", retryable=True),
    ],
)
@pytest.mark.parametrize("before", [[], [TextDelta("Hel")]])
async def test_a_failure_is_recorded_and_replayed_as_it_was(
    io_loop: IOLoop, file: Path, error: chatd.ProviderError, before: list[Event]
) -> None:
    await record_one(file, *before, error)
    provider = await replaying(file)
    got: list[Event] = []
    with pytest.raises(chatd.ProviderError) as raised:
        async for event in provider.stream(ask()):
            got.append(event)
    assert got == before
    for name in ("kind", "status", "retry_after", "retryable", "reached_model"):
        assert getattr(raised.value, name) == getattr(error, name), name
    assert f"{file}:1" in raised.value.detail


async def test_an_answer_that_just_stops_is_replayed_as_incomplete(
    io_loop: IOLoop, file: Path
) -> None:
    await record_one(file, TextDelta("Hel"))
    assert (await failure(await replaying(file), ask())).kind is Kind.INCOMPLETE


async def test_a_plugin_that_raises_what_none_should_is_replayed_as_what_it_counts_as(
    io_loop: IOLoop, file: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        await record_one(file, ZeroDivisionError("secret"))
    error = await failure(await replaying(file), ask())
    assert (error.kind, error.reached_model) == (Kind.PROTOCOL, True)


@pytest.mark.parametrize("cancel", [True, False])
async def test_an_answer_whose_reader_left_is_recorded_up_to_there(
    io_loop: IOLoop, file: Path, cancel: bool
) -> None:
    provider = await scripted(file, TextDelta("Hel"), lambda _: asyncio.sleep(3600))
    events = provider.stream(ask())
    assert await anext(events) == TextDelta("Hel")
    if cancel:
        reader = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        reader.cancel()
        await asyncio.wait([reader])
    await events.aclose()
    await provider.close()
    [line] = lines_of(file)
    assert line["events"][0]["text"] == "Hel"
    assert line["error"]["kind"] == "incomplete"
    assert (await failure(await replaying(file), ask())).kind is Kind.INCOMPLETE


async def test_leaving_after_the_end_leaves_the_recording_whole(
    io_loop: IOLoop, file: Path
) -> None:
    provider = await scripted(file, TextDelta("Hi"), Finish("stop"))
    async with aclosing(provider.stream(ask())) as events:
        async for event in events:
            if isinstance(event, Finish):
                break
    # The answer is in the file when its end is told.
    [line] = lines_of(file)
    await provider.close()
    assert "error" not in line
    assert lines_of(file) == [line]


async def test_what_a_provider_is_and_is_given_passes_through(io_loop: IOLoop, file: Path) -> None:
    seen: list[ProviderRequest] = []

    def answer(request: ProviderRequest) -> Event:
        seen.append(request)
        return TextDelta("Hi")

    inner = Scripted(answer, Finish("stop"))
    provider: Any = await register(inner).open(
        "record", {"file": str(file), "of": {"use": "scripted"}}
    )
    asked = replace(ask(), options={"sort": "price"}, timeouts=Timeouts(connect=1))
    await collect(provider, asked)
    assert seen[0] is asked
    assert provider.takes == {"images"}
    assert await provider.generation("gen") == Usage(output_tokens=3)
    with pytest.raises(chatd.ProviderError, match="checked"):
        await provider.check()
    await provider.close()
    assert inner.closed


async def test_what_a_provider_is_not_its_recording_is_not(io_loop: IOLoop, file: Path) -> None:
    provider = await recording(file, "echo")
    assert not hasattr(provider, "generation")
    assert chatd.provider.takes(provider) == frozenset()
    await provider.check()
    await provider.close()


async def test_a_recording_of_a_recording_is_one(io_loop: IOLoop, tmp_path: Path) -> None:
    files = [tmp_path / "inner.jsonl", tmp_path / "outer.jsonl"]
    inner = {"use": "record", "file": str(files[0]), "of": {"use": "echo", "reply": "Hi"}}
    provider = await register().open("record", {"file": str(files[1]), "of": inner})
    await collect(provider, ask())
    await provider.close()
    for file in files:
        assert text_of(await collect(await replaying(file), ask())) == "Hi"


# Replaying


async def test_the_recordings_of_one_request_are_played_in_turn(
    io_loop: IOLoop, file: Path
) -> None:
    await record_one(file, chatd.ProviderError(Kind.OVERLOADED, "x"))
    await record_one(file, TextDelta("other"), Finish("stop"), request=ask("Something else."))
    await record_one(file, TextDelta("One"), Finish("stop"))
    await record_one(file, TextDelta("Two"), Finish("stop"))
    provider = await replaying(file)
    for _ in range(2):
        assert (await failure(provider, ask())).kind is Kind.OVERLOADED
        assert text_of(await collect(provider, ask())) == "One"
        assert text_of(await collect(provider, ask("Something else."))) == "other"
        assert text_of(await collect(provider, ask())) == "Two"


def _changed(**more: Any) -> ProviderRequest:
    return replace(ask(), **more)


async def test_a_request_is_told_by_what_the_model_reads_and_not_by_who_asks(
    io_loop: IOLoop, file: Path
) -> None:
    await record_one(
        file,
        TextDelta("Hi"),
        Finish("stop"),
        request=_changed(user="one", temperature=1, parameters={"a": 1, "b": {"c": 2.0, "d": 3}}),
    )
    provider = await replaying(file)
    same = _changed(
        user="other",
        session_id="other",
        stream=False,
        timeouts=Timeouts(connect=1),
        options={"sort": "price"},
        temperature=1.0,
        parameters={"b": {"d": 3, "c": 2}, "a": 1},
    )
    assert text_of(await collect(provider, same)) == "Hi"
    for other in (
        {"model": "another/model"},
        {"messages": same.messages[1:]},
        {"messages": [*same.messages[:-1], Message("user", "Say hello")]},
        {"messages": [*same.messages[:-1], Message("system", QUESTION)]},
        {"temperature": 0.9},
        {"temperature": None},
        {"max_output_tokens": 99},
        {"parameters": {"a": 1}},
        {"parameters": {"a": True, "b": {"c": 2, "d": 3}}},
    ):
        error = await failure(provider, replace(same, **other))
        assert (error.kind, error.retryable) == (Kind.INVALID_REQUEST, False), other
        assert "record one, with `use: record`" in error.detail
        assert QUESTION not in error.detail


async def test_any_recording_answers_what_was_never_asked_if_the_operator_says_so(
    io_loop: IOLoop, file: Path
) -> None:
    for text in ("One", "Two"):
        await record_one(file, TextDelta(text), Finish("stop"), request=ask(text))
    provider = await replaying(file, otherwise="any")
    answers = [text_of(await collect(provider, ask(f"new {i}"))) for i in range(3)]
    assert answers == ["One", "Two", "One"]
    assert text_of(await collect(provider, ask("Two"))) == "Two"


async def test_an_answer_takes_its_time_divided_by_the_speed(io_loop: IOLoop, file: Path) -> None:
    await record_one(file, TextDelta("One"), TextDelta("Two"), Finish("stop"))
    [line] = lines_of(file)
    for event, at in zip(line["events"], (0, 100, 100), strict=True):
        event["at"] = at
    file.write_text(json.dumps(line))
    for speed in (0, 1000):
        assert text_of(await collect(await replaying(file, speed=speed), ask())) == "OneTwo"
    provider = await replaying(file, speed=2)
    async with aclosing(provider.stream(ask())) as events:
        assert await anext(events) == TextDelta("One")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.2)


async def test_a_recording_may_be_written_by_hand(io_loop: IOLoop, file: Path) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": None}
    events = [{"at": 0, "text": "Hello!"}, {"at": 0.1, "finish": "stop"}]
    line = {"version": 1, "request": request, "events": events}
    file.write_text("\n" + json.dumps(line) + "\r\n\n")
    asked = ProviderRequest("m", [Message("user", "Hi")])
    answer = await collect(await replaying(file), asked)
    assert answer == [TextDelta("Hello!"), Finish("stop")]


REQUEST = '"request": {"model": "m", "messages": []}'
GOOD = '{"version": 1, %s, "events": [{"at": 0, "finish": "stop"}]}\n' % REQUEST  # noqa: UP031


def with_events(events: str, more: str = "") -> str:
    return f'{{"version": 1, {REQUEST}, "events": [{events}]{more}}}\n'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no file FILE: record answers into it with `use: record`"),
        ("", "FILE holds no recording: record answers into it"),
        ("\n\n", "FILE holds no recording"),
        ('{"version": 1, "requ', "FILE holds no recording"),
        ("hello", "FILE:1: the line is not JSON"),
        (GOOD + "{torn}\n" + GOOD, "FILE:2: the line is not JSON"),
        (GOOD + "\xff\n", "FILE:2: the line is not JSON"),
        (GOOD + "[" * 100_000 + "\n", "FILE:2: the line is not JSON"),
        (
            GOOD.replace('"m"', '"m", "parameters": ' + '{"a": ' * 900 + "1" + "}" * 900),
            "FILE:1: the line is nested too deep",
        ),
        (GOOD + "[1]\n", "FILE:2: the line is not a JSON object"),
        (GOOD + '{"a": 1}\n', 'FILE:2: the line has no "version"'),
        (GOOD.replace("1", "true", 1), 'FILE:1: the line has no "version"'),
        (
            GOOD + GOOD.replace("1", "2", 1),
            "FILE:2: the line was written by a newer chatd (version 2 of the format",
        ),
        ('{"version": 1}\n', 'the line has no "events"'),
        (GOOD.replace('"m"', "1"), 'the line has no "model"'),
        (GOOD.replace("[]", "[1]"), "the line has a message that is not an object"),
        (GOOD.replace("[]", '[{"content": ""}]'), 'the line has no "role"'),
        (GOOD.replace("[]", '[{"role": "user", "content": 1}]'), "neither text nor a list"),
        (with_events(""), 'has neither a "finish" nor an "error" at its end'),
        (with_events('{"at": 0, "finish": "stop"}, {"at": 0, "text": "a"}'), "goes on after"),
        (with_events('{"at": 0, "finish": "stop"}', ', "error": {"at": 0, "kind": "empty"}'), "on"),
        (with_events("1"), "has an event 0 that is not an object"),
        (with_events('{"finish": "stop"}'), 'has an event 0 that has no "at"'),
        (with_events('{"at": -1, "finish": "stop"}'), 'has no "at"'),
        (with_events('{"at": NaN, "finish": "stop"}'), "is not JSON"),
        (with_events('{"at": 1e999, "finish": "stop"}'), 'has no "at"'),
        (with_events('{"at": true, "finish": "stop"}'), 'has no "at"'),
        (with_events('{"at": 0, "text": ""}'), "has an event 0 that is none that chatd knows"),
        (with_events('{"at": 0, "text": "a", "more": 1}'), "event 0 that is none"),
        (with_events('{"at": 0, "finish": ["stop"]}'), "event 0 that is none"),
        (with_events('{"at": 0, "finish": "stop", "model": 1}'), "event 0 that is none"),
        (with_events('{"at": 0, "usage": {"input_tokens": -1}}'), "event 0 that is none"),
        (with_events('{"at": 0, "usage": {"input_tokens": "1"}}'), "event 0 that is none"),
        (with_events('{"at": 0, "usage": {"dollars": 1}}'), "event 0 that is none"),
        (with_events('{"at": 0, "tool_call": {"name": "x"}}'), "event 0 that is none"),
        (with_events('{"at": 0, "tool_call": {"index": 0, "name": 1}}'), "event 0 that is none"),
        (with_events("", ', "error": {"at": 0, "kind": "gone"}'), 'has an "error" that is none'),
        (with_events("", ', "error": {"kind": "empty"}'), 'has an error that has no "at"'),
        (with_events("", ', "error": {"at": 0, "kind": "empty", "status": "1"}'), "that is none"),
        (with_events("", ', "error": {"at": 0, "kind": ["empty"]}'), 'an "error" that is none'),
        (" " * (16 * 1024 * 1024 + 1) + GOOD, "FILE:1: the line has more than 16777216 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
async def test_a_file_that_cannot_be_replayed_stops_the_start_with_its_line(
    io_loop: IOLoop, file: Path, content: str | None, told: str
) -> None:
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(chatd.PluginError) as raised:
        await replaying(file)
    assert str(raised.value).startswith("replay: ")
    assert told.replace("FILE", str(file)) in str(raised.value)


async def test_a_file_that_takes_too_long_to_read_is_refused(io_loop: IOLoop, file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(64 * 1024 * 1024 + 1)
    with pytest.raises(chatd.PluginError, match="has more than 67108864 bytes: split it"):
        await replaying(file)


async def test_a_file_of_too_many_recordings_is_refused(
    io_loop: IOLoop, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_plugin, "MAX_RECORDINGS", 2)
    file.write_text(GOOD * 3)
    with pytest.raises(chatd.PluginError, match=":3: there are more than 2 recordings: split"):
        await replaying(file)


async def test_a_file_that_was_changed_since_is_told_and_one_that_grew_is_fine(
    io_loop: IOLoop, file: Path
) -> None:
    await record_one(file, TextDelta("One"), Finish("stop"))
    provider = await replaying(file)
    await record_one(file, TextDelta("Two"), Finish("stop"))
    assert text_of(await collect(provider, ask())) == "One"
    await provider.check()
    file.write_text(GOOD)
    error = await failure(provider, ask())
    assert "is not what it was when chatd started: start chatd again" in error.detail
    file.unlink()
    with pytest.raises(chatd.ProviderError, match="start chatd again"):
        await provider.check()


def test_a_file_to_replay_is_looked_at_when_the_configuration_is_checked_online(
    tmp_path: Path,
) -> None:
    (tmp_path / "chatd.yaml").write_text(
        "storage: {use: sqlite}\nproviders: {main: {use: replay, file: answers.jsonl}}\n"
        "models: [{match: '*', ask: [main]}]\n"
    )
    checked = chatd_command("check", "--online", cwd=tmp_path)
    assert checked.returncode == 1
    assert checked.stderr == (
        "replay: there is no file answers.jsonl: record answers into it with `use: record`\n"
    )


# The provider inside


def nested(inner: str, more: str = "") -> str:
    return (
        "storage: {use: sqlite}\n"
        "providers:\n"
        "  main:\n"
        "    use: record\n"
        f"    file: answers.jsonl{more}\n"
        "    of:\n"
        f"{inner}"
        "models: [{match: '*', ask: [main]}]\n"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            nested("      use: openrouter\n"),
            ["c.yaml:6: providers.main.of.api_key is required"],
        ),
        (
            nested("      use: openruter\n      api_key: x\n"),
            [
                'c.yaml:7: providers.main.of.use: no plugin offers the provider "openruter", '
                'did you mean "openrouter"?'
            ],
        ),
        (
            nested("      use: echo\n      replly: x\n      word_seconds: -1\n"),
            [
                'c.yaml:8: providers.main.of.replly: unknown key, did you mean "reply"?',
                "c.yaml:9: providers.main.of.word_seconds: must be at least 0",
            ],
        ),
        (
            nested("      use: openrouter\n      api_key: '${NO_SUCH_KEY}'\n"),
            [
                "c.yaml:8: providers.main.of.api_key: the environment variable NO_SUCH_KEY is not "
                "set: set it, or write a default, ${NO_SUCH_KEY:-default}"
            ],
        ),
        (
            nested("      use: record\n      of: {use: echo, replly: x}\n"),
            [
                "c.yaml:6: providers.main.of.file is required",
                'c.yaml:8: providers.main.of.of.replly: unknown key, did you mean "reply"?',
            ],
        ),
        (nested("      file: x\n"), ["c.yaml:6: providers.main.of.use is required"]),
        (nested("      - echo\n"), ["c.yaml:6: providers.main.of: must be an object"]),
        (
            nested("      use: echo\n", "\n    off: 1"),
            ['c.yaml:6: providers.main.off: unknown key, did you mean "of"?'],
        ),
    ],
)
def test_the_settings_of_the_provider_inside_are_checked_with_their_line(
    text: str, told: list[str]
) -> None:
    assert faults(text) == told


def test_offers_of_any_kind_may_stand_inside_in_a_list_too() -> None:
    inside = {"of": {"items": {"x-use": "provider"}}, "in": {"x-use": "storage"}}
    known = offers(load_registry())
    known = {**known, "provider": {**known["provider"], "many": Schema({"properties": inside})}}
    text = (
        "storage: {use: sqlite}\n"
        "providers:\n"
        "  main:\n"
        "    use: many\n"
        "    in: {use: sqlit}\n"
        "    of:\n"
        "    - {use: echo}\n"
        "    - {use: echo, replly: x}\n"
        "models: [{match: '*', ask: [main]}]\n"
    )
    with pytest.raises(chatd.ConfigError) as raised:
        ConfigFile("c.yaml", text, {}).check(known)
    assert raised.value.faults == (
        'c.yaml:5: providers.main.in.use: no plugin offers the storage "sqlit", '
        'did you mean "sqlite"?',
        'c.yaml:8: providers.main.of[1].replly: unknown key, did you mean "reply"?',
    )


async def test_what_the_provider_inside_says_when_it_opens_is_told(
    io_loop: IOLoop, file: Path
) -> None:
    with pytest.raises(chatd.PluginError, match="openrouter: api_key is empty"):
        await recording(file, "openrouter", api_key="")


async def test_a_provider_that_is_opened_by_another_is_looked_for_and_checked(
    io_loop: IOLoop,
) -> None:
    with pytest.raises(chatd.PluginError, match='offers the provider "ecko", did you mean "echo"'):
        await register().open("ecko", {})
    with pytest.raises(chatd.PluginError, match='the provider "echo": word_seconds: must be at'):
        await register().open("echo", {"word_seconds": -1})
    with pytest.raises(chatd.PluginError, match='the provider "openrouter": api_key is required'):
        await register().open("openrouter", {})


async def test_a_provider_that_cannot_be_opened_is_named(io_loop: IOLoop) -> None:
    own = Register[Provider]("provider", "tests", {})

    async def open_itself(settings: Mapping[str, Any]) -> Provider:
        return await own.open("itself", settings)

    async def open_broken(settings: Mapping[str, Any]) -> Provider:
        raise ValueError("broken")

    own.add("itself", open_itself, {}, "")
    own.add("broken", open_broken, {}, "")
    with pytest.raises(chatd.PluginError, match='"broken" cannot be opened: ValueError: broken'):
        await own.open("broken", {})
    with pytest.raises(chatd.PluginError, match='"itself" cannot be opened: RecursionError'):
        await own.open("itself", {})
