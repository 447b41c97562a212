"""What tests share: a server in this process, a server in one of its own, and configurations."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port

from chatd.app import Runtime, load, open_runtime
from chatd.domain import Chatbot, ChatbotSettings, hash_api_key, new_id

KEY = "test-key-0123456789abcdef"
ECHO_CONFIG = """
server:
  allowed_origins: ["https://site.example"]
storage: %(storage)s
providers:
  main: {use: echo, reply: "You said: {message}"}
models:
  - {match: "*", ask: [main]}
"""


@dataclass
class Answer:
    """A response, read."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """An application that listens on a port of this process."""

    runtime: Runtime
    url: str
    http: aiohttp.ClientSession
    bots: list[Chatbot] = field(default_factory=list)

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        async with self.http.request(
            method, self.url + path, allow_redirects=False, **options
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        """Posts JSON, or bytes as they are."""
        if isinstance(body, bytes):
            headers = {"Content-Type": "application/json", **options.pop("headers", {})}
            return await self.request("POST", path, data=body, headers=headers, **options)
        return await self.request("POST", path, json=body, **options)

    async def add_bot(self, key: str = KEY, model: str = "test/model", **settings: Any) -> Chatbot:
        chatbot = Chatbot(new_id(), "Bot", model, hash_api_key(key), ChatbotSettings(**settings))
        await self.runtime.services.storage.add_chatbot(chatbot)
        self.bots.append(chatbot)
        return chatbot

    async def session(self, bot: Chatbot, key: str = KEY, **more: Any) -> str:
        body = {"api_key": key, "assistant_id": bot.id, **more}
        answer = await self.post("/api/chat/session", body)
        assert answer.status == 200, answer.body
        return str(answer.json["session_id"])

    async def chat(
        self, bot: Chatbot, session: str, *said: str, key: str = KEY, **more: Any
    ) -> Answer:
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


async def open_served(config: Path, stack: AsyncExitStack) -> Served:
    """Serves a configuration on a free port of this process until `stack` is closed."""
    runtime = await open_runtime(*load(config), stack)
    server = HTTPServer(runtime.application, max_body_size=2**62, max_header_size=1024 * 1024)
    socket, port = bind_unused_port()
    server.add_sockets([socket])
    stack.push_async_callback(server.close_all_connections)
    stack.callback(server.stop)
    http = await stack.enter_async_context(aiohttp.ClientSession())
    return Served(runtime, f"http://127.0.0.1:{port}", http)


class ServerProcess:
    """`chatd serve` as a process of its own, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> None:
        self.folder = folder
        self.stdout_path = folder / "stdout.log"
        with self.stdout_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chatd", "serve", "--port", "0", *arguments],
                cwd=folder,
                env={**clean_env(), **(env or {})},
                stdout=log if stdout is None else stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    @property
    def stderr(self) -> str:
        return "".join(self._lines)

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text()

    @property
    def url(self) -> str:
        """The address, once the server says that it serves."""
        for _ in range(1200):
            if found := re.search(r"chatd serves (\S+)", self.stderr):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.stderr}")

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._ended(40)

    def kill(self) -> None:
        """SIGKILL: nothing is finished."""
        self.process.kill()
        self._ended(10)

    def _ended(self, timeout: float) -> int:
        code = self.process.wait(timeout)
        self._reader.join(timeout=5)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


def server_process(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> ServerProcess:
    """A server that is ended at the end of the `with` it is used in."""
    return ServerProcess(folder, *arguments, env=env)


def clean_env() -> dict[str, str]:
    """This environment without what would change a server's configuration."""
    ours = ("CHATD_", "SUPABASE_", "OPENROUTER_")
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(ours) and k not in ("PORT", "DYNO", "DATABASE_URL")
    }


def chatd_command(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs `chatd …` as an operator would."""
    return subprocess.run(
        [sys.executable, "-m", "chatd", *arguments],
        check=False,
        cwd=cwd,
        env={**clean_env(), **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
