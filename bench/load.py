"""Asks a server over raw sockets, in a process of its own, and times the answers.

`run` starts this module as a process with a job on stdin and reads what came of it. Each connection
asks its own request again and again: one after the other, or when a clock says so. An answer that is
no 200 or does not hold the expected text ends the measuring.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import re
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.processes import cpu_seconds, pinned, resident

ROOT = Path(__file__).parent.parent
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
STUCK_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """What to ask.

    :param least: the answers that are waited for beyond the time, of servers that are slow; the
        warm-up waits for one on each connection.
    :param rate: requests a second at times that are random and the same in every run; 0 asks again
        as soon as an answer came.
    :param first: what the time to is measured beside the time to the end.
    :param pids: the server, whose CPU and memory are read when the measuring begins and ends.
    """

    port: int
    requests: Sequence[bytes]
    expect: bytes
    seconds: float
    warm: float = 0.3
    least: int = 0
    rate: float = 0
    first: bytes = b""
    pids: Sequence[int] = ()


@dataclass
class Result:
    """What came of a job, all times in seconds, without the warm-up."""

    turns: int = 0
    seconds: float = 0
    cpu: float = 0
    own_cpu: float = 0
    memory: float = 0
    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.turns / self.seconds

    @property
    def cpu_each(self) -> float:
        """CPU seconds of the server for each answer."""
        return self.cpu / max(1, self.turns)


class Connection:
    """A connection that asks one request at a time."""

    __slots__ = ("again", "busy", "due", "first", "request", "socket", "unread")

    def __init__(self, port: int, request: bytes) -> None:
        self.request = request
        self.first = self.due = 0.0
        self.busy = False
        self.open(port)

    def open(self, port: int) -> None:
        """Connects, anew after the server hung up."""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.unread = b""
        self.again = False

    def ask(self, due: float) -> None:
        """Sends the request, whose time counts from when it was due."""
        self.due, self.first, self.busy = due, 0.0, True
        # When the server just closed the connection, reading tells so.
        with suppress(ConnectionError):
            self.socket.sendall(self.request)

    def read(self, first: bytes) -> bytes | None:
        """The answer, once it is whole.

        :raises ConnectionResetError: when the server closed a connection that had an answer before,
            and said nothing to this request: it was idle for too long, and can be opened anew.
        """
        data = b""
        with suppress(ConnectionError):
            data = self.socket.recv(1 << 20)
        if not data and self.again and not self.unread:
            raise ConnectionResetError
        if not data:
            raise SystemExit(f"the server hung up: {self.unread[:500]!r}")
        self.unread = data = self.unread + data if self.unread else data
        if first and not self.first and first in data:
            self.first = time.perf_counter()
        if not is_whole(data):
            return None
        self.unread, self.busy, self.again = b"", False, True
        return data


def is_whole(data: bytes) -> bool:
    """Whether an HTTP answer is complete, by its length or its last chunk."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return False
    if length := LENGTH.search(data, 0, head + 2):
        return len(data) >= head + 4 + int(length[1])
    return data.endswith(b"\r\n0\r\n\r\n")


class Load:
    """Runs one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        for request in job.requests:
            self._watch(Connection(job.port, request))
        self._free = deque(self._connections.values())
        self.result = Result()
        self._since = float("inf")
        self._answered = 0

    def _watch(self, connection: Connection) -> None:
        self._connections[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket.fileno(), select.EPOLLIN)

    def _reopen(self, connection: Connection) -> None:
        """Servers close connections that were idle for a while, some as a request is on its way."""
        self._epoll.unregister(connection.socket.fileno())
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        connection.open(self._job.port)
        self._watch(connection)
        if connection.busy:
            connection.ask(connection.due)

    def run(self) -> Result:
        """Warms up, measures, and waits for the answers that are still to come."""
        begin = time.perf_counter()
        self._until(begin + self._job.warm, begin, self._job.least and len(self._connections))
        self._answered = 0
        cpu, own = cpu_seconds(self._job.pids), time.process_time()
        self._since = start = time.perf_counter()
        self._until(start + self._job.seconds, start, self._job.least)
        self.result.seconds = time.perf_counter() - start
        self.result.cpu = cpu_seconds(self._job.pids) - cpu
        self.result.own_cpu = time.process_time() - own
        self.result.memory = resident(self._job.pids)
        turns = self.result.turns
        self._drain()
        if not self._job.rate:
            # What came after the end is no part of the rate.
            self.result.turns = turns
            del self.result.times[turns:]
        return self.result

    def _until(self, end: float, start: float, least: int) -> None:
        if self._job.rate:
            self._on_time(end, start)
            return
        while (now := time.perf_counter()) < end or (
            self._answered < least and now < end + STUCK_SECONDS
        ):
            while self._free:
                self._free.popleft().ask(now)
            self._take(min(1.0, max(0.01, end - now)))

    def _on_time(self, end: float, start: float) -> None:
        """Asks when the clock says so, and late when every connection is in use."""
        clock = random.Random(7)
        due, waiting = start, deque[float]()
        while (now := time.perf_counter()) < end:
            while due <= now:
                # A server has no part in it when the load itself woke late.
                waiting.append(now if len(self._free) > len(waiting) else due)
                due += clock.expovariate(self._job.rate)
            while waiting and self._free:
                self._free.popleft().ask(waiting.popleft())
            # epoll counts in milliseconds, select in microseconds.
            select.select([self._epoll], [], [], max(0.0, min(due, end) - time.perf_counter()))
            self._take(0)

    def _drain(self) -> None:
        end = time.perf_counter() + STUCK_SECONDS
        while len(self._free) < len(self._connections):
            if time.perf_counter() > end:
                raise SystemExit("answers do not come")
            self._take(1)

    def _take(self, timeout: float) -> None:
        for number, _ in self._epoll.poll(timeout):
            connection = self._connections[number]
            if not connection.busy:
                self._reopen(connection)
                continue
            try:
                answer = connection.read(self._job.first)
            except ConnectionResetError:
                self._reopen(connection)
                continue
            if answer is not None:
                self._ended(connection, answer)

    def _ended(self, connection: Connection, answer: bytes) -> None:
        now = time.perf_counter()
        if answer[9:12] != b"200" or self._job.expect not in answer:
            raise SystemExit(f"a wrong answer: {answer[:1000]!r}")
        self._free.append(connection)
        self._answered += 1
        if connection.due >= self._since or (not self._job.rate and now >= self._since):
            self.result.turns += 1
            self.result.times.append(now - connection.due)
            if connection.first:
                self.result.firsts.append(connection.first - connection.due)


def run(job: Job, cores: frozenset[int]) -> Result:
    """Runs a job in a process on these cores."""
    value = dataclasses.asdict(job)
    value |= {name: _text(value[name]) for name in ("expect", "first")}
    value["requests"] = [_text(request) for request in job.requests]
    with pinned(cores):
        done = subprocess.run(
            [sys.executable, "-m", "bench.load"],
            cwd=ROOT,
            input=json.dumps(value).encode(),
            stdout=subprocess.PIPE,
            timeout=job.warm + job.seconds + 4 * STUCK_SECONDS,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"the load on port {job.port} failed")
    return Result(**json.loads(done.stdout))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> None:
    """Runs the job on stdin."""
    value = json.load(sys.stdin)
    value |= {name: base64.b64decode(value[name]) for name in ("expect", "first")}
    value["requests"] = [base64.b64decode(request) for request in value["requests"]]
    print(json.dumps(dataclasses.asdict(Load(Job(**value)).run())))


if __name__ == "__main__":
    main()
