"""Time to the first token with a dead first provider, before and after its breaker opens.

`.venv/bin/python -m bench.failover` starts `chatd serve` once for each way to be dead, all of it on
loopback, and takes about a minute. The provider that answers in place of the dead one is an echo, so
that what is measured is the failing over alone. Retries are those of the defaults (3 requests with
pauses of up to 0.5 and 1 s); the breaker is set to open after as many turns as are measured before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tornado.testing import bind_unused_port

from bench.streams import BOT, KEY, request
from chatd.testing.fake_provider import FakeProvider, Hold, Step, http_response
from tests.support import ServerProcess, chatd_command

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


async def measure(dead: Dead, folder: Path, count: int, timeout: float) -> None:
    """Measures one way to be dead, and prints its line."""
    async with FakeProvider() as fake:
        url = fake.url
        if dead.steps is None:
            socket, port = bind_unused_port()
            socket.close()
            url = f"http://127.0.0.1:{port}"
        else:
            fake.always(*dead.steps)
        config = CONFIG % (url, timeout, count * dead.requests)
        (folder / "chatd.yaml").write_text(config)
        with await asyncio.to_thread(ServerProcess, folder) as server:
            address = await asyncio.to_thread(lambda: server.url)
            before = await turns(address, count)
            if "is left alone" not in server.stdout:
                raise SystemExit(f"the breaker did not open: {server.stdout}")
            asked = len(fake.requests)
            after = await turns(address, count)
            if len(fake.requests) != asked:
                raise SystemExit("an open breaker let a request through")
    times = [quantile(times, n) * 1000 for times in (before, after) for n in (50, 95)]
    saved = statistics.median(before) / statistics.median(after)
    print(f"{dead.name:<20}" + "".join(f"{ms:>12.1f}" for ms in times) + f"{saved:>9.0f}x")


def quantile(times: list[float], percent: int) -> float:
    """The time that so many of 100 are within."""
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


async def measure_all(folder: Path, count: int, timeout: float) -> None:
    """Measures each way to be dead, and prints a table."""
    print(f"ms to the first token, {count} turns before the breaker opens and {count} after")
    columns = ("p50 before", "p95 before", "p50 after", "p95 after")
    print(f"{'the first provider':<20}" + "".join(f"{name:>12}" for name in columns) + "     p50")
    for number, dead in enumerate(WAYS):
        own = folder / str(number)
        own.mkdir()
        arguments = ("bots", "add", "--id", BOT, "--api-key", KEY, "--name", "Bench")
        (own / "chatd.yaml").write_text(CONFIG % ("http://127.0.0.1:9", timeout, 1))
        added = await asyncio.to_thread(chatd_command, *arguments, cwd=own)
        if added.returncode:
            raise SystemExit(added.stderr)
        await measure(dead, own, count, timeout)


def main() -> None:
    """Reads the options and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--turns", type=int, default=20, help="turns before, and as many after")
    parser.add_argument(
        "--first-token", type=float, default=1, help="seconds that one that is silent is waited for"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = measure_all(Path(folder), options.turns, options.first_token)
        asyncio.run(asyncio.wait_for(work, 600))


if __name__ == "__main__":
    main()
