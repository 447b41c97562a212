"""What `/metrics` tells, and to whom."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chatd.errors import NotFound
from chatd.metrics import Metrics, Place
from chatd.metrics.families import MAX_PAIRS, OTHER
from chatd.metrics.text import render
from chatd.testing.fake_provider import SSE_HEAD, FakeProvider, Hold, http_response
from chatd.timed_storage import timed
from tests.support import ECHO_CONFIG, KEY, Served, chatd_command, server_process
from tests.test_process import Client
from tests.test_workers import configure, eventually, workers

TOKEN = "metrics-token-0123456789"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
WITH_TOKEN = ECHO_CONFIG.replace("server:\n", f"server:\n  metrics_token: {TOKEN}\n")
Serve = Callable[[str], Awaitable[Served]]


class Numbers:
    """What Prometheus reads."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def of(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def labels(self, name: str) -> list[Mapping[str, str]]:
        return [sample.labels for sample in self.samples if sample.name == name]


async def numbers(served: Served) -> Numbers:
    answer = await served.get("/metrics", headers=AUTHORIZED)
    assert answer.status == 200, answer.body
    return Numbers(answer.body.decode())


# Who may read


async def test_without_a_token_in_the_configuration_there_is_nothing_to_read(
    served: Served,
) -> None:
    for headers in ({}, AUTHORIZED, {"Authorization": "Bearer "}):
        answer = await served.get("/metrics", headers=headers)
        unknown = await served.get("/nothing-here")
        assert answer.status == 404
        assert answer.json["detail"] == unknown.json["detail"]


@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", "Bearer \xff"])
async def test_nobody_reads_without_the_token(serve: Serve, given: str) -> None:
    served = await serve(WITH_TOKEN)
    answer = await served.get("/metrics", headers={"Authorization": given})
    assert (answer.status, answer.json["code"]) == (401, "invalid_api_key")
    assert TOKEN not in answer.body.decode()


async def test_prometheus_and_openmetrics_are_answered_in_their_formats(serve: Serve) -> None:
    served = await serve(WITH_TOKEN)
    plain = await served.get("/metrics", headers=AUTHORIZED)
    assert plain.headers["Content-Type"].startswith("text/plain; version=")
    asked = {"Accept": "application/openmetrics-text; version=1.0.0", **AUTHORIZED}
    opened = await served.get("/metrics", headers=asked)
    assert opened.headers["Content-Type"].startswith("application/openmetrics-text")
    assert opened.body.endswith(b"# EOF\n")


def test_a_token_that_can_be_guessed_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "chatd.yaml").write_text(
        WITH_TOKEN.replace(TOKEN, "short").replace("%(storage)s", "{use: sqlite, path: chatd.db}")
    )
    checked = chatd_command("check", cwd=tmp_path)
    assert checked.returncode == 1
    assert "server.metrics_token: must be at least 16 visible ASCII characters" in checked.stderr


# What is counted


async def test_turns_are_counted_with_who_answered_and_how_long_it_took(serve: Serve) -> None:
    served = await serve(WITH_TOKEN)
    bot = await served.add_bot()
    session = await served.session(bot)
    await served.chat(bot, session, "one")
    await served.chat(bot, session, "two", stream=True)
    told = await numbers(served)
    asked = {"provider": "main", "model": "test/model"}
    assert told.of("chatd_turns_total", result="completed", **asked) == 2
    assert told.of("chatd_attempts_total", outcome="answered", **asked) == 2
    assert told.of("chatd_turn_seconds_count", **asked) == 2
    assert told.of("chatd_turn_seconds_bucket", le="+Inf", **asked) == 2
    # An answer in one piece has no first token that anybody sees.
    assert told.of("chatd_first_token_seconds_count", **asked) == 1
    assert told.of("chatd_turn_overhead_seconds_count") == 2
    total = told.of("chatd_turn_seconds_sum")
    assert 0 < told.of("chatd_turn_overhead_seconds_sum") < total
    for operation in ("begin_turn", "finish_turn"):
        assert told.of("chatd_storage_seconds_count", operation=operation) == 2
    assert told.of("chatd_running_turns") == 0
    assert told.of("chatd_info", version="0.1.0") == 1
    assert told.of("process_resident_memory_bytes", worker="1") > 2**20


