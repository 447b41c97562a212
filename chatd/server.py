"""A process: a socket, signals, and an end in good order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

from tornado.httpserver import HTTPServer
from tornado.httputil import ParseBodyConfig, ParseMultipartConfig, set_parse_body_config
from tornado.netutil import bind_sockets

from chatd.app import first_chatbot, open_runtime
from chatd.config import Config
from chatd.domain import Chatbot
from chatd.errors import ChatdError
from chatd.registry import Registry

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 1024 * 1024
"""What Tornado reads of headers before it hangs up; handlers refuse far less, in words."""


TWICE_SECONDS = 0.3
"""A second signal later than this after the first means that somebody cannot wait."""


class CannotListen(ChatdError):
    """The address cannot be listened on."""


Ready = Callable[[int, tuple[Chatbot, str] | None], None]


async def serve(config: Config, registry: Registry, ready: Ready) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP, then lets running turns finish; a second signal ends them.

    :param ready: called with the port, and with the first chatbot and its key when it was made
        just now, once requests are served.

    Raises `PluginError` or `CannotListen` when it cannot start.
    """
    stopping, hurrying = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(asked: list[float]) -> None:
        asked.append(loop.time())
        stopping.set()
        # A signal to a whole process group may come twice, from the sender and from a parent.
        if asked[-1] - asked[0] > TWICE_SECONDS:
            hurrying.set()

    asked: list[float] = []

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop, asked)
    # Nothing here takes forms; bodies are JSON.
    set_parse_body_config(ParseBodyConfig(multipart=ParseMultipartConfig(enabled=False)))
    async with AsyncExitStack() as stack:
        try:
            sockets = bind_sockets(config.server.port, config.server.host)
        except OSError as error:
            raise CannotListen(
                f"cannot listen on {config.server.host} port {config.server.port}: "
                f"{error.strerror or error}. Choose another with --port or $PORT"
            ) from None
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
        ready(sockets[0].getsockname()[1], made)
        await stopping.wait()
        log.info("stopping: running turns have %s s to finish", config.server.drain_seconds)
        # New connections are refused by the system, requests on open ones by `Turns`.
        server.stop()
        hurry = asyncio.create_task(hurrying.wait())
        drained = asyncio.create_task(runtime.services.turns.drain(config.server.drain_seconds))
        await asyncio.wait({hurry, drained}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        await runtime.services.turns.drain(0)
        await drained
        # The answers of the last turns are written by now or within this moment.
        await asyncio.sleep(0.1)
        await server.close_all_connections()
    log.info("stopped")
    if runtime.services.turns.stuck:
        # The event loop would wait for them for ever.
        log.error("%s turns do not end; the process does", len(runtime.services.turns.stuck))
        logging.shutdown()
        os._exit(0)
