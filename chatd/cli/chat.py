"""`chatd chat`: talk to a chatbot in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import click

from chatd.app import load, open_runtime
from chatd.cli.common import asynchronous, config_option, configured, find_chatbot
from chatd.domain import Chatbot, Message, Session, new_id
from chatd.errors import RequestError
from chatd.turns import Turns


@click.command()
@click.argument("bot")
@config_option
@asynchronous
async def chat(bot: str, config_path: Path | None) -> None:
    """Talk to a chatbot, by id or name, in a session of its own. An empty line or Ctrl-D ends it.

    Without a terminal each line of standard input is a message, and only answers are printed.
    """
    config, registry = load(configured(config_path))
    async with AsyncExitStack() as stack:
        services = (await open_runtime(config, registry, stack)).services
        chatbot = await find_chatbot(services.storage, bot)
        session = Session(id=new_id(), chatbot_id=chatbot.id, channel="api")
        await services.storage.create_session(session)
        if sys.stdin.isatty():
            click.echo(f"{chatbot.name} ({chatbot.model}). An empty line ends it.")
        lines = _lines()
        while line := await anext(lines):
            text = line.strip()
            if not text and sys.stdin.isatty():
                break
            if not text:
                continue
            answered = await _say(services.turns, chatbot, session.id, text)
            if not answered and not sys.stdin.isatty():
                sys.exit(1)


async def _lines() -> AsyncGenerator[str, None]:
    """Lines of standard input with their ends; empty when there is no more.

    Read on a thread that nobody waits for, so that Ctrl-C works while a line is being typed.
    """
    loop = asyncio.get_running_loop()
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False)
        line: asyncio.Future[str] = loop.create_future()
        threading.Thread(target=_read_line, args=(loop, line), daemon=True).start()
        yield await line


def _read_line(loop: asyncio.AbstractEventLoop, line: asyncio.Future[str]) -> None:
    text = sys.stdin.readline()
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_resolve, line, text)


def _resolve(line: asyncio.Future[str], text: str) -> None:
    if not line.done():
        line.set_result(text)


async def _say(turns: Turns, chatbot: Chatbot, session_id: str, text: str) -> bool:
    """Prints the answer, or why there is none; whether there was one."""
    try:
        said = [Message("user", text)]
        started = await turns.start(chatbot, session_id, said, label="terminal")
        result = (await started.reply.ended()).require()
    except RequestError as error:
        click.echo(f"({error.detail})", err=True)
        return False
    click.echo(result.reply)
    return True
