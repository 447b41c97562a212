"""A process: it starts, is killed, is told to stop, and says what it does."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import apsw
import pytest

from tests.support import ServerProcess, chatd_command, server_process

CANARY = "sk-canary-9f8e7d6c5b4a"
CONFIG = """
server: {port: 0, drain_seconds: 5}
storage: {use: sqlite, path: chatd.db}
providers:
  main: {use: echo, word_seconds: %s, reply: "You said: {message}"}
models: [{match: "*", ask: [main]}]
"""


def call(method: str, url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """A request as any client makes it: status and JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)


class Client:
    """A client with a chatbot and a session of its own."""

    def __init__(self, server: ServerProcess, **env: str) -> None:
        self.url = server.url
        made = chatd_command("bots", "add", "--json", cwd=server.folder, env=env)
        bot = json.loads(made.stdout)
        self.known = {"api_key": bot["api_key"], "assistant_id": bot["id"]}
        _, answer = call("POST", f"{self.url}/api/chat/session", self.known)
        self.session = answer["session_id"]

    def say(self, text: str) -> tuple[int, Any]:
        messages = [{"role": "user", "content": text}]
        body = {"session_id": self.session, "type": "message", "messages": messages}
        return call("POST", f"{self.url}/api/chat", {**self.known, **body})


