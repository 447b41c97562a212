"""`chatd check`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path

import click

from chatd.app import load, open_providers, open_shared, open_storage, route_models
from chatd.cli.common import asynchronous, config_option, configured, json_option
from chatd.config import Config
from chatd.errors import ChatdError, ConfigError, ProviderError, RequestError
from chatd.registry import Registry
from chatd.shared import SharedUnavailable

ONLINE_SECONDS = 10.0


@click.command()
@config_option
@click.option(
    "--online", is_flag=True, help="Ask storage, the providers and what is shared as well."
)
@json_option
@asynchronous
async def check(config_path: Path | None, online: bool, as_json: bool) -> None:
    """Check the configuration; exits with 1 when something is wrong."""
    path = configured(config_path)
    faults: list[str] = []
    done = [f"{path}: the configuration is good"]
    try:
        config, registry = load(path)
        if online:
            asked, faults = await _ask(config, registry)
            done += asked
    except ConfigError as error:
        faults, done = list(error.faults), []
    except ChatdError as error:
        faults, done = [str(error)], []
    if as_json:
        click.echo(json.dumps({"ok": not faults, "faults": faults}))
    else:
        for line in done:
            click.echo(line)
        for fault in faults:
            click.echo(fault, err=True)
    if faults:
        sys.exit(1)


async def _ask(config: Config, registry: Registry) -> tuple[list[str], list[str]]:
    """What storage and each provider say, and what is wrong."""
    done: list[str] = []
    faults: list[str] = []

    async def one(name: str, answer: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(ONLINE_SECONDS):
                await answer
            done.append(f"{name}: answers")
        except TimeoutError:
            faults.append(f"{name}: no answer in {ONLINE_SECONDS:.0f} s")
        except ProviderError as error:
            faults.append(f"{name}: {error.kind}: {error.detail}")
        except RequestError as error:
            faults.append(f"{name}: {error.detail}")
        except SharedUnavailable as error:
            faults.append(f"{name}: {error}")
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__} in its plugin: {error}")

    async with AsyncExitStack() as stack:
        try:
            storage = await open_storage(config, registry)
            stack.push_async_callback(storage.close)
            await one("storage", storage.check())
            if (shared := await open_shared(config, registry)) is not None:
                stack.push_async_callback(shared.close)
                await one("shared", shared.check())
            providers = await open_providers(config, registry, stack)
            for name, provider in providers.items():
                await one(f"providers.{name}", provider.check())
            router = route_models(config, providers)
            for chatbot in await storage.list_chatbots():
                if not router.chain(chatbot.model):
                    faults.append(
                        f'chatbot "{chatbot.name}" ({chatbot.id}): no rule under models leads its '
                        f'model "{chatbot.model}" to a provider that is enabled'
                    )
        except ChatdError as error:
            faults.append(error.detail if isinstance(error, RequestError) else str(error))
    return done, faults
