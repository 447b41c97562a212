"""Time to the first token with a dead first provider, before and after its breaker opens.

`python -m bench --only failover` starts `chatd serve` once for each way to be dead, all of it on
loopback, and takes about a minute. The provider that answers in place of the dead one is an echo, so
that what is measured is the failing over alone. Retries are those of the defaults (3 requests with
pauses of up to 0.5 and 1 s); the breaker is set to open after as many turns as are measured before.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tornado.testing import bind_unused_port

from bench.rounds import percentile
from bench.wording import BOT, KEY, http
from chatd.testing.fake_provider import FakeProvider, Hold, Step, http_response
from tests.support import ServerProcess, chatd_command

TURNS = 20
"""Turns before the breaker opens, and as many after."""
FIRST_TOKEN_SECONDS = 1
"""How long a provider that is silent is waited for."""
CONFIG = """
storage: {use: sqlite, path: chatd.db}
log_level: error
providers:
  dead:
    use: openai_compatible
    base_url: "%s/v1"
    timeouts: {first_token: %s}
    breaker: {requests: %s, window: 300, open_seconds: 600}
  echo: {use: echo}
models:
  - {match: "*", ask: [dead, echo]}
"""


@dataclass(frozen=True)
class Dead:
    """A way to be dead, and how many requests a turn wastes on it."""

    name: str
    steps: tuple[Step, ...] | None
    requests: int


WAYS = (
    Dead("refuses connections", None, 3),
    Dead("answers with 503", (http_response(503, b""),), 3),
    # What took its time is not asked again.
    Dead("never answers", (Hold(),), 1),
)


async def request(
    host: str, port: int, path: str, body: object
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Posts, and reads the head of the answer, which must be a good one."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(http("POST", path, body, close=True))
    status = await reader.readuntil(b"\r\n\r\n")
    if not status.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"{path} is answered with {status!r}{await reader.read(500)!r}")
    return reader, writer


async def first_token(host: str, port: int, session: str) -> float:
    """Seconds from a turn's request to its first token; the turn is read to its end."""
    said = [{"role": "user", "content": "Hi"}]
    body = {"api_key": KEY, "assistant_id": BOT, "session_id": session, "type": "m"}
    began = time.perf_counter()
    reader, writer = await request(
        host, port, "/api/chat", {**body, "messages": said, "stream": True}
    )
    passed = 0.0
    read = b""
    while data := await reader.read(65536):
        read += data
        if not passed and b'"text-delta"' in read:
            passed = time.perf_counter() - began
    writer.close()
    if not passed or b'"type":"error"' in read:
        raise SystemExit(f"a turn was not answered: {read[-500:]!r}")
    return passed


async def turns(url: str, count: int) -> list[float]:
    """The times of so many turns, one after the other, in a session of their own."""
    host, port = "127.0.0.1", urlsplit(url).port or 80
    known = {"api_key": KEY, "assistant_id": BOT}
    reader, writer = await request(host, port, "/api/chat/session", known)
    session = json.loads(await reader.read())["session_id"]
    writer.close()
    return [await first_token(host, port, session) for _ in range(count)]


async def measured(dead: Dead, folder: Path) -> list[str]:
    """Measures one way to be dead; a line of the table."""
    async with FakeProvider() as fake:
        url = fake.url
        if dead.steps is None:
            socket, port = bind_unused_port()
            socket.close()
            url = f"http://127.0.0.1:{port}"
        else:
            fake.always(*dead.steps)
        config = CONFIG % (url, FIRST_TOKEN_SECONDS, TURNS * dead.requests)
        (folder / "chatd.yaml").write_text(config)
        with await asyncio.to_thread(ServerProcess, folder) as server:
            address = await asyncio.to_thread(lambda: server.url)
            before = await turns(address, TURNS)
            if "is left alone" not in server.stdout:
                raise SystemExit(f"the breaker did not open: {server.stdout}")
            asked = len(fake.requests)
            after = await turns(address, TURNS)
            if len(fake.requests) != asked:
                raise SystemExit("an open breaker let a request through")
    times = [percentile(times, n) * 1000 for times in (before, after) for n in (50, 95)]
    saved = statistics.median(before) / statistics.median(after)
    return [dead.name, *(f"{ms:.1f}" for ms in times), f"{saved:.0f}x"]


def measure(folder: Path) -> list[list[str]]:
    """Measures each way to be dead, and makes a table of milliseconds to the first token."""
    columns = ("p50 before", "p95 before", "p50 after", "p95 after", "p50")
    table = [["ms to the first token, when the first provider", *columns]]
    for number, dead in enumerate(WAYS):
        own = folder / str(number)
        own.mkdir(parents=True)
        arguments = ("bots", "add", "--id", BOT, "--api-key", KEY, "--name", "Bench")
        (own / "chatd.yaml").write_text(CONFIG % ("http://127.0.0.1:9", FIRST_TOKEN_SECONDS, 1))
        added = chatd_command(*arguments, cwd=own)
        if added.returncode:
            raise SystemExit(added.stderr)
        table.append(asyncio.run(asyncio.wait_for(measured(dead, own), 300)))
    return table
