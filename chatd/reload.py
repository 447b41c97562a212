"""Another configuration for a server that runs: whole for what begins, and never for what runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from chatd import logs
from chatd.app import Runtime, open_again, open_runtime, open_sharing
from chatd.config import Config
from chatd.errors import ChatdError
from chatd.metrics import Metrics
from chatd.registry import Registry
from chatd.turns import Turns

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""How long requests that came before may use the storage that another is in place of."""

FIXED = ("host", "port", "workers", "tracing")
"""Settings of `server` that a process cannot change while it runs."""

Load = Callable[[], tuple[Config, Registry]]
"""Reads the configuration anew. Raises `ChatdError`, and then has changed nothing."""


def read_again(load: Load, config: Config) -> tuple[Config, Registry] | None:
    """The configuration as it is now; None when it is at fault, which is logged then.

    Says in the log as well what of it waits for a restart.
    """
    try:
        new, registry = load()
    except Exception as error:
        told = str(error) if isinstance(error, ChatdError) else logs.trace(error)
        log.error("the configuration stays as it was: %s", told)
        return None
    fixed = {name: getattr(config.server, name) for name in FIXED}
    for name, value in fixed.items():
        if getattr(new.server, name) != value:
            log.warning("server.%s changes only with a restart: it stays %s", name, value)
    if new.shared != config.shared:
        log.warning("shared changes only with a restart: it stays as it was")
    return replace(new, server=replace(new.server, **fixed), shared=config.shared), registry


class Generations:
    """What is open for the configuration in force, and for those before it whose turns still run."""

    def __init__(self, config: Config, registry: Registry, metrics: Metrics | None = None) -> None:
        self.config = config
        self._metrics = metrics or Metrics()
        self.registry = registry
        self._stack = AsyncExitStack()
        self._own = AsyncExitStack()
        self._before: set[Turns] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """What is open for the configuration in force."""
        assert self._runtime is not None
        return self._runtime

    @property
    def turns(self) -> list[Turns]:
        """Those that begin turns, and those before them that still run some."""
        return [self.runtime.services.turns, *self._before]

    async def __aenter__(self) -> Generations:
        await self._stack.__aenter__()
        try:
            sharing = await open_sharing(self.config, self.registry, self._stack)
            self._own = await self._stack.enter_async_context(AsyncExitStack())
            self._runtime = await open_runtime(
                self.config, self.registry, self._own, sharing, self._metrics
            )
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self._stack.aclose()

    async def change(self, load: Load) -> bool:
        """Reads the configuration anew and puts it in force; whether it did.

        A bad one, or one whose plugins do not open, changes nothing and is logged.
        """
        # Plugins may be imported, which takes a while.
        loaded = await asyncio.to_thread(read_again, load, self.config)
        if loaded is None:
            return False
        try:
            await self._replace(*loaded)
        except Exception as error:
            told = str(error) if isinstance(error, ChatdError) else logs.trace(error)
            log.error("the configuration stays as it was: %s", told)
            return False
        logging.getLogger().setLevel(self.config.log_level.upper())
        log.info("the configuration was read anew, and is in force")
        return True

    async def _replace(self, config: Config, registry: Registry) -> None:
        before, own = self.runtime, self._own
        if self._has_same_storage(config, registry):
            self._runtime = await open_again(config, registry, before)
            self._stack.push_async_callback(self._runtime.answerers.close)
            self._retire(self._close_answerers(before))
        else:
            async with AsyncExitStack() as opening:
                sharing = before.services.sharing
                self._runtime = await open_runtime(
                    config, registry, opening, sharing, self._metrics
                )
                self._own = await self._stack.enter_async_context(opening.pop_all())
            self._retire(self._close_all(before, own))
        for take_back in before.unlisten:
            take_back()
        self.config, self.registry = config, registry

    def _has_same_storage(self, config: Config, registry: Registry) -> bool:
        name = config.storage.name
        opener = self.registry.storages[self.config.storage.name].open
        return config.storage == self.config.storage and registry.storages[name].open is opener

    def _retire(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _close_answerers(self, before: Runtime) -> None:
        await before.services.turns.outlived()
        await before.answerers.close()

    async def _close_all(self, before: Runtime, own: AsyncExitStack) -> None:
        turns = before.services.turns
        self._before.add(turns)
        try:
            await asyncio.sleep(GRACE_SECONDS)
            await turns.outlived()
        finally:
            self._before.discard(turns)
        await own.aclose()
