"""Clients that talk through a proxy while servers go, as docs/api.md has them do it."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from chatd.domain import new_id
from tests.support import KEY

PATIENCE = 240
"""Seconds within which every turn is acknowledged."""

PAUSE = 0.2
"""Seconds before what failed is tried again."""

GONE = (aiohttp.ClientError, OSError, TimeoutError)


def new_client(address: str) -> aiohttp.ClientSession:
    """A client at an address of its own, which gives up on a server that is gone."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(local_addr=(address, 0)),
        timeout=aiohttp.ClientTimeout(total=120),
    )


@dataclass
class Reading:
    """What a client has of a streamed turn, over all of its connections."""

    turn: str = ""
    text: str = ""
    last: int = 0
    end: str = ""
    stored: bool = False
    order: list[int] = field(default_factory=list)

    def take(self, number: int, event: dict[str, Any]) -> None:
        """Takes an event, which must come after those that were had."""
        assert number > self.last, f"event {number} came after {self.last}"
        self.last = number
        if event["type"] == "start":
            # The turn runs for the first time, or anew.
            self.turn = event["messageMetadata"]["turn_id"]
            self.text = ""
        elif event["type"] == "text-delta":
            self.text += event["delta"]
        elif event["type"] in ("finish", "error", "abort"):
            self.end = event["type"]
            self.stored = event.get("messageMetadata", {}).get("stored", False)


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """The events of a stream, as they come."""
    number = 0
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "id":
            number = int(value)
        elif name == "data" and value != "[DONE]":
            yield number, json.loads(value)


class Talker:
    """A client in a session of its own, which says one thing after the other.

    Every other answer is streamed. Connections are dropped now and then, and a stream goes on where it
    broke off; what is not acknowledged is sent again with the same key, until it is.

    :param rest: seconds between turns, at most.
    """

    def __init__(
        self, url: str, bot: str, address: str, counted: Counter[str], rest: float
    ) -> None:
        self._url = url
        self._bot = bot
        self._address = address
        self._counted = counted
        self._rest = rest
        self.session = ""
        self.acknowledged: list[tuple[str, str]] = []

    async def run(self, stop: asyncio.Event, texts: Sequence[str] = ()) -> None:
        """Says these texts; without any, talks until it is stopped, and then to the end of a turn."""
        async with new_client(self._address) as self._http:
            body = {"assistant_id": self._bot}
            begun = await self._until_done("/api/chat/session", body, {"X-API-Key": KEY})
            self.session = begun["session_id"]
            for text in texts:
                await self._say(text)
            while not texts and not stop.is_set():
                await asyncio.sleep(random.uniform(0, self._rest))
                await self._say(f"number {len(self.acknowledged)}")

    async def _say(self, text: str) -> None:
        body = {
            "assistant_id": self._bot,
            "session_id": self.session,
            "type": "message",
            "messages": [{"role": "user", "content": text}],
        }
        headers = {"X-API-Key": KEY, "Idempotency-Key": new_id()}
        async with asyncio.timeout(PATIENCE):
            if len(self.acknowledged) % 2:
                answer = (await self._until_done("/api/chat", body, headers))["response"]
            else:
                answer = await self._streamed(body | {"stream": True}, headers)
        self.acknowledged.append((text, answer))
        self._counted["turns"] += 1

    async def _until_done(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        while True:
            try:
                async with self._http.post(self._url + path, json=body, headers=headers) as answer:
                    if answer.status == 200:
                        found = await answer.json()
                        if found.get("stored", True):
                            return found
                        self._counted["answers that were not stored yet"] += 1
                    await self._refused(answer)
            except GONE as error:
                self._counted[type(error).__name__] += 1
            await asyncio.sleep(PAUSE)

    async def _refused(self, answer: aiohttp.ClientResponse) -> None:
        self._counted[f"status {answer.status}"] += 1
        assert answer.status in (200, 409, 502, 503, 504), await answer.text()

    async def _streamed(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        """The text that was read, in one connection or in several."""
        reading = Reading()
        while not (reading.end == "finish" and reading.stored):
            try:
                if not reading.turn or reading.end:
                    # Not begun, or ended without an acknowledgement: all of it is asked for again.
                    reading = Reading()
                    asked = self._http.post(self._url + "/api/chat", json=body, headers=headers)
                else:
                    path = f"/api/chat/turns/{reading.turn}/events"
                    more = {"X-API-Key": KEY, "Last-Event-ID": str(reading.last)}
                    asked = self._http.get(self._url + path, headers=more)
                    self._counted["streams resumed"] += 1
                async with asked as answer:
                    if answer.status == 200:
                        await self._read(answer, reading)
                        continue
                    await self._refused(answer)
            except GONE as error:
                self._counted[type(error).__name__] += 1
            await asyncio.sleep(PAUSE)
        return reading.text

    async def _read(self, answer: aiohttp.ClientResponse, reading: Reading) -> None:
        """Reads to the end, or drops the connection after a few events."""
        left = random.randint(2, 12) if random.random() < 0.5 else -1
        async for number, event in events(answer):
            reading.take(number, event)
            left -= 1
            if left == 0 and not reading.end:
                answer.close()
                return
        if reading.end == "error":
            self._counted["streams that ended with an error"] += 1

    async def transcript(self, http: aiohttp.ClientSession) -> list[tuple[str, str]]:
        """What the server says was said."""
        messages: list[tuple[str, str]] = []
        query = ""
        while True:
            path = f"/api/chat/session/{self.session}/messages?limit=200{query}"
            async with http.get(self._url + path, headers={"X-API-Key": KEY}) as answer:
                assert answer.status == 200, await answer.text()
                page = await answer.json()
            messages = [(m["role"], m["content"]) for m in page["data"]] + messages
            if not page["has_more"]:
                return messages
            query = f"&before={page['next_cursor']}"


class Flood:
    """Visitors of a widget that say more than the chatbot's limit lets through, all the time.

    :param sessions: each with one request at a time.
    """

    def __init__(self, url: str, bot: str, sessions: int, counted: Counter[str]) -> None:
        self._url = url
        self._bot = bot
        self._sessions = sessions
        self._counted = counted

    async def run(self, stop: asyncio.Event) -> None:
        async with new_client("127.0.2.1") as http:
            visitors = [self._visit(http, stop) for _ in range(self._sessions)]
            await asyncio.gather(*visitors)

    async def _visit(self, http: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        session = ""
        while not stop.is_set():
            path, body = "/api/chat/widget/session", {"chatbot_id": self._bot}
            if session:
                path, body = "/api/chat/widget", {"session_id": session, "message": "hi"}
            try:
                async with http.post(self._url + path, json=body) as answer:
                    found = await answer.json(content_type=None) if answer.status == 200 else {}
                    assert answer.status in (200, 409, 429, 502, 503, 504), await answer.text()
                self._counted[f"flood {answer.status}"] += 1
                session = session or found.get("session_id", "")
            except GONE:
                self._counted["flood lost"] += 1
            await asyncio.sleep(PAUSE)
