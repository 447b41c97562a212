"""A secret in each place that may hold one, and everything that comes out: it is in none of it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.support import ServerProcess, chatd_command, server_process
from tests.test_workers import eventually

SECRETS = {
    name: f"canary-{name}-4b1d0e8f"
    for name in (
        *("env", "dotenv", "file", "config", "plugin", "metrics"),
        *("body", "bearer", "header", "query", "path", "token", "message"),
    )
}
RAISES = """
import chatd

class Raises:
    async def around(self, turn, proceed):
        key = "%(plugin)s"
        if "raise" in turn.messages[-1].content:
            raise RuntimeError(f"{key} {turn.messages}")
        async for event in proceed(turn):
            yield event

    async def close(self):
        key = "%(plugin)s"
        raise RuntimeError(key)

async def open_raises(settings):
    return Raises()

@chatd.hookimpl
def chatd_register_interceptor(register):
    register.add("raises", open_raises, {"type": "object"}, "raises")
"""
CONFIG = """
server: {port: 0, drain_seconds: 1, metrics_token: %(metrics)s}
plugins: {folder: plugins}
storage: {use: sqlite, path: chatd.db}
providers:
  a: {use: openai_compatible, base_url: "URL", api_key: "${CANARY_ENV}", retries: {base: 0}}
  b: {use: openrouter, base_url: "URL", api_key: "${CANARY_DOTENV}"}
  c: {use: anthropic, base_url: "URL", api_key: "${file:secret}"}
  d: {use: openai_compatible, base_url: "URL", api_key: %(config)s}
  e: {use: echo}
interceptors: [{use: raises}]
models: [{match: "fails", ask: [a, b, c, d]}, {match: "*", ask: [e]}]
"""


class _Quotes(BaseHTTPRequestHandler):
    """A service that refuses, and repeats all that it was sent."""

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        said = json.dumps({"error": {"message": f"bad key: {self.headers} {sent}"}}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def quoting() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Quotes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(url: str, body: object = None, **headers: str) -> str:
    """All of an answer: status, headers and body."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urlopen(request, timeout=20) as answer:
            return f"{answer.status} {answer.headers} {answer.read().decode(errors='replace')}"
    except HTTPError as error:
        with error:
            return f"{error.code} {error.headers} {error.read().decode(errors='replace')}"


class Leaks:
    """Gathers what came out, and looks through it."""

    def __init__(self) -> None:
        self.out: dict[str, str] = {}
        self.secrets = dict(SECRETS)

    def add(self, name: str, text: str) -> None:
        assert text, name
        self.out[name] = text

    def found(self) -> list[tuple[str, str]]:
        return [
            (name, secret)
            for name, text in self.out.items()
            for secret, value in self.secrets.items()
            if value in text
        ]


def configure(folder: Path, url: str) -> dict[str, str]:
    """Writes everything into `folder`, and returns the environment."""
    (folder / "plugins").mkdir()
    (folder / "plugins" / "raises.py").write_text(RAISES % SECRETS)
    (folder / "chatd.yaml").write_text((CONFIG % SECRETS).replace("URL", url))
    (folder / "secret").write_text(SECRETS["file"] + "\n")
    (folder / ".env").write_text(f"CANARY_DOTENV={SECRETS['dotenv']}\n")
    return {"CANARY_ENV": SECRETS["env"]}


