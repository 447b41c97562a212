"""Many open streams: the gap between their events, and what they take of the server.

The mock sends tokens at the rate asked for, and a process of its own reads every stream (this module,
run as a program with a job on stdin). A server is started anew for each round, since memory that was
freed stays with a process. Gaps count once every stream is open, and hold the delays of the reader and
the mock, which is read without a server between in each round too: what is late then is theirs.
"""

from __future__ import annotations

import json
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import subjects, wording
from bench.fill import fill
from bench.load import ROOT
from bench.processes import cpu_seconds, pinned, resident
from bench.subjects import Mock, Subject
from bench.targets import Samples

OPENING = 50
"""How many streams are opened at once."""
START_SECONDS = 60
"""How long all streams may take to be open."""


@dataclass(frozen=True)
class Streams:
    """How many, at how many tokens a second each, and for how long they are watched."""

    count: int = 1000
    rate: float = 20
    seconds: float = 10
    rounds: int = 3


class Reader:
    """Opens streams and reads them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._epoll = select.epoll()
        self._left = list(job["requests"])
        self._streams: dict[int, socket.socket] = {}
        self._last: dict[int, float] = {}
        self._gaps: list[float] = []
        self._tokens = 0
        self._token = wording.NEXT_TOKEN.encode()

    def run(self) -> dict[str, Any]:
        """Opens all, watches them, and says what was seen; times are in seconds."""
        pids = self._job["pids"]
        idle, began = resident(pids), time.perf_counter()
        while self._left or len(self._last) < len(self._streams):
            if time.perf_counter() > began + START_SECONDS:
                raise SystemExit(f"only {len(self._last)} streams are open")
            while self._left and len(self._streams) - len(self._last) < OPENING:
                self._open(self._left.pop())
            self._take()
        self._gaps.clear()
        self._tokens = 0
        cpu, load, start = cpu_seconds(pids), self._load_seconds(), time.perf_counter()
        while time.perf_counter() < start + self._job["seconds"]:
            self._take()
        passed = time.perf_counter() - start
        cuts = statistics.quantiles(self._gaps, n=100)
        return {
            "gap": cuts[98] * 1e3,
            "events": self._tokens / passed,
            "stream_cpu": (cpu_seconds(pids) - cpu) / passed * 100,
            "stream_memory": (resident(pids) - idle) * 1024 / len(self._streams),
            "load_cpu": (self._load_seconds() - load) / passed * 100,
        }

    def _load_seconds(self) -> float:
        """CPU seconds of what is not measured: the mock, and this reader."""
        return cpu_seconds(self._job["mock"]) + time.process_time()

    def _open(self, request: str) -> None:
        stream = socket.create_connection(("127.0.0.1", self._job["port"]), timeout=10)
        stream.sendall(request.encode("latin-1"))
        stream.setblocking(False)
        self._streams[stream.fileno()] = stream
        self._epoll.register(stream.fileno(), select.EPOLLIN)

    def _take(self) -> None:
        for number, _ in self._epoll.poll(0.1):
            data = self._streams[number].recv(1 << 16)
            if number not in self._last and data.startswith(b"HTTP/1.1 "):
                check_head(data)
            if not data or b"[DONE]" in data or b'"error"' in data:
                raise SystemExit(f"a stream ended too early: {data[-500:]!r}")
            if self._token in data:
                now = time.perf_counter()
                self._tokens += data.count(self._token)
                if number in self._last:
                    self._gaps.append(now - self._last[number])
                self._last[number] = now


def check_head(data: bytes) -> None:
    """Ends the measuring when a stream is refused."""
    if not data.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"a stream is refused: {data[:1000]!r}")


def read(subject: Subject, mock: Mock, plan: Streams, cores: frozenset[int]) -> dict[str, float]:
    """What a process on these cores sees of the streams of a server, or of the mock itself.

    A server that does not keep up with them all has `failed`.
    """
    requests = [request.decode("latin-1") for request in subject.streamed[: plan.count]]
    job = {"port": subject.port, "requests": requests, "seconds": plan.seconds}
    with pinned(cores):
        done = subprocess.run(
            [sys.executable, "-m", "bench.streams"],
            cwd=ROOT,
            input=json.dumps({**job, "pids": subject.pids(), "mock": mock.pids()}).encode(),
            stdout=subprocess.PIPE,
            timeout=START_SECONDS + plan.seconds + 30,
            check=False,
        )
    if done.returncode:
        print(f"{subject.title} does not keep up with {plan.count} streams", file=sys.stderr)
        return {"failed": 1}
    found: dict[str, float] = json.loads(done.stdout)
    if found["events"] < 0.9 * plan.count * plan.rate:
        events = f"{found['events']:.0f} of {plan.count * plan.rate:.0f} events"
        print(f"{subject.title} sends {events} a second", file=sys.stderr)
        found["failed"] = 1
    return found


def paced_mock(folder: Path, plan: Streams) -> Mock:
    """A mock whose replies last longer than the streams are watched."""
    tokens = int(plan.rate * (START_SECONDS + plan.seconds + 10))
    return Mock(folder, "--interval", str(1 / plan.rate), "--tokens", str(tokens))


def subjects_of(folder: Path, count: int) -> Sequence[Subject]:
    """The limit and chatd on SQLite, with a session for each stream."""
    proxy = subjects.limit(folder / "limit")
    proxy.streamed = [wording.chat("-", stream=True)] * count
    own = folder / "sqlite"
    own.mkdir(parents=True)
    sessions = fill(own / "chatd.db", [wording.BOT], count, wording.HISTORY)
    return [
        proxy,
        subjects.chatd("sqlite", own, {"use": "sqlite", "path": "chatd.db"}, sessions),
    ]


def _keep(found: dict[str, float], samples: dict[str, list[float]]) -> None:
    for name, value in found.items():
        samples[name].append(value)


def measure(
    folder: Path, plan: Streams, samples: Samples, cores: tuple[frozenset[int], frozenset[int]]
) -> None:
    """Measures each subject in turn, round after round."""
    mock = paced_mock(folder / "mock", plan)
    mock.streamed = [wording.chat("-", stream=True)] * plan.count
    mock.start("", cores[1])
    try:
        chosen = subjects_of(folder, plan.count)
        for _ in range(plan.rounds):
            _keep(read(mock, mock, plan, cores[1]), samples["mock"])
            for subject in chosen:
                subject.start(mock.url, cores[0])
                try:
                    _keep(read(subject, mock, plan, cores[1]), samples[subject.name])
                finally:
                    subject.close()
    finally:
        mock.close()


if __name__ == "__main__":
    print(json.dumps(Reader(json.load(sys.stdin)).run()))
