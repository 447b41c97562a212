"""Builds the application from its parts: configuration, plugins, storage, providers, routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from tornado.httputil import HTTPServerRequest
from tornado.web import Application, RequestHandler

import chatd
from chatd import logs, openapi
from chatd.access import Access
from chatd.breaker import BreakerState
from chatd.budgets import Budgets
from chatd.config import Ask, Config, ConfigFile, Offers, Use
from chatd.domain import Chatbot, ChatbotSettings, hash_api_key, new_api_key, new_id
from chatd.errors import PluginError
from chatd.handlers import bot, chat, docs, health, metrics, openai, sessions, turns, widget
from chatd.handlers.base import (
    ApiHandler,
    Operation,
    Route,
    Services,
    UnknownPathHandler,
    comes_whole,
    in_pieces,
)
from chatd.interceptor import Interceptor
from chatd.limits import Limits
from chatd.memory import MemoryShared
from chatd.metrics import Metrics, Sample
from chatd.offers import Offer
from chatd.provider import Provider, takes
from chatd.registry import Registry, load_registry
from chatd.routing import Router, Rule, Target
from chatd.shared import Shared
from chatd.sharing import Sharing
from chatd.storage import Storage
from chatd.timed_storage import timed, traced
from chatd.tracing import Tracing
from chatd.turns import Turns

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long a plugin may take to close."""

_STATES = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}

OPEN_SECONDS = 30.0
"""How long a plugin may take to open before the start is given up."""


def packaged_config() -> Path:
    """The configuration that the distribution carries."""
    return Path(str(resources.files("chatd_config").joinpath("chatd.yaml")))


def packaged_configs() -> list[Path]:
    """All configurations that the distribution carries."""
    return sorted(packaged_config().parent.glob("*.yaml"))


def load(path: Path, **server: Any) -> tuple[Config, Registry]:
    """The configuration and the plugins it asks for.

    :param server: settings of `server` that hold in place of the file's.

    Raises `ConfigError` with every fault, or `PluginError` for the first plugin that fails.
    """
    file = ConfigFile.read(path)
    wanted = file.plugins
    registry = load_registry(wanted.folder, wanted.disable)
    config = file.check(offers(registry))
    if server:
        config = replace(config, server=replace(config.server, **server))
    if reason := not_shared(config, registry):
        file.refuse(("server", "workers"), reason)
    return config, registry


def not_shared(config: Config, registry: Registry) -> str | None:
    """Why the storage cannot be used by as many processes as are configured, if it cannot."""
    reason = registry.storages[config.storage.name].single_process
    if config.server.workers == 1 or reason is None:
        return None
    return f"must be 1 with the storage {config.storage.name}: {reason}"


def offers(registry: Registry) -> Offers:
    """What the configuration may name, with the schema of its settings."""
    return {
        "storage": {o.name: o.schema for o in registry.storages.values()},
        "provider": {o.name: o.schema for o in registry.providers.values()},
        "interceptor": {o.name: o.schema for o in registry.interceptors.values()},
        "shared": {o.name: o.schema for o in registry.shared.values()},
    }


T = TypeVar("T")


async def _opened(what: str, offer: Offer[T], settings: Any) -> T:
    """Opens one thing of a plugin's, and names it when that fails."""
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            return await offer.open(settings)
    except PluginError:
        raise
    except TimeoutError:
        raise PluginError(f'{what} ("{offer.name}") did not open in {OPEN_SECONDS:.0f} s') from None
    except Exception as error:
        raise PluginError(
            f'{what} ("{offer.name}") cannot be opened: {type(error).__name__}: {error}'
        ) from error


