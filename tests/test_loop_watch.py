"""A plugin that blocks the event loop is named with its stack, and nobody else is."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path

import pytest

from chatd.loop_watch import LoopWatch
from chatd.registry import load_registry
from tests.support import server_process
from tests.test_process import Client
from tests.test_workers import eventually

BLOCKING = """
import time
import chatd

class Blocking:
    async def stream(self, request):
        password = "hunter2-canary"
        self.compute(password, request.messages[-1].content)
        yield chatd.TextDelta("done")
        yield chatd.Finish("stop")

    def compute(self, password, said):
        time.sleep(0.6)

    async def check(self):
        pass

    async def close(self):
        pass

async def open_blocking(settings):
    return Blocking()

@chatd.hookimpl
def chatd_register_provider(register):
    register.add("blocking", open_blocking, {"type": "object"}, "holds everything up")
"""
CONFIG = """
storage: {use: sqlite}
plugins: {folder: plugins}
providers: {main: {use: blocking}}
models: [{match: "*", ask: [main]}]
"""


def test_a_plugin_that_blocks_is_named_once_with_its_stack_and_without_secrets(
    tmp_path: Path,
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "slow.py").write_text(BLOCKING)
    (tmp_path / "chatd.yaml").write_text(CONFIG)
    with server_process(tmp_path) as server:
        client = Client(server)
        assert client.say("my-secret-question")[1]["response"] == "done"
        eventually(lambda: "goes on after" in server.stdout)
        # Soon after the first it is not told again.
        assert client.say("my-secret-question")[1]["response"] == "done"
        assert server.stop() == 0
        lines = [json.loads(line)["message"] for line in server.stdout.splitlines()]
    (told,) = [line for line in lines if "blocks the event loop" in line and "slow" in line]
    assert told.startswith('plugin "slow" blocks the event loop, for 0.')
    assert told.endswith("in compute")
    assert 'plugins/slow.py", line 8, in stream' in told
    assert "hunter2" not in "".join(lines) and "my-secret" not in "".join(lines)


async def test_who_waits_is_not_told_and_the_lag_is_observed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = LoopWatch(5, lambda _: None)
    lags: list[float] = []
    watch.observers.append(lags.append)
    watch.seconds = 0.1
    watch.start()
    while len(lags) < 4:
        await asyncio.sleep(0.01)
    watch.stop()
    assert all(lag >= 0 for lag in lags) and watch.lag == lags[-1]


async def test_a_watch_that_is_turned_off_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watch = LoopWatch(0, lambda _: None)
    lags: list[float] = []
    watch.observers.append(lags.append)
    watch.start()
    with caplog.at_level(logging.WARNING):
        await asyncio.sleep(0.1)
        time.sleep(0.5)
        await asyncio.sleep(0.1)
    watch.stop()
    assert caplog.text == ""
    assert max(lags) > 0.3


def test_code_is_told_to_the_plugin_that_it_belongs_to(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    registry = load_registry(tmp_path)
    assert registry.plugin_of("chatd_plugin_files.mine") == "mine"
    assert registry.plugin_of("chatd_plugins.sqlite.storage") == "sqlite"
    assert registry.plugin_of("chatd_plugins.echo") == "echo"
    assert registry.plugin_of("chatd_plugins") is None
    assert registry.plugin_of("chatd.turns") is None
    assert registry.plugin_of("asyncio.events") is None
