"""A server that is killed again and again while turns run: nothing lost, doubled or stuck."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from chatd.domain import new_id
from tests.postgres import free_port
from tests.support import KEY, ServerProcess, chatd_command
from tests.test_streaming import parsed, said

KILLS = int(os.environ.get("CHATD_KILLS", "4"))
"""How often the server is killed; more by hand."""

TALKERS = 8
CONFIG = """
server: {lease_seconds: 1}
storage: %(storage)s
providers:
  main: {use: echo, reply: "You said: {message} and that is all of it", word_seconds: 0.02}
models:
  - {match: "*", ask: [main]}
"""


class Talker:
    """A client in a session of its own, which says one thing after the other.

    What is not answered is sent again with the same key, until it is.
    """

    def __init__(self, url: str, bot: str) -> None:
        self._url = url
        self._bot = bot
        self._session = ""
        self.acknowledged: list[tuple[str, str]] = []

    async def run(self, stop: asyncio.Event) -> None:
        async with new_client() as http:
            body = {"assistant_id": self._bot}
            self._session = (await self._until_done(http, "/api/chat/session", body, ""))[
                "session_id"
            ]
            while not stop.is_set():
                text = f"number {len(self.acknowledged)}"
                body = self._body(text, stream=bool(len(self.acknowledged) % 2))
                answer = await self._until_done(http, "/api/chat", body, new_id())
                self.acknowledged.append((text, answer["response"]))

    def _body(self, text: str, *, stream: bool) -> dict[str, Any]:
        return {
            "assistant_id": self._bot,
            "session_id": self._session,
            "type": "message",
            "messages": [{"role": "user", "content": text}],
            "stream": stream,
        }

    async def _until_done(
        self, http: aiohttp.ClientSession, path: str, body: dict[str, Any], key: str
    ) -> Any:
        headers = {"X-API-Key": KEY} | ({"Idempotency-Key": key} if key else {})
        async with asyncio.timeout(300):
            while True:
                try:
                    async with http.post(self._url + path, json=body, headers=headers) as answer:
                        text = await answer.text()
                    if answer.status == 200 and not body.get("stream"):
                        return json.loads(text)
                    if answer.status == 200 and '"type":"finish"' in text:
                        return {"response": said(parsed(text))}
                    assert answer.status in (200, 409, 503), text
                except (aiohttp.ClientError, OSError):
                    pass
                await asyncio.sleep(0.05)

    async def check(self) -> None:
        """Holds that the transcript is what was acknowledged, and that the session goes on."""
        async with new_client() as http:
            transcript = await self._transcript(http)
            expected = [
                (role, text)
                for pair in self.acknowledged
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            assert transcript == expected
            answer = await self._until_done(
                http, "/api/chat", self._body("one more", stream=False), new_id()
            )
            assert answer["response"] == "You said: one more and that is all of it"

    async def _transcript(self, http: aiohttp.ClientSession) -> list[tuple[str, str]]:
        messages: list[tuple[str, str]] = []
        query = ""
        while True:
            path = f"/api/chat/session/{self._session}/messages?limit=200{query}"
            async with http.get(self._url + path, headers={"X-API-Key": KEY}) as answer:
                page = await answer.json()
            messages = [(m["role"], m["content"]) for m in page["data"]] + messages
            if not page["has_more"]:
                return messages
            query = f"&before={page['next_cursor']}"


async def until(reached: Callable[[], bool], talking: list[asyncio.Task[None]]) -> None:
    """Waits, 60 s at most, and fails with the first of those that talk that fails."""
    async with asyncio.timeout(60):
        while not reached():
            for task in talking:
                if task.done():
                    task.result()
            await asyncio.sleep(0.02)


def new_client() -> aiohttp.ClientSession:
    """A client that gives up on a server that is gone."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))


@pytest.fixture(params=["sqlite", "supabase"])
def config(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return CONFIG.replace("%(storage)s", "{use: sqlite, path: chatd.db}")
    database = request.getfixturevalue("database")
    database.empty()
    return CONFIG.replace("%(storage)s", database.configured("supabase"))


async def test_kill_9_at_any_point_loses_doubles_and_blocks_nothing(
    config: str, tmp_path: Path
) -> None:
    (tmp_path / "chatd.yaml").write_text(config)
    made = await asyncio.to_thread(
        chatd_command, "bots", "add", "--api-key", KEY, "--json", cwd=tmp_path
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    talkers = [Talker(url, json.loads(made.stdout)["id"]) for _ in range(TALKERS)]
    stop = asyncio.Event()
    talking = [asyncio.create_task(talker.run(stop)) for talker in talkers]
    for _ in range(KILLS):
        server = ServerProcess(tmp_path, "--port", str(port))
        assert await asyncio.to_thread(lambda server=server: server.url)
        await asyncio.sleep(random.uniform(0.05, 0.8))
        await asyncio.to_thread(server.kill)
    with ServerProcess(tmp_path, "--port", str(port)) as server:
        assert await asyncio.to_thread(lambda: server.url)
        await until(lambda: all(len(talker.acknowledged) > 1 for talker in talkers), talking)
        stop.set()
        await asyncio.gather(*talking)
        for talker in talkers:
            await talker.check()
        assert await asyncio.to_thread(server.stop) == 0
