"""A third party's plugin with one of everything: provider, interceptor, route and command."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

import click

import chatd

NOTHING = {"type": "object", "additionalProperties": False}


class Shout:
    async def stream(self, request: chatd.ProviderRequest) -> AsyncGenerator[chatd.Event, None]:
        yield chatd.TextDelta(request.messages[-1].content.upper())
        yield chatd.Finish("stop", "shout-1")

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def open_shout(settings: Mapping[str, Any]) -> Shout:
    return Shout()


class Polite:
    """Adds a word to what the model is given, declines a word, and replaces one in the answer."""

    def __init__(self, word: str) -> None:
        self._word = word

    async def around(
        self, turn: chatd.TurnContext, proceed: chatd.Proceed
    ) -> AsyncGenerator[chatd.Event, None]:
        *before, last = turn.messages
        if "rude" in last.content:
            raise chatd.TurnRefused("Please say that more kindly.")
        if "crash" in last.content:
            raise ZeroDivisionError("a bug in the plugin")
        asked = replace(last, content=f"{last.content} {self._word}")
        async for event in proceed(replace(turn, messages=[*before, asked])):
            if isinstance(event, chatd.TextDelta):
                yield chatd.TextDelta(event.text.replace("SECRET", "[redacted]"))
            else:
                yield event

    async def close(self) -> None:
        pass


async def open_polite(settings: Mapping[str, Any]) -> Polite:
    return Polite(settings["word"])


class Ping(chatd.Handler):
    def get(self) -> None:
        self.answer({"pong": True})


@click.command("greet")
def greet() -> None:
    """Greet, from a plugin."""
    click.echo("hello from a plugin")


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add("shout", open_shout, NOTHING, "answers in capitals")


@chatd.hookimpl
def chatd_register_interceptor(register: chatd.InterceptorRegister) -> None:
    schema = {**NOTHING, "required": ["word"], "properties": {"word": {"type": "string"}}}
    register.add("polite", open_polite, schema, "adds a word, declines rudeness")


@chatd.hookimpl
def chatd_register_routes(register: chatd.RouteRegister) -> None:
    register.add("/x/ping", Ping)


@chatd.hookimpl
def chatd_register_commands(cli: click.Group) -> None:
    cli.add_command(greet)
