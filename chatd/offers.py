"""What hooks are handed: places to add what a plugin offers, each thing with its settings' schema."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tornado.web import RequestHandler

from chatd.errors import PluginError
from chatd.interceptor import Interceptor
from chatd.provider import Provider
from chatd.shared import Shared
from chatd.storage import Storage
from chatd.validation import Schema, did_you_mean

T = TypeVar("T")
Settings = Mapping[str, Any]
ROUTE_PREFIX = "/x/"


@dataclass(frozen=True, slots=True)
class Offer(Generic[T]):
    """One thing that a plugin offers under a name."""

    name: str
    open: Callable[[Settings], Awaitable[T]]
    schema: Schema
    description: str
    plugin: str
    options: Schema | None = None
    """What a chatbot's `provider_options` may say to it; None is nothing."""
    single_process: str | None = None
    """Why the processes of one server cannot share it; None when they can."""


@dataclass(slots=True)
class Register(Generic[T]):
    """What a hook is handed: a place to `add` what the plugin offers."""

    kind: str
    plugin: str
    offers: dict[str, Offer[T]]

    def add(
        self,
        name: str,
        open: Callable[[Settings], Awaitable[T]],
        config_schema: Mapping[str, Any],
        description: str,
        *,
        options_schema: Mapping[str, Any] | None = None,
        single_process: str | None = None,
    ) -> None:
        """Offers something under `name`, the word after `use:` in the configuration.

        :param open: a coroutine function; called once with the settings, already validated.
        :param config_schema: a Draft 2020-12 schema of the settings, an object.
        :param description: half a sentence for `chatd plugins`.
        :param options_schema: for providers: a Draft 2020-12 schema of what a chatbot's
            `provider_options` may say under `name`, an object; it comes with each request as
            `ProviderRequest.options`. None takes no options.
        :param single_process: for storages that must not be used with `server.workers` above 1:
            a sentence for the operator that says why, and what to do instead.
        """
        if other := self.offers.get(name):
            raise PluginError(
                f'the {self.kind} "{name}" is offered by two plugins, "{other.plugin}" and '
                f'"{self.plugin}": disable one under plugins.disable'
            )
        if not inspect.iscoroutinefunction(open):
            raise PluginError(
                f'plugin "{self.plugin}": open of the {self.kind} "{name}" must be a coroutine '
                "function (async def)"
            )
        if options_schema is not None and self.kind != "provider":
            raise PluginError(
                f'plugin "{self.plugin}": the {self.kind} "{name}" has an options_schema, which '
                "only providers have"
            )
        compiled = self._compiled("config_schema", name, config_schema)
        options = None
        if options_schema is not None:
            options = self._compiled("options_schema", name, options_schema)
        self.offers[name] = Offer(
            name, open, compiled, description, self.plugin, options, single_process
        )

    def _compiled(self, what: str, name: str, document: Mapping[str, Any]) -> Schema:
        try:
            return Schema(document)
        except ValueError as error:
            raise PluginError(
                f'plugin "{self.plugin}": {what} of "{name}" is not a JSON Schema: {error}'
            ) from error

    async def open(self, name: str, settings: Settings) -> T:
        """Opens what any plugin offers under `name`, for a plugin that wraps it and closes it.

        To be called from the wrapper's own `open`: while hooks run, not every plugin is there.
        Raises `PluginError` when there is no such offer, its settings do not fit, or it fails.
        """
        if (offer := self.offers.get(name)) is None:
            known = sorted(self.offers)
            hint = did_you_mean(name, known) or f"; there is {', '.join(known)}"
            raise PluginError(f'no plugin offers the {self.kind} "{name}"{hint}')
        if faults := offer.schema.faults(dict(settings)):
            path, text = faults[0]
            where = ".".join(map(str, path)) or "settings"
            colon = "" if text.startswith("is required") else ":"
            raise PluginError(f'the {self.kind} "{name}": {where}{colon} {text}')
        try:
            return await offer.open(settings)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f'the {self.kind} "{name}" cannot be opened: {type(error).__name__}: {error}'
            ) from error


StorageRegister = Register[Storage]
ProviderRegister = Register[Provider]
InterceptorRegister = Register[Interceptor]
SharedRegister = Register[Shared]


@dataclass(slots=True)
class RouteRegister:
    """What `chatd_register_routes` is handed."""

    plugin: str
    routes: list[tuple[str, type[RequestHandler]]]

    def add(self, path: str, handler: type[RequestHandler]) -> None:
        """Serves `handler` at `path`, a regular expression of Tornado's under `/x/`."""
        if not path.startswith(ROUTE_PREFIX):
            raise PluginError(
                f'plugin "{self.plugin}": the route "{path}" must start with "{ROUTE_PREFIX}"'
            )
        self.routes.append((path, handler))


class CommandContext(Protocol):
    """What a plugin's command is given as click's `ctx.obj` (`@click.pass_obj`).

    `config` is what `--config` said; None is the configuration in force.
    """

    def storage_name(self, config: Path | None = None) -> str:
        """What the configuration says after `storage.use`. Raises `ConfigError`."""

    def open_storage(self, config: Path | None = None) -> AbstractAsyncContextManager[Storage]:
        """The configured storage, open within `async with`. Raises `ConfigError`, `PluginError`."""
