"""A process: a socket, signals, and an end in good order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from socket import socket

from tornado.httpserver import HTTPServer
from tornado.httputil import ParseBodyConfig, ParseMultipartConfig, set_parse_body_config
from tornado.netutil import bind_sockets

from chatd.app import first_chatbot, open_runtime
from chatd.config import Config, ServerConfig
from chatd.domain import Chatbot
from chatd.errors import ChatdError
from chatd.racing import hung_up
from chatd.registry import Registry
from chatd.retention import RetentionJob
from chatd.routing import CLOSE_SECONDS
from chatd.turns import Turns

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 1024 * 1024
"""What Tornado reads of headers before it hangs up; handlers refuse far less, in words."""


TWICE_SECONDS = 0.3
"""A second signal later than this after the first means that somebody cannot wait."""


ANSWER_SECONDS = 0.1
"""How long the answers of the last turns may take to be written; it is much more than they need."""


class CannotListen(ChatdError):
    """The address cannot be listened on."""


Ready = Callable[[int, tuple[Chatbot, str] | None], None]


class _Signals:
    """SIGTERM, SIGINT and SIGHUP: the first asks to stop, a later one not to wait for turns."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.hurrying = asyncio.Event()
        self._first: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._caught)

    def _caught(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._first is None:
            self._first = now
            self.stopping.set()
        # A signal to a whole process group may come twice, from the sender and from a parent.
        elif now - self._first > TWICE_SECONDS:
            self.hurrying.set()


async def serve(config: Config, registry: Registry, ready: Ready) -> None:
    """Serves until a signal asks to stop, then lets running turns finish; a second one ends them.

    :param ready: called with the port, and with the first chatbot and its key when it was made
        just now, once requests are served.

    Raises `PluginError` or `CannotListen` when it cannot start.
    """
    signals = _Signals()
    # Nothing here takes forms; bodies are JSON.
    set_parse_body_config(ParseBodyConfig(multipart=ParseMultipartConfig(enabled=False)))
    async with AsyncExitStack() as stack:
        sockets = _listen(config.server)
        runtime = await open_runtime(config, registry, stack)
        made = await first_chatbot(config, runtime.services.storage)
        server = HTTPServer(
            runtime.application,
            # The limit that counts is the handlers', which say so in the answer.
            max_body_size=2**62,
            max_header_size=MAX_HEADER_BYTES,
            body_timeout=config.server.body_timeout,
        )
        server.add_sockets(sockets)
        retention = RetentionJob(runtime.services.storage)
        stack.push_async_callback(retention.close)
        retention.open()
        ready(sockets[0].getsockname()[1], made)
        await signals.stopping.wait()
        log.info("stopping: running turns have %s s to finish", config.server.drain_seconds)
        # New connections are refused by the system, requests on open ones by `Turns`.
        server.stop()
        await _drain(runtime.services.turns, config.server.drain_seconds, signals.hurrying)
        await server.close_all_connections()
        racing = await hung_up(CLOSE_SECONDS)
    log.info("stopped")
    if stuck := len(runtime.services.turns.stuck) + racing:
        # The event loop would wait for them for ever.
        log.error("%s turns do not end; the process does", stuck)
        logging.shutdown()
        os._exit(0)


def _listen(config: ServerConfig) -> list[socket]:
    """The sockets of the address. Raises `CannotListen`."""
    try:
        return bind_sockets(config.port, config.host)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}. "
            "Choose another with --port or $PORT"
        ) from None


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
