"""The OpenAI dialect, with OpenAI's own client: what it reads, and what the provider is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from tornado.ioloop import IOLoop

from chatd.domain import Chatbot, Message, TurnStatus
from chatd.testing.fake_provider import SSE_HEAD, FakeProvider, Reset, http_response, sse
from tests.conftest import Serve
from tests.postgres import Supabase, jwt
from tests.support import KEY, Served

CONFIG = """
server: {allowed_origins: ["https://site.example"]}
storage: %(storage)s
providers:
  upstream: {use: openai_compatible, base_url: "UPSTREAM/v1"}
  echo: {use: echo, reply: "You said: {message}"}
models:
  - {match: "echo/*", ask: [echo]}
  - {match: "both/*", ask: [echo, upstream]}
  - {match: "*", ask: [upstream]}
"""
MODEL = "test/model"
PATH = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Hello!"}]
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
ZURICH = {"name": "weather", "arguments": '{"city": "Zürich"}'}
CALL = {"id": "call_1", "type": "function", "function": ZURICH}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def answer(text: str | None = "Hi there!", **message: Any) -> bytes:
    """An answer in one piece."""
    reason = "tool_calls" if "tool_calls" in message else "stop"
    said = {"role": "assistant", "content": text, **message}
    choices = [{"index": 0, "finish_reason": reason, "message": said}]
    return http_response(200, {"model": "answering/model", "choices": choices, "usage": USAGE})


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """A chunk of a stream."""
    return {"model": "answering/model", "choices": [{"delta": delta, "finish_reason": reason}]}


def streamed(*chunks: dict[str, Any], usage: Any = USAGE) -> tuple[bytes, bytes]:
    """A whole stream."""
    return SSE_HEAD, sse(*chunks, {"choices": [], "usage": usage}, "[DONE]")


@pytest.fixture
def upstream(io_loop: IOLoop) -> Iterator[FakeProvider]:
    fake = FakeProvider()
    io_loop.run_sync(fake.start)
    yield fake
    io_loop.run_sync(fake.stop)


@pytest.fixture
def server(io_loop: IOLoop, serve: Serve, upstream: FakeProvider) -> Served:
    async def start() -> Served:
        return await serve(CONFIG.replace("UPSTREAM", upstream.url))

    return io_loop.run_sync(start, timeout=30)


@pytest.fixture
def client(io_loop: IOLoop, server: Served) -> Iterator[AsyncOpenAI]:
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    yield client
    io_loop.run_sync(client.close)


async def only_session(server: Served, bot: Chatbot, answer_id: str) -> str:
    """The session of the turn that an answer is of."""
    turn = await server.runtime.services.storage.get_turn(
        answer_id.removeprefix("chatcmpl-"), bot.id
    )
    assert turn is not None
    assert turn.label == "openai"
    assert turn.status is TurnStatus.COMPLETED
    return turn.session_id


# Plain and streamed


async def test_a_plain_answer(server: Served, client: AsyncOpenAI, upstream: FakeProvider) -> None:
    bot = await server.add_bot(system_prompt="Be kind.", max_output_tokens=100, temperature=0.1)
    upstream.answer(answer())
    got = await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": [{"type": "text", "text": "Three"}]},
        ],
        temperature=0.7,
        max_tokens=4000,
        top_p=0.5,
        stop=["END"],
        seed=7,
        user="customer-17",
        metadata={"page": "front"},
        extra_body={"models": ["dearer/model"], "no_such": 1},
    )
    assert got.object == "chat.completion"
    assert got.model == "answering/model"
    assert got.choices[0].message.content == "Hi there!"
    assert got.choices[0].finish_reason == "stop"
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (
        7,
        2,
        9,
    )
    asked = upstream.requests[0].json
    assert asked.pop("user")
    assert asked == {
        "model": MODEL,
        "stream": False,
        "temperature": 0.7,
        "max_tokens": 100,
        "top_p": 0.5,
        "stop": ["END"],
        "seed": 7,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Three"},
        ],
    }
    session_id = await only_session(server, bot, got.id)
    assert await server.transcript(bot, session_id) == [
        ("user", "Three"),
        ("assistant", "Hi there!"),
    ]
    session = await server.runtime.services.storage.get_session(session_id)
    assert session is not None
    assert (session.channel, session.user_id) == ("api", "customer-17")
    assert session.metadata == {"page": "front"}


async def test_the_chatbot_s_settings_count_where_the_request_says_nothing(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot(max_output_tokens=100, temperature=0.1)
    upstream.always(answer())
    await client.chat.completions.create(model="default", messages=HELLO)
    await client.chat.completions.create(model="Bot", messages=HELLO, max_completion_tokens=50)
    first, second = (request.json for request in upstream.requests)
    assert (first["temperature"], first["max_tokens"]) == (0.1, 100)
    assert (second["temperature"], second["max_tokens"]) == (0.1, 50)


async def test_a_streamed_answer(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    bot = await server.add_bot()
    upstream.answer(*streamed(chunk(content="Hi "), chunk(content="there!"), chunk("stop")))
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    got = [part async for part in stream]
    assert got[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in got) == "Hi there!"
    assert [part.choices[0].finish_reason for part in got][-1] == "stop"
    assert {part.object for part in got} == {"chat.completion.chunk"}
    assert all(part.usage is None for part in got)
    assert len({part.id for part in got}) == 1
    session_id = await only_session(server, bot, got[0].id)
    assert await server.transcript(bot, session_id) == [
        ("user", "Hello!"),
        ("assistant", "Hi there!"),
    ]


async def test_a_stream_that_includes_usage_ends_with_it(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot()
    upstream.answer(*streamed(chunk(content="Hi"), chunk("length")))
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    got = [part async for part in stream]
    assert got[-1].choices == []
    assert got[-1].usage is not None
    assert got[-1].usage.total_tokens == 9
    assert got[-2].choices[0].finish_reason == "length"
    assert got[-2].usage is None


async def test_usage_that_nobody_counted_is_left_out(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot(model="echo/model")
    plain = await client.chat.completions.create(model="default", messages=HELLO)
    stream = await client.chat.completions.create(
        model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    got = [part async for part in stream]
    assert plain.usage is None
    assert plain.choices[0].message.content == "You said: Hello!"
    assert all(part.usage is None and part.choices for part in got)


async def test_a_stream_ends_with_done(server: Served, upstream: FakeProvider) -> None:
    await server.add_bot()
    upstream.answer(*streamed(chunk(content="Hi"), chunk("stop")))
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    got = await server.post(PATH, body, headers={"Authorization": f"Bearer {KEY}"})
    assert got.headers["Content-Type"].startswith("text/event-stream")
    assert got.body.endswith(b"data: [DONE]\n\n")


# Tools


async def test_a_tool_is_called_and_its_result_answered(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot()
    upstream.answer(answer(None, tool_calls=[CALL]))
    upstream.answer(answer("It rains."))
    messages: Any = [{"role": "user", "content": "Weather in Zürich?"}]
    got = await client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=TOOLS,
        tool_choice="auto",
        parallel_tool_calls=False,
    )
    assert got.choices[0].finish_reason == "tool_calls"
    assert got.choices[0].message.content is None
    calls = got.choices[0].message.tool_calls
    assert calls is not None
    assert [call.model_dump() for call in calls] == [CALL]
    messages += [
        got.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    last = await client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert last.choices[0].message.content == "It rains."
    first, second = (request.json for request in upstream.requests)
    assert (first["tools"], first["tool_choice"]) == (TOOLS, "auto")
    assert first["parallel_tool_calls"] is False
    assert second["messages"] == [
        {"role": "user", "content": "Weather in Zürich?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]


async def test_a_streamed_tool_call_adds_up(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot()
    long = json.dumps({"text": "x" * 20_000})

    def part(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        function = {"arguments": arguments, **({"name": "weather"} if more else {})}
        return chunk(tool_calls=[{"index": index, "function": function, **more}])

    upstream.answer(
        *streamed(
            chunk(content="Let me see."),
            part(0, "", id="call_1", type="function"),
            part(0, '{"city":'),
            part(0, ' "Zürich"}'),
            part(1, long, id="call_2", type="function"),
            chunk("tool_calls"),
        )
    )
    async with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS) as stream:
        got = await stream.get_final_completion()
    message = got.choices[0].message
    assert got.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me see."
    assert message.tool_calls is not None
    assert [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("call_1", "weather", ZURICH["arguments"]),
        ("call_2", "weather", long),
    ]


@pytest.mark.parametrize(
    ("told", "arguments"),
    [
        ({"function": {"name": "weather", "arguments": {"city": "Bern"}}}, '{"city": "Bern"}'),
        ({"index": "0", "id": 7, "function": {"name": "weather", "arguments": None}}, ""),
        ({"id": "", "function": {"name": "weather"}}, ""),
    ],
)
async def test_a_call_that_is_told_otherwise_is_read(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider, told: Any, arguments: str
) -> None:
    await server.add_bot()
    upstream.answer(answer(None, tool_calls=[told, "no call"]))
    got = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
    assert got.choices[0].message.tool_calls is not None
    (call,) = got.choices[0].message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.id.startswith("call_")
    assert (call.function.name, call.function.arguments) == ("weather", arguments)


async def test_a_call_with_an_index_that_is_none_fails_the_provider(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot()
    upstream.always(answer(None, tool_calls=[{**CALL, "index": 10**9}]))
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)


async def test_what_was_said_to_a_tool_is_in_no_log(
    server: Served,
    client: AsyncOpenAI,
    upstream: FakeProvider,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await server.add_bot()
    told = {"error": {"message": f"no tool for {ZURICH['arguments']} and {IMAGE['image_url']}"}}
    upstream.always(http_response(400, told))
    messages: Any = [
        {"role": "user", "content": [IMAGE]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model=MODEL, messages=messages)
    assert "no tool for" in caplog.text
    assert "Zürich" not in caplog.text
    assert "iVBORw0KGgo" not in caplog.text


async def test_a_tool_is_called_in_a_session_and_nothing_stands_twice(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    bot = await server.add_bot(system_prompt="Be kind.")
    session = await server.session(bot)
    for step in (
        answer("Hi!"),
        answer(None, tool_calls=[CALL]),
        answer("It rains."),
        answer("No."),
    ):
        upstream.answer(step)

    async def say(*messages: Any) -> None:
        await client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, metadata={"session_id": session}
        )

    asked = {"role": "user", "content": "Weather?"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "rain", "tool_call_id": "call_1"}
    await say(*HELLO)
    await say(asked)
    await say(*HELLO, {"role": "assistant", "content": "Hi!"}, asked, called, result)
    await say({"role": "user", "content": "Snow?"})
    system = {"role": "system", "content": "Be kind."}
    hi = {"role": "assistant", "content": "Hi!"}
    assert upstream.requests[2].json["messages"] == [system, *HELLO, hi, asked, called, result]
    assert [message["content"] for message in upstream.requests[3].json["messages"]] == [
        "Be kind.",
        "Hello!",
        "Hi!",
        "Weather?",
        "It rains.",
        "Snow?",
    ]
    assert await server.transcript(bot, session) == [
        ("user", "Hello!"),
        ("assistant", "Hi!"),
        ("user", "Weather?"),
        ("assistant", "It rains."),
        ("user", "Snow?"),
        ("assistant", "No."),
    ]


async def test_a_chatbot_that_forbids_tools_answers_422(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot(allow_tools=False)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)
    assert caught.value.param == "tools"
    assert caught.value.code == "invalid_request"
    assert upstream.requests == []


# Images


async def test_an_image_reaches_the_provider_and_is_stored_as_a_word(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    bot = await server.add_bot()
    upstream.always(answer("A cat."))
    whole: Any = [{"type": "text", "text": "What is this?"}, IMAGE]
    for content in (whole, [IMAGE]):
        got = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}]
        )
    assert upstream.requests[0].json["messages"] == [{"role": "user", "content": whole}]
    assert upstream.requests[1].json["messages"] == [{"role": "user", "content": [IMAGE]}]
    session_id = await only_session(server, bot, got.id)
    assert await server.transcript(bot, session_id) == [
        ("user", "[image]"),
        ("assistant", "A cat."),
    ]


async def test_text_that_a_plugin_changed_is_changed_beside_an_image_too() -> None:
    text = {"type": "text", "text": "My number is 4711."}
    message = Message("user", "My number is 4711.", [text, IMAGE])
    changed = replace(message, content="My number is [removed].")
    assert message.whole == [text, IMAGE]
    assert changed.whole == [{"type": "text", "text": "My number is [removed]."}, IMAGE]


async def test_a_chatbot_that_forbids_images_answers_422(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot(allow_images=False)
    image: Any = [{"role": "user", "content": [IMAGE]}]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.chat.completions.create(model=MODEL, messages=image)
    assert caught.value.param == "messages[0].content"
    assert upstream.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_takes_text_only_is_not_asked_for_more(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider, stream: bool
) -> None:
    bot = await server.add_bot(model="echo/model")
    with pytest.raises(openai.UnprocessableEntityError, match="takes tools"):
        await client.chat.completions.create(
            model="default", messages=HELLO, tools=TOOLS, stream=stream
        )
    image: Any = [{"role": "user", "content": [IMAGE]}]
    with pytest.raises(openai.UnprocessableEntityError, match="takes images"):
        await client.chat.completions.create(model="default", messages=image, stream=stream)
    assert bot


async def test_the_next_provider_that_takes_tools_is_asked(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot(model="both/model")
    upstream.answer(answer())
    got = await client.chat.completions.create(model="default", messages=HELLO, tools=TOOLS)
    assert got.choices[0].message.content == "Hi there!"


# Sessions


async def test_a_session_s_history_is_read_and_continued(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    bot = await server.add_bot()
    session = await server.session(bot)
    upstream.always(answer())
    await server.chat(bot, session, "One")
    got = await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "not what was said"},
            {"role": "assistant", "content": "nor this"},
            {"role": "user", "content": "Two"},
        ],
        metadata={"session_id": session},
    )
    assert upstream.requests[1].json["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Hi there!"},
        {"role": "user", "content": "Two"},
    ]
    assert await only_session(server, bot, got.id) == session
    assert [text for _, text in await server.transcript(bot, session)] == [
        "One",
        "Hi there!",
        "Two",
        "Hi there!",
    ]


async def test_another_chatbot_s_session_is_not_found(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot()
    other = await server.add_bot(key="another-key-0123456789")
    session = await server.session(other, key="another-key-0123456789")
    for id in (session, "no-id"):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=HELLO, metadata={"session_id": id}
            )
        assert caught.value.code == "not_found"
    assert upstream.requests == []


async def test_a_session_wants_something_new(server: Served, client: AsyncOpenAI) -> None:
    bot = await server.add_bot()
    session = await server.session(bot)
    said: Any = [*HELLO, {"role": "assistant", "content": "Hi"}]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=said, metadata={"session_id": session}
        )
    assert caught.value.param == "messages[1].role"


async def test_an_idempotency_key_replays_a_tool_call(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    bot = await server.add_bot()
    session = await server.session(bot)
    upstream.answer(answer(None, tool_calls=[CALL]))

    async def say(text: str) -> Any:
        said: Any = [{"role": "user", "content": text}]
        return await client.chat.completions.create(
            model=MODEL,
            messages=said,
            tools=TOOLS,
            metadata={"session_id": session},
            extra_headers={"Idempotency-Key": "k1"},
        )

    first, second = await say("Weather?"), await say("Weather?")
    assert first.id == second.id
    assert first.choices == second.choices
    assert len(upstream.requests) == 1
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await say("Snow?")
    assert caught.value.code == "idempotency_key_reused"


class TestOnSupabase:
    """What storages keep of such turns."""

    @pytest.fixture
    def storage_config(self, database: Supabase) -> str:
        database.empty()
        url, key = database.postgrest.url, jwt("service_role")
        return f'{{use: supabase, url: "{url}", rest_path: "", key: "{key}"}}'

    async def test_a_turn_may_say_nothing_new(
        self, server: Served, client: AsyncOpenAI, upstream: FakeProvider
    ) -> None:
        await test_a_tool_is_called_in_a_session_and_nothing_stands_twice(server, client, upstream)

    async def test_a_tool_call_is_replayed(
        self, server: Served, client: AsyncOpenAI, upstream: FakeProvider
    ) -> None:
        await test_an_idempotency_key_replays_a_tool_call(server, client, upstream)


class TestOnPostgres(TestOnSupabase):
    @pytest.fixture
    def storage_config(self, database: Supabase) -> str:
        database.empty()
        return f'{{use: postgres, url: "{database.postgres.url}"}}'


# Models and errors


async def test_the_models_are_the_chatbot_s_names(server: Served, client: AsyncOpenAI) -> None:
    await server.add_bot()
    assert [model.id async for model in client.models.list()] == [MODEL, "Bot", "default"]


async def test_a_wrong_key_is_an_authentication_error(server: Served) -> None:
    await server.add_bot()
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model=MODEL, messages=HELLO)
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"


async def test_an_unknown_model_is_not_found(server: Served, client: AsyncOpenAI) -> None:
    await server.add_bot()
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("logprobs", True),
        ("temperature", 3),
        ("max_tokens", 0),
    ],
)
async def test_what_cannot_be_honoured_is_named(
    server: Served, client: AsyncOpenAI, field: str, value: Any
) -> None:
    await server.add_bot()
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={field: value})
    assert caught.value.param == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (429, openai.RateLimitError, "rate_limit_exceeded"),
        (500, openai.InternalServerError, "provider_failed"),
    ],
)
async def test_a_provider_s_failure_is_a_typed_error(
    server: Served,
    client: AsyncOpenAI,
    upstream: FakeProvider,
    status: int,
    kind: type[openai.APIStatusError],
    code: str,
) -> None:
    await server.add_bot()
    upstream.always(http_response(status, {"error": {"message": "secret words"}}))
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == code
    assert "secret words" not in str(caught.value)


async def test_a_failure_in_mid_stream_is_an_error(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot()
    upstream.answer(SSE_HEAD, sse(chunk(content="Hi")), Reset())
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "provider_failed"


async def test_a_part_of_an_answer_is_not_given_for_the_whole(
    server: Served, client: AsyncOpenAI, upstream: FakeProvider
) -> None:
    await server.add_bot()
    upstream.answer(SSE_HEAD, sse(chunk(content="Hi")))
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model=MODEL, messages=HELLO)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1", None, 404, "not_found"),
        ("POST", "/v1/embeddings", b"{}", 404, "not_found"),
        ("GET", PATH, None, 405, "method_not_allowed"),
        ("POST", PATH, b"{", 400, "malformed_request"),
        ("POST", PATH, b" " * 70_000, 413, "body_too_large"),
        ("POST", PATH, b"{}", 422, "invalid_request"),
    ],
)
async def test_every_failure_has_openai_s_shape(
    server: Served, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    await server.add_bot()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    got = await server.request(method, path, data=body, headers=headers)
    assert got.status == status
    assert got.headers["Content-Type"] == "application/json"
    assert got.json.keys() == {"error"}
    assert got.json["error"].keys() == {"message", "type", "param", "code"}
    assert got.json["error"]["code"] == code


async def test_another_media_type_is_refused_in_openai_s_shape(server: Served) -> None:
    await server.add_bot()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}
    got = await server.request("POST", PATH, data=b"{}", headers=headers)
    assert (got.status, got.json["error"]["code"]) == (415, "unsupported_media_type")