CHAIN = """
server: {metrics_token: metrics-token-0123456789}
limits: {turns_per_key: 3/minute}
storage: %(storage)s
providers:
  bad:
    use: openai_compatible
    base_url: BAD
    retries: {attempts: 2, base: 0}
    breaker: {requests: 2}
  good:
    use: openai_compatible
    base_url: GOOD
    prices: [{match: "*", input: 1000, output: 2000}]
models: [{match: "*", ask: [bad, {provider: good, model: own}]}]
"""
ANSWERED_BY = "whatever a provider answers"
GOOD = {
    "model": ANSWERED_BY,
    "choices": [{"message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 20},
}


async def test_attempts_tokens_costs_breakers_and_refusals_are_told(
    serve: Serve, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(503, b"no"))
    second.always(http_response(200, json.dumps(GOOD).encode()))
    served = await serve(CHAIN.replace("BAD", first.url).replace("GOOD", second.url))
    bot = await served.add_bot(daily_budget_usd=0.06)
    session = await served.session(bot)
    statuses = [(await served.chat(bot, session, "hi")).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    told = await numbers(served)
    bad, good = ({"provider": "bad", "model": "test/model"}, {"provider": "good", "model": "own"})
    assert told.of("chatd_attempts_total", outcome="overloaded", **bad) == 2
    assert told.of("chatd_attempts_total", outcome="answered", **good) == 2
    assert told.of("chatd_turns_total", result="completed", **good) == 2
    assert told.of("chatd_tokens_total", kind="input", **good) == 20
    assert told.of("chatd_tokens_total", kind="output", **good) == 40
    assert told.of("chatd_cost_usd_total", **good) == pytest.approx(0.1)
    assert told.of("chatd_breaker_state", worker="1", **bad) == 2
    assert told.of("chatd_breaker_state", worker="1", **good) == 0
    assert told.of("chatd_limit_refusals_total", limit="daily_budget") == 2
    assert ANSWERED_BY not in told.text


async def test_the_limit_that_refused_is_told_by_its_name(
    serve: Serve, first: FakeProvider, second: FakeProvider
) -> None:
    second.always(http_response(200, json.dumps(GOOD).encode()))
    config = CHAIN.replace("BAD", second.url).replace("GOOD", second.url)
    served = await serve(config)
    bot = await served.add_bot()
    session = await served.session(bot)
    statuses = [(await served.chat(bot, session, "hi")).status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    told = await numbers(served)
    assert told.of("chatd_limit_refusals_total", limit="turns_per_key") == 2
    chat = {"route": "/api/chat", "method": "POST"}
    assert told.of("chatd_http_requests_total", status="200", **chat) == 3
    assert told.of("chatd_http_requests_total", status="429", **chat) == 2
    assert told.of("chatd_http_request_seconds_count", route="/api/chat") == 5


async def test_a_turn_that_fails_is_told_with_its_error(serve: Serve, fake: FakeProvider) -> None:
    fake.always(http_response(401, b"no"))
    served = await serve(CHAIN.replace("BAD", fake.url).replace("GOOD", fake.url))
    bot = await served.add_bot()
    answer = await served.chat(bot, await served.session(bot), "hi")
    assert answer.status == 502
    told = await numbers(served)
    assert told.of("chatd_turns_total", result="failed", provider="good", model="own") == 1
    assert told.of("chatd_turn_errors_total", code="provider_failed") == 1
    assert told.of("chatd_attempts_total", outcome="authentication") == 2


async def test_streams_and_turns_are_told_while_they_go_on(
    serve: Serve, fake: FakeProvider
) -> None:
    fake.always(SSE_HEAD, Hold())
    served = await serve(CHAIN.replace("BAD", fake.url).replace("GOOD", fake.url))
    bot = await served.add_bot()
    session = await served.session(bot)
    body = {"api_key": KEY, "assistant_id": bot.id, "session_id": session, "type": "message"}
    body |= {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with served.http.post(f"{served.url}/api/chat", json=body) as stream:
        await stream.content.readuntil(b"turn_id")
        told = await numbers(served)
        assert told.of("chatd_open_streams") == 1
        assert told.of("chatd_running_turns") == 1
    async with asyncio.timeout(5):
        while (await numbers(served)).of("chatd_open_streams"):
            await asyncio.sleep(0.02)
    assert (await numbers(served)).of("chatd_running_turns") == 1


async def test_what_is_asked_that_is_not_there_has_one_label(serve: Serve) -> None:
    served = await serve(WITH_TOKEN)
    for path in ("/a-canary", "/b-canary", "/metrics/canary"):
        assert (await served.get(path)).status == 404
    await served.request("BREW", "/health")
    told = await numbers(served)
    assert told.of("chatd_http_requests_total", route="-", method="GET", status="404") == 3
    assert told.of("chatd_http_requests_total", method="other", status="405") == 1
    assert "canary" not in told.text and "BREW" not in told.text


async def test_failures_of_storage_are_told_by_operation(serve: Serve) -> None:
    served = await serve(WITH_TOKEN)
    bot = await served.add_bot()
    session = await served.session(bot)
    await served.runtime.services.storage.close()
    answer = await served.chat(bot, session, "hi")
    assert answer.status in (500, 503)
    told = await numbers(served)
    assert told.of("chatd_storage_errors_total", operation="begin_turn") >= 1
    # What a client did wrong is no failure of storage.
    assert told.of("chatd_storage_errors_total", operation="get_chatbot_by_key") == 0


async def test_shared_state_that_is_gone_is_told_and_its_password_is_not(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    shared = "shared: {use: redis, url: 'redis://:canary-password@127.0.0.1:9'}\n"
    served = await serve(WITH_TOKEN + shared)
    bot = await served.add_bot()
    assert (await served.chat(bot, await served.session(bot), "hi")).status == 200
    told = await numbers(served)
    assert told.labels("chatd_shared_up") == [{"worker": "1"}]
    assert told.of("chatd_shared_up") == 0
    assert "canary-password" not in told.text + caplog.text
    assert "127.0.0.1:9" in caplog.text


# A storage that is timed is still the plugin's


class _Own:
    """A storage with something of its own."""

    extra = "there"

    async def check(self) -> None:
        raise NotFound

    async def close(self) -> None:
        pass

    async def search(self, text: str) -> str:
        return text


async def test_a_timed_storage_has_what_the_plugin_has_and_no_more() -> None:
    metrics = Metrics()
    storage: Any = timed(_Own(), metrics)  # type: ignore[arg-type]
    assert (storage.extra, await storage.search("x")) == ("there", "x")
    assert not hasattr(storage, "diagnose")
    with pytest.raises(NotFound):
        await storage.check()
    assert sum(metrics.storage[("check",)].counts) == 1
    assert not metrics.storage_errors.values


# Several workers


def scrape(url: str) -> Numbers:
    with urlopen(Request(f"{url}/metrics", headers=AUTHORIZED), timeout=10) as answer:
        return Numbers(answer.read().decode())


def test_any_worker_answers_for_all_and_for_those_that_died(tmp_path: Path) -> None:
    configure(tmp_path)
    config = tmp_path / "chatd.yaml"
    text = config.read_text().replace("server:\n", f"server:\n  metrics_token: {TOKEN}\n")
    config.write_text(text)
    folder = tmp_path / "tmp"
    folder.mkdir()
    with server_process(tmp_path, env={"TMPDIR": str(folder)}) as server:
        client = Client(server)
        eventually(lambda: len(workers(server)) == 2)
        for _ in range(12):
            assert client.say("hi")[0] == 200
        done = "chatd_turns_total"
        eventually(lambda: scrape(server.url).of(done) == 12)
        # Whoever answers, sums never shrink.
        assert {scrape(server.url).of(done) for _ in range(12)} == {12}
        told = scrape(server.url)
        assert {labels["worker"] for labels in told.labels("chatd_info")} == {"1", "2"}
        for pid in workers(server):
            before = workers(server)
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: pid not in workers(server), 5)  # noqa: B023 (called here)
            assert scrape(server.url).of(done) == 12
            eventually(lambda: len(workers(server)) == len(before))  # noqa: B023 (called here)
            eventually(lambda: len(scrape(server.url).labels("chatd_info")) == 2)
        assert client.say("hi")[0] == 200
        eventually(lambda: scrape(server.url).of(done) == 13)
        assert len(list(folder.glob("chatd-*/*.json"))) == 2
        assert server.stop() == 0
    assert list(folder.iterdir()) == []


def test_a_dead_worker_has_no_gauges_and_keeps_its_counts(tmp_path: Path) -> None:
    living, dead = Metrics(), Metrics()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for _ in range(3):
        dead.asked("main", "m").ended("completed")
    dead.sources["x"] = lambda: [("chatd_running_turns", (), 7)]
    Place(tmp_path, 2, dead).write()
    written = json.loads((tmp_path / "2.json").read_text())
    place = Place(tmp_path, 1, living)
    assert Numbers(render(place.snapshots(), "")[1].decode()).of("chatd_running_turns") == 7
    (tmp_path / "2.json").write_text(json.dumps({**written, "pid": gone.pid}))
    told = Numbers(render(place.snapshots(), "")[1].decode())
    assert told.of("chatd_running_turns") == 0
    assert told.of("chatd_turns_total") == 3
    # Who takes its place goes on from there.
    again = Metrics()
    Place(tmp_path, 2, again)
    again.asked("main", "m").ended("completed")
    assert Numbers(render(again.gather(), "")[1].decode()).of("chatd_turns_total") == 4


async def test_a_folder_that_cannot_be_written_to_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    metrics.asked("main", "m").ended("completed")
    place = Place(tmp_path / "gone", 1, metrics)
    for _ in range(3):
        assert Numbers(render(place.snapshots(), "")[1].decode()).of("chatd_turns_total") == 1
    assert caplog.text.count("the numbers of this worker cannot be written") == 1


def test_a_reload_keeps_what_was_counted(tmp_path: Path) -> None:
    config = WITH_TOKEN.replace("%(storage)s", "{use: sqlite, path: chatd.db}")
    (tmp_path / "chatd.yaml").write_text(config)
    with server_process(tmp_path) as server:
        client = Client(server)
        assert client.say("hi")[0] == 200
        changed = config.replace("chatd.db", "other.db").replace(TOKEN, TOKEN[::-1])
        (tmp_path / "chatd.yaml").write_text(changed)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "is in force" in server.stdout)
        headers = {"Authorization": f"Bearer {TOKEN[::-1]}"}
        with urlopen(Request(f"{server.url}/metrics", headers=headers), timeout=10) as answer:
            told = Numbers(answer.read().decode())
        assert told.of("chatd_turns_total", result="completed") == 1
        assert told.of("chatd_event_loop_lag_seconds_count") > 0
        with pytest.raises(HTTPError):
            scrape(server.url)


# Labels


def test_models_beyond_the_first_hundred_share_a_label() -> None:
    metrics = Metrics()
    pairs = {metrics.asked("main", f"model-{i}").labels for i in range(MAX_PAIRS + 100)}
    assert len(pairs) == MAX_PAIRS + 1
    assert ("main", OTHER) in pairs
    assert metrics.asked("main", "model-0").labels == ("main", "model-0")
