"""Processes that are measured: starting them on their cores, and what they take of the machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.postgres import children

_TICKS = os.sysconf("SC_CLK_TCK")
_ALL_THREADS = 2
_PAGE = os.sysconf("SC_PAGE_SIZE")
START_SECONDS = 180
"""How long a server may take to answer: some import a lot."""


@contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """What is started in the `with` runs on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def split_cores() -> tuple[frozenset[int], frozenset[int]]:
    """The core of the server that is measured, and those of the load and the mock."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("The bench needs two cores: one for the server, one for what asks it.")
    return frozenset(cores[:1]), frozenset(cores[1:])


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    return [pid, *(each for child in children(pid) for each in tree(child))]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (proc(5)); none once the process ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds of processes, and to 10 ms those of their children that ended."""
    return sum(_cpu_clock(pid) + sum(map(int, _stat(pid)[13:15])) / _TICKS for pid in pids)


def _cpu_clock(pid: int) -> float:
    """What clock_getcpuclockid(3) tells of, which Python has for threads alone; 0 once it ended."""
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | _ALL_THREADS)
    return 0


def resident(pids: Sequence[int]) -> float:
    """MiB in memory, what they share counted for each."""
    return sum(int(stat[21]) for pid in pids if (stat := _stat(pid))) * _PAGE / 2**20


class Process:
    """A process in a folder of its own, with all that it starts.

    :param cores: on which it runs; None is all of them.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        cores: frozenset[int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._command = " ".join(command)
        self.log = folder / "log"
        self.began = time.perf_counter()
        with self.log.open("wb") as log, pinned(cores or frozenset(os.sched_getaffinity(0))):
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def answers(self, port: int, request: bytes) -> float:
        """Seconds from its start to its first answer with status 200."""
        while (passed := time.perf_counter() - self.began) < START_SECONDS:
            if self._process.poll() is not None:
                break
            if _ask(port, request):
                return time.perf_counter() - self.began
            time.sleep(0.002 if passed < 2 else 0.02)
        raise SystemExit(f"{self._command} does not answer: {self.tail()}")

    def first_line(self) -> str:
        """What it printed first, once it did."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            line, newline, _ = self.log.read_text().partition("\n")
            if newline:
                return line
            time.sleep(0.01)
        raise SystemExit(f"{self._command} did not start: {self.tail()}")

    def tail(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-2000:]

    def close(self) -> None:
        """Ends it and what it started, at once. A second call does nothing."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(10)


def _ask(port: int, request: bytes) -> bool:
    """Whether a request is answered with status 200."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(request)
        return client.recv(64).split(b" ", 2)[1:2] == [b"200"]
    return False