async def _closed(what: str, close: Callable[[], Awaitable[None]]) -> None:
    """Closes one thing of a plugin's; one that cannot be closed is named, and the rest goes on."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await close()
    except Exception as error:
        log.error("%s could not be closed: %s", what, logs.trace(error))


async def open_storage(config: Config, registry: Registry) -> Storage:
    """The storage of the configuration. The caller closes it. Raises `PluginError`."""
    return await open_used_storage(config.storage, registry)


async def open_used_storage(use: Use, registry: Registry) -> Storage:
    """A storage by its name and settings. The caller closes it. Raises `PluginError`."""
    return await _opened("storage", registry.storages[use.name], use.settings)


async def open_shared(config: Config, registry: Registry) -> Shared | None:
    """What processes share; None when the configuration names nothing. Raises `PluginError`."""
    if config.shared is None:
        return None
    return await _opened("shared", registry.shared[config.shared.name], config.shared.settings)


async def open_sharing(config: Config, registry: Registry, stack: AsyncExitStack) -> Sharing:
    """The same with what holds without it; `stack` closes it. Its caller opens it."""
    shared = await open_shared(config, registry)
    if shared is not None:
        stack.push_async_callback(_closed, "shared", shared.close)
    # One that is this process's own is what `Sharing` has itself, at less cost.
    sharing = Sharing(None if isinstance(shared, MemoryShared) else shared)
    stack.push_async_callback(sharing.close)
    return sharing


async def open_providers(
    config: Config, registry: Registry, stack: AsyncExitStack
) -> dict[str, Provider]:
    """The enabled providers by their names in the configuration; `stack` closes them."""
    providers: dict[str, Provider] = {}
    for name, provider in config.providers.items():
        offer = registry.providers[provider.use.name]
        providers[name] = await _opened(f"providers.{name}", offer, provider.use.settings)
        stack.push_async_callback(_closed, f"providers.{name}", providers[name].close)
        if not isinstance(taken := takes(providers[name]), Set):
            raise PluginError(
                f'providers.{name}: takes of a provider of plugin "{offer.plugin}" must be a set '
                f'like {{"tools"}}, not {type(taken).__name__}'
            )
    return providers


def route_models(config: Config, providers: dict[str, Provider]) -> Router:
    """The router for the configuration's `models`, without providers that are not enabled."""

    def target(ask: Ask) -> Target:
        settings = config.providers[ask.provider]
        return Target(
            name=ask.provider,
            provider=providers[ask.provider],
            timeouts=settings.timeouts,
            model=ask.model,
            use=settings.use.name,
            weight=ask.weight,
            retries=settings.retries,
            breaker=settings.breaker,
            prices=settings.prices,
        )

    return Router(
        [
            Rule(
                rule.match,
                tuple(target(ask) for ask in rule.ask if ask.provider in providers),
                rule.hedge,
            )
            for rule in config.models
        ]
    )


