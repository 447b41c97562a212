"""What commands share: finding the configuration, opening storage, telling what failed."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from chatd.app import load, open_shared, open_storage, packaged_config
from chatd.config import find_config
from chatd.domain import Chatbot, canonical_id
from chatd.env_file import EnvFile
from chatd.errors import ChatdError, RequestError
from chatd.registry import Registry
from chatd.shared import SharedUnavailable
from chatd.sharing import tell_once
from chatd.storage import Storage

P = ParamSpec("P")
T = TypeVar("T")

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The configuration file. Else $CHATD_CONFIG, config/chatd.yaml or chatd.yaml here, "
    "or the default that chatd carries.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def configured(given: Path | None) -> Path:
    """The configuration file to use, once `.env` here is read."""
    EnvFile(Path()).read()
    return find_config(given, Path(), packaged_config())


def reports_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Tells chatd's own errors on stderr, and exits with 1."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            sys.exit(130)
        except RequestError as error:
            click.echo(f"chatd: {error.detail}", err=True)
        except ChatdError as error:
            for line in str(error).splitlines():
                click.echo(f"chatd: {line}" if not _has_place(line) else line, err=True)
        sys.exit(1)

    return wrapper


def _has_place(line: str) -> bool:
    return ": " in line and line.split(": ", maxsplit=1)[0].rpartition(":")[2].isdigit()


def asynchronous(function: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """A command whose body is a coroutine function, with its errors told."""

    @reports_errors
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        async def work() -> T:
            return await function(*args, **kwargs)

        return asyncio.run(work())

    return wrapper


@asynccontextmanager
async def opened_storage(config_path: Path | None) -> AsyncIterator[Storage]:
    """The configured storage, beside a server that may be running."""
    async with opened_with_plugins(config_path) as (storage, _):
        yield storage


@asynccontextmanager
async def opened_with_plugins(config_path: Path | None) -> AsyncIterator[tuple[Storage, Registry]]:
    """The configured storage, and what the plugins that were loaded for it offer."""
    config, registry = load(configured(config_path))
    storage = await open_storage(config, registry)
    try:
        yield storage, registry
    finally:
        await storage.close()


async def tell_changed(config_path: Path | None, chatbot_id: str) -> None:
    """Tells running servers that a chatbot changed, where the configuration lets them share.

    Else, and when that fails, they see it within `server.chatbot_cache_seconds`.
    """
    shared = await open_shared(*load(configured(config_path)))
    if shared is None:
        return
    try:
        await tell_once(shared, "changed", chatbot=chatbot_id)
    except SharedUnavailable as error:
        text = "running servers cannot be told, and see it in some seconds"
        click.echo(f"chatd: {text}: {error}", err=True)
    finally:
        await shared.close()


class CliContext:
    """`chatd.CommandContext`: what plugins' commands are given."""

    def storage_name(self, config: Path | None = None) -> str:
        return load(configured(config))[0].storage.name

    def open_storage(self, config: Path | None = None) -> AbstractAsyncContextManager[Storage]:
        return opened_storage(config)


class NoChatbot(ChatdError):
    """The chatbot named on the command line does not exist, or the name fits several."""


async def find_chatbot(storage: Storage, bot: str) -> Chatbot:
    """The chatbot with this id, or this name. Raises `NoChatbot`."""
    if (id := canonical_id(bot)) and (found := await storage.get_chatbot(id)):
        return found
    named = [chatbot for chatbot in await storage.list_chatbots() if chatbot.name == bot]
    if len(named) == 1:
        return named[0]
    if named:
        raise NoChatbot(
            f'{len(named)} chatbots are named "{bot}"; say which by its id: '
            + ", ".join(chatbot.id for chatbot in named)
        )
    raise NoChatbot(f'there is no chatbot "{bot}"; `chatd bots list` names them all')
