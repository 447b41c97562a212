"""A process: a socket, signals, and an end in good order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import socket

from tornado.netutil import bind_sockets

from chatd.app import first_chatbot
from chatd.config import Config, ServerConfig
from chatd.connections import ClientServer
from chatd.domain import Chatbot
from chatd.ending import Ending
from chatd.errors import ChatdError
from chatd.loop_watch import LoopWatch
from chatd.metrics import Metrics, Place
from chatd.racing import hung_up
from chatd.registry import Registry
from chatd.reload import Generations, Load
from chatd.retention import RetentionJob
from chatd.routing import CLOSE_SECONDS
from chatd.tuning import settle
from chatd.turns import Turns

log = logging.getLogger(__name__)


TWICE_SECONDS = 0.3
"""A second signal later than this after the first means that somebody cannot wait."""


END_SECONDS = 15.0
"""How long everything may take to close once turns have ended, before the process is ended."""

ANSWER_SECONDS = 0.1
"""How long the answers of the last turns may take to be written; it is much more than they need."""


BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
"""Signals that a worker begins its life without."""


class CannotListen(ChatdError):
    """The address cannot be listened on."""


Ready = Callable[[int, tuple[Chatbot, str] | None], None]


@dataclass(frozen=True, slots=True)
class Worker:
    """One of several processes on the same sockets.

    `lifeline` is a pipe that ends with the parent. `is_first` is the one that makes the first
    chatbot. `number` is its place, from 1 on; `folder` is where the places' numbers are gathered.
    """

    sockets: Sequence[socket]
    lifeline: int
    is_first: bool
    number: int
    folder: Path


class Terminal:
    """The terminal that the process was started in, if it was: SIGHUP comes too when it is closed."""

    def __init__(self) -> None:
        self._was_there = self._is_there

    @property
    def _is_there(self) -> bool:
        return sys.stdin is not None and sys.stdin.isatty()

    @property
    def is_gone(self) -> bool:
        """Whether there was one, and it was closed."""
        return self._was_there and not self._is_there


class _Signals:
    """SIGTERM and SIGINT: the first asks to stop, a later one not to wait for turns.

    SIGHUP asks to read the configuration again; to stop when it comes from a terminal that is gone.
    """

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.hurrying = asyncio.Event()
        self.reloading = asyncio.Event()
        self._first: float | None = None
        self._loop = asyncio.get_running_loop()
        self._terminal = Terminal()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._asked_to_stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        # A parent blocks them from the fork until here, so that none is lost.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)

    def stop_with(self, lifeline: int) -> None:
        """Stops as well when the other end of a pipe is closed."""

        def ended() -> None:
            self._loop.remove_reader(lifeline)
            log.warning("the parent process is gone")
            self.stopping.set()

        self._loop.add_reader(lifeline, ended)

    def _hung_up(self) -> None:
        if self._terminal.is_gone:
            self._asked_to_stop()
        else:
            self.reloading.set()

    def _asked_to_stop(self) -> None:
        now = self._loop.time()
        if self._first is None:
            self._first = now
            self.stopping.set()
        # A signal to a whole process group may come twice, from the sender and from a parent.
        elif now - self._first > TWICE_SECONDS:
            self.hurrying.set()


async def serve(
    config: Config,
    registry: Registry,
    ready: Ready,
    *,
    load: Load,
    worker: Worker | None = None,
) -> None:
    """Serves until a signal asks to stop, then lets running turns finish; a second one ends them.

    :param ready: called with the port, and with the first chatbot and its key when it was made
        just now, once requests are served.
    :param load: reads the configuration anew, when a signal asks for that.
    :param worker: for one of several processes on the same sockets.

    Raises `PluginError` or `CannotListen` when it cannot start.
    """
    signals = _Signals()
    if worker is not None:
        signals.stop_with(worker.lifeline)
    sockets = listen(config.server) if worker is None else worker.sockets
    watch = LoopWatch(config.server.block_seconds, registry.plugin_of)
    metrics = Metrics()
    watch.observers.append(metrics.lag.observe)
    place = Place(worker.folder, worker.number, metrics) if worker is not None else None
    async with Generations(config, registry, metrics) as generations:
        runtime = generations.runtime
        made = None
        if worker is None or worker.is_first:
            made = await first_chatbot(config, runtime.services.storage)
        server = ClientServer(runtime.application, config.server)
        server.on_refused = partial(metrics.refusals.add, "connections")
        server.add_sockets(sockets)
        if place is not None:
            place.open()
        reloading = asyncio.create_task(_reload(signals, generations, server, watch, load))
        retention = RetentionJob(lambda: generations.runtime.services.storage)
        retention.open()
        watch.start()
        settle()
        ready(sockets[0].getsockname()[1], made)
        await signals.stopping.wait()
        ending = Ending(asyncio.get_running_loop())
        ending.within(generations.config.server.drain_seconds + END_SECONDS)
        reloading.cancel()
        await retention.close()
        await _stop(server, generations, signals)
        ending.within(END_SECONDS)
        await server.close_all_connections()
        watch.stop()
        if place is not None:
            await place.close()
        racing = await hung_up(CLOSE_SECONDS)
        drained = generations.turns
    log.info("stopped")
    if stuck := sum(len(turns.stuck) for turns in drained) + racing:
        # The event loop would wait for them for ever.
        log.error("%s turns do not end; the process does", stuck)
        logging.shutdown()
        os._exit(0)


async def _reload(
    signals: _Signals,
    generations: Generations,
    server: ClientServer,
    watch: LoopWatch,
    load: Load,
) -> None:
    """Puts the configuration in force anew, each time that a signal asks for that."""
    while True:
        await signals.reloading.wait()
        signals.reloading.clear()
        if await generations.change(load):
            settings = generations.config.server
            server.serve_with(generations.runtime.application)
            server.apply(settings)
            watch.seconds = settings.block_seconds
            watch.plugin_of = generations.registry.plugin_of


def listen(config: ServerConfig) -> list[socket]:
    """The sockets of the address. Raises `CannotListen`."""
    try:
        return bind_sockets(config.port, config.host)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}. "
            "Choose another with --port or $PORT"
        ) from None


async def _stop(server: ClientServer, generations: Generations, signals: _Signals) -> None:
    seconds = generations.config.server.drain_seconds
    log.info("stopping: running turns have %s s to finish", seconds)
    # New connections are refused by the system, new turns on open ones by `Turns`.
    server.stop()
    await asyncio.gather(*(_drain(turns, seconds, signals.hurrying) for turns in generations.turns))


async def _drain(turns: Turns, seconds: float, hurrying: asyncio.Event) -> None:
    """Lets running turns finish, for so many seconds or until `hurrying`."""
    hurry = asyncio.create_task(hurrying.wait())
    drained = asyncio.create_task(turns.drain(seconds))
    await asyncio.wait({hurry, drained}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    await turns.drain(0)
    await drained
    # Handlers are woken by the end of their turn, and write its answer.
    await asyncio.sleep(ANSWER_SECONDS)
