"""Plugins that break the contract: they are named in the log, their turn ends, the server goes on."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from chatd.domain import TurnStatus
from chatd.ending import EXIT_CODE
from chatd.errors import PluginError
from chatd.storage import TurnRecord
from tests.conftest import Serve
from tests.support import Served, server_process
from tests.test_http import assert_problem

# One of the plugins is a coroutine where a generator belongs, and so is never awaited.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine 'Broken.stream' was never awaited"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PROVIDER = """
import asyncio
import chatd

class Broken:
    async def stream(self, request):
{body}

    async def check(self):
        pass

    async def close(self):
        {close}

async def open_broken(settings):
    return Broken()

@chatd.hookimpl
def chatd_register_provider(register):
    register.add("broken", open_broken, {{"type": "object"}}, "breaks the contract")
"""
CONFIG = """
storage: %(storage)s
plugins: {{folder: "{folder}"}}
providers:
  broken: {{use: broken, timeouts: {{plain: {plain}}}}}
  echo: {{use: echo, reply: "from the echo"}}
models:
  - {{match: "chain/*", ask: [broken, echo]}}
  - {{match: "*", ask: [broken]}}
server: {{drain_seconds: 0.5}}
"""
NONSENSE = {
    "raises": "raise ZeroDivisionError('the question was: MARK'); yield",
    "is no generator": "return None",
    "raises SystemExit": "raise SystemExit(3); yield",
    "raises KeyboardInterrupt": "raise KeyboardInterrupt; yield",
    "raises GeneratorExit": "raise GeneratorExit; yield",
    "lets a cancellation out": "raise asyncio.CancelledError; yield",
    "raises TimeoutError": "raise TimeoutError; yield",
    "yields None": "yield None",
    "yields text that is bytes": "yield chatd.TextDelta(b'x')",
    "yields text that is none": "yield chatd.TextDelta(None)",
    "reports usage that is none": "yield chatd.UsageReport('lots')",
    "reports a negative count": "yield chatd.UsageReport(chatd.Usage(input_tokens=-1))",
    "reports a huge count": "yield chatd.UsageReport(chatd.Usage(input_tokens=10**30))",
    "reports a count that is text": "yield chatd.UsageReport(chatd.Usage(input_tokens='many'))",
    "reports a cost that is not a number": (
        "yield chatd.UsageReport(chatd.Usage(cost_usd=float('nan')))"
    ),
    "finishes for no reason": "yield chatd.Finish(None)",
    "finishes for a made-up reason": "yield chatd.Finish('nonsense')",
    "finishes with a model that is none": "yield chatd.Finish('stop', 7)",
    "finishes without a word": "yield chatd.Finish('stop')",
    "ends without Finish": "return; yield",
}


def plugin(folder: Path, body: str, close: str = "pass", plain: float = 20) -> str:
    """Writes a broken provider, and returns a configuration that asks it."""
    lines = "\n".join(f"        {line}" for line in body.split("\n"))
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / "broken.py").write_text(PROVIDER.format(body=lines, close=close))
    return CONFIG.format(folder=folder / "plugins", plain=plain)


async def last_turn(served: Served, session: str) -> TurnRecord:
    """The last turn of a session, as it is stored."""
    bot = served.bots[-1]
    storage = served.runtime.services.storage
    page = await storage.list_messages(session, bot.id, limit=100)
    turn = await storage.get_turn(page.data[-1].turn_id or "", bot.id)
    assert turn is not None
    return turn


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_fails_the_turn_names_the_provider_and_frees_the_session(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, body: str
) -> None:
    served = await serve(plugin(tmp_path, body))
    bot = await served.add_bot()
    session = await served.session(bot)
    with caplog.at_level(logging.WARNING):
        answer = await served.chat(bot, session, "hi MARK")
    assert_problem(answer, 502, "provider_failed")
    assert "provider broken" in caplog.text
    assert "the question was" not in caplog.text.replace(body, "")
    assert (await last_turn(served, session)).status is TurnStatus.FAILED
    assert_problem(await served.chat(bot, session, "again"), 502, "provider_failed")


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
async def test_after_nonsense_the_next_provider_answers(
    serve: Serve, tmp_path: Path, body: str
) -> None:
    served = await serve(plugin(tmp_path, body))
    bot = await served.add_bot(model="chain/model")
    answer = await served.chat(bot, await served.session(bot), "hi")
    assert (answer.status, answer.json["response"]) == (200, "from the echo")


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "raise ZeroDivisionError",
        "await asyncio.sleep(3600)",
        "yield chatd.TextDelta(' and more')",
    ],
)
async def test_what_comes_after_finish_does_not_change_the_answer(
    serve: Serve, tmp_path: Path, ending: str
) -> None:
    body = (
        "try:\n    yield chatd.TextDelta('whole')\n    yield chatd.Finish('stop', 'm')\n"
        f"finally:\n    {ending}"
    )
    served = await serve(plugin(tmp_path, body))
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session, "hi")
    assert (answer.json["response"], answer.json["finish_reason"]) == ("whole", "stop")
    assert (await last_turn(served, session)).status is TurnStatus.COMPLETED


HOLDS_ON = """while True:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        pass
yield"""


async def test_a_provider_that_cannot_be_cancelled_is_given_up(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holds_on = HOLDS_ON.replace("while True", "for _ in range(3)")
    served = await serve(plugin(tmp_path, holds_on, plain=0.3))
    bot = await served.add_bot()
    session = await served.session(bot)
    async with asyncio.timeout(15):
        assert_problem(await served.chat(bot, session, "hi"), 504, "provider_timeout")
        assert_problem(await served.chat(bot, session, "again"), 504, "provider_timeout")
    assert "was given up: provider broken does not end" in caplog.text
    for task in list(served.runtime.services.turns.stuck):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0.01)


def test_a_provider_that_cannot_be_cancelled_does_not_keep_the_server_from_stopping(
    tmp_path: Path,
) -> None:
    from tests.test_process import Client

    text = plugin(tmp_path, HOLDS_ON, plain=0.3)
    (tmp_path / "chatd.yaml").write_text(text.replace("%(storage)s", "{use: sqlite}"))
    with server_process(tmp_path) as server:
        client = Client(server)
        status, answer = client.say("hi")
        assert (status, answer["code"]) == (504, "provider_timeout")
        assert server.stop() == 0
        assert "turns do not end; the process does" in server.stdout


def test_a_plugin_that_cannot_be_closed_is_named_and_the_server_stops_well(tmp_path: Path) -> None:
    text = plugin(tmp_path, "return; yield", close="raise ZeroDivisionError")
    (tmp_path / "chatd.yaml").write_text(text.replace("%(storage)s", "{use: sqlite}"))
    with server_process(tmp_path) as server:
        assert server.url
        assert server.stop() == 0
        assert "providers.broken could not be closed: ZeroDivisionError" in server.stdout


def test_a_task_of_a_plugin_that_does_not_end_is_told_of_and_the_process_ends(
    tmp_path: Path,
) -> None:
    hold_on = "\n".join(f"    {line}" for line in HOLDS_ON.splitlines() if line != "yield")
    close = f"asyncio.create_task(hold_on())\n\nasync def hold_on():\n{hold_on}"
    text = plugin(tmp_path, "return; yield", close=close)
    (tmp_path / "chatd.yaml").write_text(text.replace("%(storage)s", "{use: sqlite}"))
    with server_process(tmp_path) as server:
        assert server.url
        assert server.stop() == EXIT_CODE
        told = [line for line in server.stdout.splitlines() if "does not end by itself" in line]
        assert len(told) == 1
        assert "1 tasks go on" in told[0]
        assert "in hold_on" in told[0]


async def test_one_that_raises_before_it_is_a_generator_does_not_keep_the_next_from_answering(
    serve: Serve, tmp_path: Path
) -> None:
    text = plugin(tmp_path, "raise ZeroDivisionError")
    file = tmp_path / "plugins" / "broken.py"
    file.write_text(file.read_text().replace("async def stream", "def stream"))
    served = await serve(text)
    bot = await served.add_bot(model="chain/model")
    answer = await served.chat(bot, await served.session(bot), "hi")
    assert (answer.status, answer.json["response"]) == (200, "from the echo")


@pytest.mark.parametrize("hint", ["'soon'", "float('nan')", "-1", "10**400"])
async def test_a_hint_to_wait_that_is_none_is_passed_over(
    serve: Serve, tmp_path: Path, hint: str
) -> None:
    kind = "chatd.ProviderErrorKind.RATE_LIMIT"
    body = f"raise chatd.ProviderError({kind}, 'no', retry_after={hint}); yield"
    served = await serve(plugin(tmp_path, body))
    bot = await served.add_bot()
    answer = await served.chat(bot, await served.session(bot), "hi")
    assert_problem(answer, 429, "rate_limited")


SHRUGS = """while True:
    try:
        await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        pass
    yield chatd.TextDelta('x')"""


async def test_one_that_talks_on_when_it_is_cancelled_is_ended_at_its_next_word(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(plugin(tmp_path, SHRUGS, plain=1))
    bot = await served.add_bot()
    session = await served.session(bot)
    answer = await served.chat(bot, session, "hi")
    assert (answer.status, answer.json["finish_reason"]) == (200, "interrupted")
    assert set(answer.json["response"]) == {"x"}
    saying = asyncio.create_task(served.chat(bot, session, "again", stream=True))
    turns = served.runtime.services.turns
    while await turns.running_in(bot, session) is None:
        await asyncio.sleep(0.01)
    await turns.stop_in(bot, session)
    assert b'"abort"' in (await saying).body
    assert (await last_turn(served, session)).status is TurnStatus.STOPPED
    assert "was given up" not in caplog.text and not turns.stuck


FAILS_HANGS_ANSWERS = """self.asked = getattr(self, 'asked', 0) + 1
if self.asked == 1:
    raise chatd.ProviderError(chatd.ProviderErrorKind.OVERLOADED, 'sorry')