@dataclass(frozen=True, slots=True)
class Answerers:
    """What answers turns, open until `close`; a second call of that does nothing."""

    router: Router
    interceptors: Sequence[tuple[str, Interceptor]]
    _stack: AsyncExitStack

    async def close(self) -> None:
        """Closes providers and interceptors. Call it when no turn is answered by them any more."""
        await self._stack.aclose()


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything that is open while a server runs."""

    application: Application
    services: Services
    answerers: Answerers
    unlisten: tuple[Callable[[], None], ...]
    """What ends listening to other processes, for one that another is in place of."""

    @property
    def router(self) -> Router:
        """Picks the providers."""
        return self.answerers.router


async def open_answerers(config: Config, registry: Registry) -> Answerers:
    """Opens providers and interceptors. The caller closes them. Raises `PluginError`."""
    async with AsyncExitStack() as stack:
        router = route_models(config, await open_providers(config, registry, stack))
        interceptors: list[tuple[str, Interceptor]] = []
        for use in config.interceptors:
            offer = registry.interceptors[use.name]
            interceptors.append(
                (use.name, await _opened(f"interceptor {use.name}", offer, use.settings))
            )
            stack.push_async_callback(_closed, f"interceptor {use.name}", interceptors[-1][1].close)
        return Answerers(router, interceptors, stack.pop_all())


async def open_runtime(
    config: Config,
    registry: Registry,
    stack: AsyncExitStack,
    sharing: Sharing | None = None,
    numbers: Metrics | None = None,
) -> Runtime:
    """Opens everything; `stack` closes it in the right order. Raises `PluginError`.

    :param sharing: what is shared with other processes, when that is open already.
    :param numbers: what this process counts for Prometheus, when it does already.
    """
    numbers = numbers or Metrics()
    tracing = None
    if config.server.tracing != "none":
        tracing = Tracing(chatd.__version__)
        stack.push_async_callback(asyncio.to_thread, tracing.close)
    storage = timed(await open_storage(config, registry), numbers)
    if tracing is not None:
        storage = traced(storage, tracing)
    stack.push_async_callback(_closed, "storage", storage.close)
    answerers = await open_answerers(config, registry)
    stack.push_async_callback(answerers.close)
    if sharing is None:
        sharing = await open_sharing(config, registry, stack)
    budgets = Budgets(storage, config.limits, sharing)
    running = Turns(
        storage,
        answerers.router,
        answerers.interceptors,
        lease_seconds=config.server.lease_seconds,
        budgets=budgets,
        sharing=sharing,
        metrics=numbers,
        tracing=tracing,
    )
    stack.push_async_callback(running.close)
    await running.open()
    runtime = _put_together(config, registry, storage, running, answerers, sharing, tracing)
    await sharing.open()
    if sharing.is_shared:
        sharing.spawn(budgets.keep())
    return runtime


async def open_again(config: Config, registry: Registry, runtime: Runtime) -> Runtime:
    """The same with another configuration, on the storage and with the turns of `runtime`.

    Turns that begin from now on are answered by what is open anew; what it is in place of stays
    open for those that run. The caller closes both. Raises `PluginError`, and changes nothing then.
    """
    services = runtime.services
    answerers = await open_answerers(config, registry)
    try:
        made = _put_together(
            config,
            registry,
            services.storage,
            services.turns,
            answerers,
            services.sharing,
            services.tracing,
        )
    except PluginError:
        await answerers.close()
        raise
    services.turns.answer_with(
        answerers.router, answerers.interceptors, config.limits, config.server.lease_seconds
    )
    return made


def _put_together(
    config: Config,
    registry: Registry,
    storage: Storage,
    running: Turns,
    answerers: Answerers,
    sharing: Sharing,
    tracing: Tracing | None,
) -> Runtime:
    """What is open, as an application. Raises `PluginError`."""
    access = Access(
        storage,
        default_origins=config.server.allowed_origins,
        public_url=config.server.public_url,
        cache_seconds=config.server.chatbot_cache_seconds,
    )
    unlisten = (
        sharing.on("changed", lambda message: access.forget_chatbot(message["chatbot"])),
        sharing.on("erased", lambda message: access.forget_session(message["session"])),
        sharing.on_missed(access.forget_chatbots),
    )
    limits = Limits(config.limits, sharing, trusted_proxies=config.server.trusted_proxies)
    running.metrics.sources["runtime"] = partial(_gauges, running, answerers.router, sharing)
    services = Services(
        config.server, storage, access, limits, running, sharing, running.metrics, tracing
    )
    application = build_application(services, registry.routes)
    return Runtime(application, services, answerers, unlisten)


def _gauges(running: Turns, router: Router, sharing: Sharing) -> Iterator[Sample]:
    """What there is of things that come and go."""
    yield "chatd_info", (chatd.__version__,), 1
    yield "chatd_running_turns", (), running.count
    yield "chatd_unstored_turns", (), running.unstored
    yield "chatd_stuck_turns", (), len(running.stuck)
    if sharing.is_shared:
        yield "chatd_shared_up", (), float(sharing.is_up)
    for pair, state in router.states().items():
        yield "chatd_breaker_state", pair, _STATES[state]


async def first_chatbot(config: Config, storage: Storage) -> tuple[Chatbot, str] | None:
    """Makes the configuration's first chatbot when there is none; returns it with its key."""
    wanted = config.first_chatbot
    if wanted is None or await storage.list_chatbots():
        return None
    key = new_api_key()
    chatbot = Chatbot(
        id=new_id(),
        name=wanted.name,
        model=wanted.model,
        api_key_hash=hash_api_key(key),
        settings=ChatbotSettings(system_prompt=wanted.system_prompt),
    )
    await storage.add_chatbot(chatbot)
    return chatbot, key