Start = Callable[[str], AbstractContextManager[ServerProcess]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a server in `tmp_path` whose words take so many seconds."""

    def starter(word_seconds: str = "0") -> AbstractContextManager[ServerProcess]:
        (tmp_path / "chatd.yaml").write_text(CONFIG % word_seconds)
        return server_process(tmp_path)

    yield starter


def test_a_server_killed_in_mid_turn_has_the_question_once_and_the_next_turn_works(
    start: Start,
) -> None:
    with start("1") as server, ThreadPoolExecutor() as pool:
        client = Client(server)
        lost = pool.submit(client.say, "are you there?")
        wait_for_a_turn(server.folder)
        server.kill()
        assert isinstance(lost.exception(timeout=10), OSError)
    with start("0") as server:
        client.url = server.url
        status, answer = client.say("and now?")
        assert (status, answer["response"]) == (200, "You said: and now?")
        said = transcript(server.folder, client.session)
    assert said == [
        ("user", "are you there?"),
        ("user", "and now?"),
        ("assistant", "You said: and now?"),
    ]


def test_a_server_told_to_stop_lets_running_turns_finish(start: Start) -> None:
    with start("0.3") as server, ThreadPoolExecutor() as pool:
        client = Client(server)
        running = pool.submit(client.say, "hi")
        wait_for_a_turn(server.folder)
        assert server.stop() == 0
        status, answer = running.result(timeout=10)
        assert (status, answer["response"]) == (200, "You said: hi")
        assert transcript(server.folder, client.session)[-1] == ("assistant", "You said: hi")


def test_a_turn_that_outlasts_the_stop_is_stored_as_far_as_it_came(start: Start) -> None:
    with start("3") as server, ThreadPoolExecutor() as pool:
        client = Client(server)
        running = pool.submit(client.say, "hi there")
        wait_for_a_turn(server.folder)
        assert server.stop() == 0
        status, answer = running.result(timeout=10)
        assert (status, answer["finish_reason"]) == (200, "interrupted")
        assert answer["response"] == "You"
        assert transcript(server.folder, client.session) == [
            ("user", "hi there"),
            ("assistant", "You"),
        ]


def test_ctrl_c_stops_as_sigterm_does(start: Start) -> None:
    with start("0") as server:
        assert call("GET", f"{server.url}/health") == (200, {"status": "ok"})
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == 0


def test_a_second_ctrl_c_does_not_wait_for_turns(start: Start) -> None:
    with start("2") as server, ThreadPoolExecutor() as pool:
        client = Client(server)
        running = pool.submit(client.say, "hi there, how are you?")
        wait_for_a_turn(server.folder)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == 0
        assert running.result(timeout=10)[1]["code"] == "shutting_down"


def test_logs_on_a_terminal_are_for_people(tmp_path: Path) -> None:
    (tmp_path / "chatd.yaml").write_text(CONFIG % "0")
    terminal, inner = pty.openpty()
    with ServerProcess(tmp_path, stdout=inner) as server:
        os.close(inner)
        call("GET", f"{server.url}/nothing", **{"X-Request-Id": "my-id"})
        line = os.read(terminal, 4096).decode()
    os.close(terminal)
    assert re.fullmatch(r"\d\d:\d\d:\d\d GET - 404 not_found [\d.]+ ms  \[my-id\]\r\n", line)


def test_a_port_that_is_taken_is_said_in_words(start: Start, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (tmp_path / "chatd.yaml").write_text(CONFIG % "0")
        result = chatd_command("serve", "--port", port, "--host", "127.0.0.1", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"chatd: cannot listen on 127.0.0.1 port {port}: Address")
    assert "Traceback" not in result.stderr


def test_each_request_is_one_line_of_json_without_keys_or_messages(tmp_path: Path) -> None:
    message = "my-secret-message-1234"
    env = {"OPENROUTER_API_KEY": CANARY, "CHATD_EXTRA": CANARY}
    (tmp_path / "chatd.yaml").write_text(
        CONFIG.replace(
            "models: [",
            "  paid: {use: openrouter, api_key: '${OPENROUTER_API_KEY}', "
            "base_url: 'http://127.0.0.1:9'}\nmodels: [{match: 'paid/*', ask: [paid]}, ",
        )
        % "0"
    )
    with server_process(tmp_path, env=env) as server:
        client = Client(server, **env)
        assert client.say(message)[0] == 200
        chatd_command("bots", "set", "Chatbot", "--model", "paid/model", cwd=tmp_path, env=env)
        for _ in range(60):
            status, answer = client.say(message)
            if status == 502:
                break
            time.sleep(0.1)
        assert (status, answer["code"]) == (502, "provider_failed")
        secrets = [client.known["api_key"], CANARY, message]
        call("GET", f"{server.url}/health?api_key={CANARY}", **{"X-Request-Id": "my-id"})
        call("GET", f"{server.url}/{CANARY}", Authorization=f"Bearer {CANARY}")
        call("POST", f"{server.url}/api/chat", {"api_key": CANARY, "messages": message})
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.stdout.splitlines()]
        out = server.stdout + server.stderr + json.dumps(answer)
    for secret in secrets:
        assert secret not in out
    requests = [line for line in lines if line["logger"] == "chatd.access"]
    health = next(line for line in requests if line["request_id"] == "my-id")
    assert (health["method"], health["route"], health["status"]) == ("GET", "/health", 200)
    assert health["ms"] >= 0
    first_chat = next(line for line in requests if line["route"] == "/api/chat")
    assert first_chat["chatbot"] == client.known["assistant_id"]
    failed = next(line for line in lines if "provider paid failed" in line["message"])
    assert failed["request_id"] in {line["request_id"] for line in requests}


def wait_for_a_turn(folder: Path) -> None:
    """Returns as soon as a turn runs, by the word of the database in `folder`."""
    with closing(apsw.Connection(str(folder / "chatd.db"))) as connection:
        running = "SELECT count(*) FROM turns WHERE status = 'running'"
        for _ in range(200):
            if next(connection.execute(running))[0]:
                return
            time.sleep(0.05)
    raise AssertionError("no turn began")


def transcript(folder: Path, session: str) -> list[tuple[str, str]]:
    """What the database in `folder` holds of a session."""
    with closing(apsw.Connection(str(folder / "chatd.db"))) as connection:
        rows = connection.execute(
            "SELECT role, content FROM conversations WHERE session_id = ? ORDER BY id", (session,)
        )
        return [(str(role), str(content)) for role, content in rows]
