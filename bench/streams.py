"""The gap between events, memory and CPU of a server with many open streams.

`.venv/bin/python -m bench.streams` starts `chatd serve` with SQLite and an echo that answers at
the rate asked for, opens the streams from this process and reads them. All of it is on loopback.
Gaps count once every stream is open; "late" is by how much a gap is over what the rate gives, and
holds the delays of this process too, whose own are shown as "reader".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.support import ServerProcess, chatd_command

KEY = "bench-key-0123456789abcdef"
BOT = "6f1f5b52-7a44-4f0e-9a57-0c3f8d0f2b11"
CONFIG = """
server: {max_connections: 20000, max_connections_per_address: 20000}
storage: {use: sqlite, path: chatd.db}
log_level: warning
providers:
  main: {use: echo, reply: "%s", word_seconds: %s}
models:
  - {match: "*", ask: [main]}
"""
OPENING = 50
"""How many streams are opened at once."""


@dataclass
class Measured:
    """What was seen of all the streams."""

    opened: int = 0
    ended: int = 0
    events: int = 0
    gaps: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    counting: bool = False


def usage(pid: int) -> tuple[float, float]:
    """CPU seconds and resident MiB of a process."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    return (int(stat[11]) + int(stat[12])) / ticks, int(stat[21]) * page / 2**20


async def request(
    host: str, port: int, path: str, body: object
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Posts, and reads the head of the answer, which must be a good one."""
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    status = await reader.readuntil(b"\r\n\r\n")
    if not status.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"{path} is answered with {status!r}{await reader.read(500)!r}")
    return reader, writer


async def stream(host: str, port: int, gate: asyncio.Semaphore, measured: Measured) -> None:
    """Opens one stream in a session of its own, and reads it to its end."""
    known = {"api_key": KEY, "assistant_id": BOT}
    async with gate:
        reader, writer = await request(host, port, "/api/chat/session", known)
        session = json.loads(await reader.read())["session_id"]
        writer.close()
        said = [{"role": "user", "content": "Hi"}]
        body = {**known, "session_id": session, "type": "m", "messages": said, "stream": True}
        reader, writer = await request(host, port, "/api/chat", body)
    measured.opened += 1
    last = 0.0
    while data := await reader.read(65536):
        if b'"text-delta"' not in data:
            continue
        now = time.perf_counter()
        if measured.counting:
            measured.events += data.count(b'"text-delta"')
            if last:
                measured.gaps.append(now - last)
        last = now
    measured.ended += 1
    writer.close()


async def own_delays(measured: Measured) -> None:
    """By how much this process itself is late."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.05)
        if measured.counting:
            measured.delays.append(time.perf_counter() - before - 0.05)


async def measure(url: str, pid: int, streams: int, rate: float, seconds: float) -> None:
    """Reads the streams for so long, and prints what came of it."""
    address = urlsplit(url)
    host, port = "127.0.0.1", address.port or 80
    measured, gate = Measured(), asyncio.Semaphore(OPENING)
    idle = usage(pid)[1]
    began = time.perf_counter()
    tasks = [asyncio.create_task(stream(host, port, gate, measured)) for _ in range(streams)]
    watch = asyncio.create_task(own_delays(measured))
    while measured.opened < streams:
        await asyncio.sleep(0.05)
        for task in tasks:
            if task.done():
                task.result()
    opening = time.perf_counter() - began
    measured.counting = True
    cpu, own, start = usage(pid)[0], time.process_time(), time.perf_counter()
    most = 0.0
    while (passed := time.perf_counter() - start) < seconds:
        await asyncio.sleep(min(0.5, seconds - passed))
        most = max(most, usage(pid)[1])
    measured.counting = False
    passed = time.perf_counter() - start
    share, reader = (usage(pid)[0] - cpu) / passed, (time.process_time() - own) / passed
    ended = measured.ended
    for task in (*tasks, watch):
        task.cancel()
    await asyncio.gather(*tasks, watch, return_exceptions=True)
    cuts = statistics.quantiles(measured.gaps, n=1000)
    lag = statistics.quantiles(measured.delays, n=100)[98]
    print(f"{streams} streams at {rate:g} words/s for {passed:.1f} s; opened in {opening:.1f} s")
    print(f"events/s     {measured.events / passed:>8.0f} of {streams * rate:.0f} asked for")
    print(f"gap p50      {cuts[499] * 1000:>8.1f} ms")
    print(f"gap p99      {cuts[989] * 1000:>8.1f} ms")
    print(f"gap p99.9    {cuts[998] * 1000:>8.1f} ms, most {max(measured.gaps) * 1000:.1f} ms")
    print(f"server RSS   {most:>8.1f} MiB, {idle:.1f} when idle")
    each = share * passed / max(1, measured.events) * 1e6
    print(f"server CPU   {share:>8.0%} of one core, {each:.0f} us an event")
    print(f"reader CPU   {reader:>8.0%} of one core, late by {lag * 1000:.1f} ms at p99")
    if ended:
        print(f"{ended} streams ended before they were to: open them faster or read for longer")


def main() -> None:
    """Reads the options and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20, help="words a second in each stream")
    parser.add_argument("--seconds", type=float, default=10, help="how long to measure")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(2 * options.streams + 500, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    words = int(options.rate * (options.seconds + 15 + options.streams / 50))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = CONFIG % (" ".join(["word"] * words), 1 / options.rate)
        (folder / "chatd.yaml").write_text(config)
        added = chatd_command(
            *("bots", "add", "--id", BOT, "--api-key", KEY, "--name", "Bench"), cwd=folder
        )
        if added.returncode:
            raise SystemExit(added.stderr)
        with ServerProcess(folder) as server:
            pid = server.process.pid
            work = measure(server.url, pid, options.streams, options.rate, options.seconds)
            asyncio.run(asyncio.wait_for(work, 60))


if __name__ == "__main__":
    main()