def talk(server: ServerProcess, leaks: Leaks, key: str, bot: str) -> None:
    """Asks for everything, with secrets wherever a client may put one."""
    url, s = server.url, SECRETS
    known = {"assistant_id": bot, "api_key": key}
    begun = ask(f"{url}/api/chat/session", known)
    session = json.loads(begun[begun.index('{"session_id"') :])["session_id"]
    chat = {**known, "session_id": session, "type": "message"}
    for text in ("raise", "hi"):
        said = {"messages": [{"role": "user", "content": f"{text} {s['message']}"}]}
        leaks.add(f"chat {text}", ask(f"{url}/api/chat", {**chat, **said}))
        leaks.add(f"stream {text}", ask(f"{url}/api/chat", {**chat, **said, "stream": True}))
    leaks.add("body", ask(f"{url}/api/chat", {**chat, "api_key": s["body"], "messages": [{}]}))
    leaks.add("wrong key", ask(f"{url}/api/chat/session", {**known, "api_key": s["body"]}))
    leaks.add("bearer", ask(f"{url}/v1/models", Authorization=f"Bearer {s['bearer']}"))
    leaks.add("header", ask(f"{url}/api/chat/turns/x", **{"X-API-Key": s["header"]}))
    leaks.add("query", ask(f"{url}/readyz?api_key={s['query']}"))
    leaks.add("path", ask(f"{url}/{s['path']}?key={s['query']}"))
    leaks.add("no json", ask(f"{url}/api/chat", s["body"]))
    widget = {"chatbot_id": bot, "user_token": s["token"]}
    leaks.add("visitor", ask(f"{url}/api/chat/widget/session", widget))
    leaks.add("metrics, wrong", ask(f"{url}/metrics", Authorization=f"Bearer {s['bearer']}"))
    leaks.add("metrics", ask(f"{url}/metrics", Authorization=f"Bearer {s['metrics']}"))
    assert "chatd_turns_total{" in leaks.out["metrics"]
    for page in ("docs", "openapi.json", "widget.js", f"demo/{bot}"):
        leaks.add(page, ask(f"{url}/{page}"))


def test_no_secret_comes_out_of_a_server_its_pages_its_metrics_or_its_commands(
    tmp_path: Path,
) -> None:
    leaks = Leaks()
    with quoting() as service:
        env = configure(tmp_path, service)

        def command(*arguments: str) -> str:
            done = chatd_command(*arguments, cwd=tmp_path, env=env)
            return f"{done.returncode} {done.stdout} {done.stderr}"

        made = chatd_command(
            *("bots", "add", "--name", "Bot", "--model", "fails", "--json"), cwd=tmp_path, env=env
        )
        bot = json.loads(made.stdout)
        leaks.secrets["api key"] = bot["api_key"]
        shown = chatd_command("bots", "identity-secret", "Bot", cwd=tmp_path, env=env)
        leaks.secrets["identity"] = shown.stdout.split()[-1]
        with server_process(tmp_path, env=env) as server:
            talk(server, leaks, bot["api_key"], bot["id"])
            good = (tmp_path / "chatd.yaml").read_text()
            (tmp_path / "chatd.yaml").write_text(good.replace("api_key: c", "api_kee: c"))
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda: "stays as it was" in server.stdout)
            leaks.add("check, bad", command("check"))
            (tmp_path / "chatd.yaml").write_text(good)
            commands = ("check --online", "doctor", "bots show Bot --json")
            with ThreadPoolExecutor(3) as pool:
                outs = pool.map(lambda line: command(*line.split()), commands)
                for line, out in zip(commands, outs, strict=True):
                    leaks.add(line, out)
            assert server.stop() == 0
        leaks.add("stdout", server.stdout)
        leaks.add("stderr", server.stderr)
    # The keys were on their way, and what was raised is in the log.
    assert "provider d failed" in server.stdout and "RuntimeError" in server.stdout
    assert leaks.found() == []


PASSWORD = "canary-password-4b1d0e8f"
REMOTE = {
    "supabase": {"url": "http://127.0.0.1:9", "rest_path": "", "key": PASSWORD},
    "postgres": {"url": f"postgresql://chatd:{PASSWORD}@127.0.0.1:9/chatd"},
}


@pytest.mark.parametrize("plugin", sorted(REMOTE))
def test_no_secret_of_a_storage_comes_out_when_it_cannot_be_reached(
    tmp_path: Path, plugin: str
) -> None:
    use = json.dumps({"use": plugin, **REMOTE[plugin]})
    (tmp_path / "chatd.yaml").write_text(
        f"storage: {use}\nproviders: {{a: {{use: echo}}}}\nmodels: [{{match: '*', ask: [a]}}]\n"
    )
    with ThreadPoolExecutor(2) as pool:
        lines = ("check --online", "doctor")
        outs = list(pool.map(lambda line: chatd_command(*line.split(), cwd=tmp_path), lines))
    with server_process(tmp_path, "--port", "0") as server:
        eventually(lambda: "chatd serves" in server.stderr or server.process.poll() is not None)
        if server.process.poll() is None:
            assert ask(f"{server.url}/readyz").startswith("503 ")
            assert server.stop() == 0
    texts = [f"{out.stdout} {out.stderr}" for out in outs] + [server.stdout, server.stderr]
    assert any("127.0.0.1" in text for text in texts)
    assert [text for text in texts if PASSWORD in text] == []