for _ in range(3 if self.asked == 2 else 0):
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        pass
yield chatd.TextDelta('back again')
yield chatd.Finish('stop')"""


async def test_a_try_that_does_not_end_does_not_keep_others_from_trying(
    serve: Serve, tmp_path: Path
) -> None:
    text = plugin(tmp_path, FAILS_HANGS_ANSWERS, plain=1)
    touchy = "retries: {attempts: 1}, breaker: {requests: 1, open_seconds: 0.2}, timeouts"
    served = await serve(text.replace("use: broken, timeouts", f"use: broken, {touchy}"))
    bot = await served.add_bot(model="chain/model")
    session = await served.session(bot)
    assert (await served.chat(bot, session, "hi")).json["response"] == "from the echo"
    await asyncio.sleep(0.3)
    assert_problem(await served.chat(bot, session, "again"), 504, "provider_timeout")
    turn = await last_turn(served, session)
    assert [attempt["error"] for attempt in turn.attempts] == ["timeout"]
    await asyncio.sleep(0.3)
    assert (await served.chat(bot, session, "and again")).json["response"] == "back again"
    for task in list(served.runtime.services.turns.stuck):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0.01)


ANSWERS_20_TIMES = f"""self.asked = getattr(self, 'asked', 0) + 1
if self.asked <= 20:
    yield chatd.TextDelta('usual')
    yield chatd.Finish('stop')
    return
{HOLDS_ON}"""


def test_a_loser_that_cannot_be_hung_up_on_does_not_keep_the_server_from_stopping(
    tmp_path: Path,
) -> None:
    from tests.test_process import Client

    text = plugin(tmp_path, ANSWERS_20_TIMES)
    text = text.replace("ask: [broken]}", "ask: [broken, echo], hedge: true}")
    (tmp_path / "chatd.yaml").write_text(text.replace("%(storage)s", "{use: sqlite}"))
    with server_process(tmp_path) as server:
        client = Client(server)
        answers = [client.say("hi")[1]["response"] for _ in range(21)]
        assert answers == ["usual"] * 20 + ["from the echo"]
        assert server.stop() == 0
        assert "turns do not end; the process does" in server.stdout


TWICE = """
import chatd

