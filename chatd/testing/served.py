"""A whole server in the process of a test: plugins, storage and HTTP, on a free port."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tornado.testing import bind_unused_port

from chatd.app import Runtime, load, open_runtime
from chatd.connections import ClientServer
from chatd.domain import Chatbot, ChatbotSettings, hash_api_key, new_id
from chatd.storage import TurnRecord

KEY = "test-key-0123456789abcdef"
"""The API key of the chatbots that are added without another."""


@dataclass
class Answer:
    """A response, read."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass
class Served:
    """An application that listens on a port of this process."""

    runtime: Runtime
    url: str
    http: aiohttp.ClientSession
    bots: list[Chatbot] = field(default_factory=list)

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """Sends a request and reads the whole answer."""
        async with self.http.request(
            method, self.url + path, allow_redirects=False, **options
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        """`GET`."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        """Posts JSON, or bytes as they are."""
        if isinstance(body, bytes):
            headers = {"Content-Type": "application/json", **options.pop("headers", {})}
            return await self.request("POST", path, data=body, headers=headers, **options)
        return await self.request("POST", path, json=body, **options)

    async def add_bot(self, key: str = KEY, model: str = "test/model", **settings: Any) -> Chatbot:
        """A new chatbot with these settings."""
        chatbot = Chatbot(new_id(), "Bot", model, hash_api_key(key), ChatbotSettings(**settings))
        await self.runtime.services.storage.add_chatbot(chatbot)
        self.bots.append(chatbot)
        return chatbot

    async def session(self, bot: Chatbot, key: str = KEY, **more: Any) -> str:
        """A new session of a chatbot."""
        body = {"api_key": key, "assistant_id": bot.id, **more}
        answer = await self.post("/api/chat/session", body)
        assert answer.status == 200, answer.body
        return str(answer.json["session_id"])

    async def chat(
        self, bot: Chatbot, session: str, *said: str, key: str = KEY, **more: Any
    ) -> Answer:
        """Says something in a session."""
        body = {
            "api_key": key,
            "assistant_id": bot.id,
            "session_id": session,
            "type": "message",
            "messages": [{"role": "user", "content": text} for text in said],
            **more,
        }
        return await self.post("/api/chat", body)

    async def transcript(self, bot: Chatbot, session: str) -> list[tuple[str, str]]:
        """What is stored of a session."""
        page = await self.runtime.services.storage.list_messages(session, bot.id, limit=1000)
        return [(message.role, message.content) for message in page.data]

    async def last_turn(self, bot: Chatbot, session: str) -> TurnRecord:
        """The newest turn of a session, as it is stored."""
        storage = self.runtime.services.storage
        page = await storage.list_messages(session, bot.id, limit=1)
        turn = await storage.get_turn(page.data[-1].turn_id or "", bot.id)
        assert turn is not None
        return turn


async def open_served(config: Path, stack: AsyncExitStack) -> Served:
    """Serves a configuration on a free port of this process until `stack` is closed."""
    runtime = await open_runtime(*load(config), stack)
    server = ClientServer(runtime.application, runtime.services.config)
    socket, port = bind_unused_port()
    server.add_sockets([socket])
    stack.push_async_callback(server.close_all_connections)
    stack.callback(server.stop)
    http = await stack.enter_async_context(aiohttp.ClientSession())
    return Served(runtime, f"http://127.0.0.1:{port}", http)
