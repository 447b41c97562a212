"""What a plugin may implement: hooks that run once, at start-up, and register typed objects.

A hook is a plain function (never a coroutine) marked with `chatd.hookimpl`; requests await
methods of what it registered. A name that starts with `chatd_` and is not here is refused.
"""

from __future__ import annotations

import click
import pluggy

from chatd.offers import (
    InterceptorRegister,
    ProviderRegister,
    RouteRegister,
    SharedRegister,
    StorageRegister,
)

PROJECT = "chatd"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def chatd_register_storage(register: StorageRegister) -> None:
    """Offer a place where conversations live.

    :param register: call its `add(name, open, config_schema, description)`; `open(settings)`
        is a coroutine function that returns a `chatd.Storage`.
    """


@hookspec
def chatd_register_provider(register: ProviderRegister) -> None:
    """Offer somebody who answers.

    :param register: call its `add(name, open, config_schema, description)`; `open(settings)`
        is a coroutine function that returns a `chatd.Provider`. One that wraps another provider
        opens it with `register.open(name, settings)`, from its own `open`.
    """


@hookspec
def chatd_register_interceptor(register: InterceptorRegister) -> None:
    """Offer code that runs around each turn, once it is named under `interceptors`.

    :param register: call its `add(name, open, config_schema, description)`; `open(settings)`
        is a coroutine function that returns a `chatd.Interceptor`.
    """


@hookspec
def chatd_register_shared(register: SharedRegister) -> None:
    """Offer a place where processes share what they count, what is said just now and what changed.

    :param register: call its `add(name, open, config_schema, description)`; `open(settings)`
        is a coroutine function that returns a `chatd.Shared`. It does not wait for the place to be
        there: a server starts without it.
    """


@hookspec
def chatd_register_routes(register: RouteRegister) -> None:
    """Offer further endpoints.

    :param register: call its `add(path, handler)` with a subclass of `chatd.Handler`, a Tornado
        handler with chatd's limits and errors; the path is a regular expression of Tornado's under
        `/x/`, which chatd itself never uses.
    """


@hookspec
def chatd_register_commands(cli: click.Group) -> None:
    """Offer further subcommands of `chatd`.

    :param cli: the click group; call its `add_command`. A command finds a
        `chatd.CommandContext` in click's `ctx.obj`; chatd's errors that it raises are told.
    """