class Twice:
    async def around(self, turn, proceed):
        async for event in proceed(turn):
            {first}
        async for event in proceed(turn):
            yield event

    async def close(self):
        pass

async def open_twice(settings):
    return Twice()

@chatd.hookimpl
def chatd_register_interceptor(register):
    register.add("twice", open_twice, {{"type": "object"}}, "asks twice")
"""


@pytest.mark.parametrize("first", ["pass", "break"])
async def test_an_interceptor_may_ask_twice_and_both_are_recorded(
    serve: Serve, tmp_path: Path, first: str
) -> None:
    text = plugin(tmp_path, "yield chatd.TextDelta('well')\nyield chatd.Finish('stop')")
    (tmp_path / "plugins" / "twice.py").write_text(TWICE.format(first=first))
    served = await serve(text + "interceptors: [{use: twice}]\n")
    bot = await served.add_bot()
    session = await served.session(bot)
    assert (await served.chat(bot, session, "hi")).json["response"] == "well"
    turn = await last_turn(served, session)
    assert [attempt["error"] for attempt in turn.attempts] == [None, None]


async def test_a_provider_whose_takes_is_no_set_is_named_at_the_start(
    serve: Serve, tmp_path: Path
) -> None:
    text = plugin(tmp_path, "yield chatd.TextDelta('x')")
    path = tmp_path / "plugins" / "broken.py"
    path.write_text(
        path.read_text().replace("class Broken:", "class Broken:\n    takes = ['tools']")
    )
    with pytest.raises(PluginError, match='of plugin "broken" must be a set'):
        await serve(text)


async def test_what_failed_attempts_cost_is_counted_too(serve: Serve, tmp_path: Path) -> None:
    body = (
        "yield chatd.UsageReport(chatd.Usage(input_tokens=7, cost_usd=0.5))\n"
        "raise chatd.ProviderError(chatd.ProviderErrorKind.OVERLOADED, 'sorry')"
    )
    served = await serve(plugin(tmp_path, body))
    bot = await served.add_bot(model="chain/model")
    answer = await served.chat(bot, await served.session(bot), "hi")
    usage = answer.json["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["cost_usd"]) == (21, None, 1.5)
