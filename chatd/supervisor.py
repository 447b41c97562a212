"""Several processes on one port: started, watched, started again, and stopped together."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from chatd import logs
from chatd.config import Config
from chatd.registry import Registry
from chatd.reload import Load, read_again
from chatd.server import BLOCKED, Terminal, Worker

log = logging.getLogger(__name__)

STEADY_SECONDS = 10.0
"""A worker that lived as long is started again at once; one that did not, after a pause."""

FIRST_PAUSE = 0.5
MOST_PAUSE = 30.0
"""Seconds before a worker that died soon is started again: they double each time that it does."""

KILL_SECONDS = 20.0
"""How long workers may take to end beyond what running turns have."""

Run = Callable[[Config, Registry, Worker, Callable[[], None]], int]
"""Serves in a process of its own until it is told to stop, calls the last when it does serve, and
returns the exit code."""


@dataclass(slots=True)
class _Place:
    """A worker's place, and who is in it."""

    number: int
    pid: int | None = None
    started: float = 0.0
    short_lives: int = 0
    due: float = 0.0

    def left(self, now: float) -> float:
        """Its worker died: how many seconds until the next one is started."""
        self.pid = None
        lived = now - self.started
        self.short_lives = 0 if lived >= STEADY_SECONDS else self.short_lives + 1
        pause = FIRST_PAUSE * 2.0 ** min(self.short_lives - 1, 16) if self.short_lives else 0.0
        self.due = now + min(pause, MOST_PAUSE)
        return self.due - now


class Supervisor:
    """Runs as many workers as are configured on sockets that it holds, and outlives each of them.

    They are forked from this process, which opens nothing, runs no event loop and has no threads.
    They share the sockets, so that what waits there for one that dies is answered by the others.
    """

    def __init__(
        self, config: Config, registry: Registry, sockets: Sequence[socket], run: Run, load: Load
    ) -> None:
        self._config = config
        self._registry = registry
        self._sockets = sockets
        self._run = run
        self._load = load
        self._places = [_Place(number + 1) for number in range(config.server.workers)]
        self._terminal = Terminal()
        self._stop_by: float | None = None
        self._is_up = False
        self._code = 0
        self._lifeline, self._life = os.pipe()
        self._ready, self._tell_ready = os.pipe()
        self._wake, self._woken = os.pipe()
        self._folder = Path(tempfile.mkdtemp(prefix="chatd-"))

    def run(self) -> int:
        """Supervises until SIGTERM or SIGINT, and returns the exit code."""
        if self._config.shared is None or self._config.shared.name == "memory":
            log.warning(
                "%s workers: limits are counted by each of them on its own, so that up to %s times "
                "as much is let through, unless they share a place to count in",
                len(self._places),
                len(self._places),
            )
        with self._catching():
            self._start(self._places[0])
            while self._stop_by is None or any(place.pid for place in self._places):
                self._step()
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._code

    @contextmanager
    def _catching(self) -> Iterator[None]:
        """Signals are read from a pipe, one byte each, so that none comes at the wrong moment."""
        for end in (self._wake, self._woken, self._ready):
            os.set_blocking(end, False)
        for number in BLOCKED:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)

    def _step(self) -> None:
        """Waits for whatever is next, and sees to it."""
        readable, _, _ = select.select([self._wake, self._ready], [], [], self._patience())
        if self._ready in readable:
            os.read(self._ready, 4096)
            self._is_up = True
        if self._wake in readable:
            for number in os.read(self._wake, 4096):
                self._caught(number)
        self._bury()
        now = time.monotonic()
        if self._stop_by is None:
            for place in self._places if self._is_up else ():
                if place.pid is None and place.due <= now:
                    self._start(place)
        elif now > self._stop_by:
            self._send(signal.SIGKILL)

    def _patience(self) -> float | None:
        """How long nothing is to do unless something happens; None is for ever."""
        now = time.monotonic()
        if self._stop_by is not None:
            return max(0.1, self._stop_by - now)
        dues = [place.due for place in self._places if place.pid is None and self._is_up]
        return max(0.0, min(dues) - now) if dues else None

    def _caught(self, number: int) -> None:
        hung_up = number == signal.SIGHUP
        if number in (signal.SIGTERM, signal.SIGINT) or (hung_up and self._terminal.is_gone):
            self._stop(0)
        elif hung_up and self._stop_by is None:
            self._reload()

    def _reload(self) -> None:
        """Has the workers read a good configuration; a bad one they are spared."""
        if (loaded := read_again(self._load, self._config)) is not None:
            self._config, self._registry = loaded
            logging.getLogger().setLevel(self._config.log_level.upper())
            self._send(signal.SIGHUP)

    def _stop(self, code: int) -> None:
        """Tells workers to stop; a second call tells them not to wait for turns."""
        if self._stop_by is None:
            self._code = code
            # While this process has them too, new clients would wait for someone to answer.
            for listening in self._sockets:
                listening.close()
            self._stop_by = time.monotonic() + self._config.server.drain_seconds + KILL_SECONDS
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for place in self._places:
            if place.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(place.pid, number)

    def _bury(self) -> None:
        """Sees which workers have died."""
        for place in self._places:
            if place.pid is None:
                continue
            pid, status = os.waitpid(place.pid, os.WNOHANG)
            if pid:
                self._died(place, os.waitstatus_to_exitcode(status))

    def _died(self, place: _Place, code: int) -> None:
        pid, pause = place.pid, place.left(time.monotonic())
        if self._stop_by is not None:
            return
        if not self._is_up:
            # The first one cannot start, and has said why: the others could not either.
            self._stop(code if code > 0 else 1)
            return
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        when = f"in {pause:g} s" if pause else "at once"
        log.error(
            "worker %s (pid %s) ended with %s: started again %s", place.number, pid, how, when
        )

    def _start(self, place: _Place) -> None:
        place.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        # What comes before the worker listens to signals waits until it does.
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            place.pid = os.fork()
            if place.pid == 0:
                self._work(place)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)

    def _work(self, place: _Place) -> None:
        """The worker's whole life; does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in BLOCKED:
                signal.signal(number, signal.SIG_DFL)
            for end in (self._life, self._ready, self._wake, self._woken):
                os.close(end)
            is_first = place.number == 1 and not self._is_up
            worker = Worker(self._sockets, self._lifeline, is_first, place.number, self._folder)
            code = self._run(self._config, self._registry, worker, self._says_ready)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            log.error("worker %s failed: %s", place.number, logs.trace(error))
        finally:
            logging.shutdown()
            sys.stderr.flush()
            os._exit(code)

    def _says_ready(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone, which the lifeline tells
            os.write(self._tell_ready, b".")