def routes() -> list[Route]:
    """chatd's own routes."""
    document = cache(lambda: openapi.build(described, chatd.__version__))
    described = [
        *chat.ROUTES,
        *sessions.ROUTES,
        *bot.ROUTES,
        *turns.ROUTES,
        *openai.ROUTES,
        *health.ROUTES,
        docs.openapi_route(document),
    ]
    return [*described, *docs.ROUTES, *widget.ROUTES, *metrics.ROUTES]


class _Application(Application):
    """Tornado's, with handlers that suit how a body comes.

    :param paths: handlers and their arguments that are looked up before any rule is.
    """

    def __init__(
        self,
        max_body_bytes: int,
        paths: Mapping[str, tuple[type[RequestHandler], dict[str, Any]]],
        *given: Any,
        **named: Any,
    ) -> None:
        super().__init__(*given, **named)
        self._max_body_bytes = max_body_bytes
        self._paths = paths

    def find_handler(self, request: HTTPServerRequest, **named: Any) -> Any:
        if (found := self._paths.get(request.path)) is None:
            return super().find_handler(request, **named)
        return self.get_handler_delegate(request, *found)

    def get_handler_delegate(
        self,
        request: HTTPServerRequest,
        target_class: type[RequestHandler],
        *given: Any,
        **named: Any,
    ) -> Any:
        if issubclass(target_class, ApiHandler) and not comes_whole(
            request.headers, self._max_body_bytes
        ):
            # mypy takes a class for what its instances are.
            target_class = in_pieces(target_class)  # type: ignore[arg-type]
        return super().get_handler_delegate(request, target_class, *given, **named)


def build_application(
    services: Services, plugin_routes: Iterable[tuple[str, type[RequestHandler]]] = ()
) -> Application:
    """The Tornado application."""
    own = [
        (route, (route.handler, {"services": services, "route": route, **route.arguments}))
        for route in routes()
    ]
    paths = {route.path: found for route, found in own if "{" not in route.path}
    rules: list[Any] = [(route.pattern, *found) for route, found in own]
    rules += [
        (pattern, handler, {"services": services, "route": _plugin_route(pattern, handler)})
        for pattern, handler in plugin_routes
    ]
    rules.append((r"/v1(?:/.*)?", openai.UnknownOpenAIPathHandler, {"services": services}))
    return _Application(
        services.config.max_body_bytes,
        paths,
        rules,
        default_handler_class=UnknownPathHandler,
        default_handler_args={"services": services},
        log_function=_log_request,
    )


def _plugin_route(pattern: str, handler: type[RequestHandler]) -> Route:
    """A plugin's endpoint, held to the same limits and errors as chatd's own."""
    if not issubclass(handler, ApiHandler):
        raise PluginError(
            f'the handler of the route "{pattern}" must be a subclass of chatd.Handler'
        )
    methods = [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        if getattr(handler, method.lower()) is not getattr(ApiHandler, method.lower())
    ]
    return Route(pattern, handler, {m: Operation(summary="", auth="none") for m in methods})


def _log_request(handler: RequestHandler) -> None:
    fields: dict[str, Any] = {
        "method": handler.request.method,
        # The template, not the path: a path may hold what should not be in a log.
        "route": "-",
        "status": handler.get_status(),
        "ms": round(handler.request.request_time() * 1000, 1),
    }
    if isinstance(handler, ApiHandler):
        fields["route"] = handler.route.path if handler.route else "-"
        handler.end_span()
        handler.services.metrics.request(
            fields["route"], handler.request.method or "", fields["status"], fields["ms"] / 1000
        )
        fields["request_id"] = handler.request_id
        if handler.error_code:
            fields["code"] = handler.error_code
        if handler.chatbot:
            fields["chatbot"] = handler.chatbot.id
    logs.log_request(fields)
