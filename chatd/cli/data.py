"""`chatd export`, `chatd erase` and `chatd retention`: what is kept of people, and no longer."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TextIO

import click

from chatd.cli.common import asynchronous, config_option, configured, find_chatbot, json_option
from chatd.cli.places import place_in
from chatd.cli.progress import Bar
from chatd.domain import Chatbot, Session
from chatd.errors import ChatdError
from chatd.exporting import count, records
from chatd.retention import enforce
from chatd.storage import Storage

PAGE = 256
"""Sessions that are listed at once."""

AT_ONCE = 8
"""Sessions that are erased at once."""


class CannotWrite(ChatdError):
    """The file of an export cannot be written."""


@asynccontextmanager
async def _opened(config_path: Path | None) -> AsyncIterator[Storage]:
    """The configured storage, which is there already, with time for much."""
    place = place_in(configured(config_path))
    place.require_files()
    async with place.patient().opened() as storage:
        await storage.check()
        yield storage


@click.command()
@click.argument("bot")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file, which only you may read; else stdout.",
)
@config_option
@asynchronous
async def export(bot: str, output: Path | None, config_path: Path | None) -> None:
    """Print all that was said to a chatbot, by id or name, as JSON: a line for each thing.

    A session's line comes first, then its turns and its messages.
    """
    async with _opened(config_path) as storage:
        chatbot = await find_chatbot(storage, bot)
        total = await count(storage, chatbot) if sys.stderr.isatty() else None
        with _written(output) as file, Bar("Exporting sessions", total) as bar:
            async for record in records(storage, chatbot, bar.to):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def _written(output: Path | None) -> Iterator[TextIO]:
    """A file that has its name when it is whole, or stdout. Raises `CannotWrite`."""
    if output is None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        yield sys.stdout
        sys.stdout.flush()
        return
    part = output.with_name(f"{output.name}.part")
    try:
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                os.fchmod(number, 0o600)
                yield file
            part.replace(output)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CannotWrite(f"{output} cannot be written: {error.strerror}") from error


@click.command()
@click.option("--user", "user_id", required=True, metavar="ID", help="The user_id of sessions.")
@click.option("--bot", metavar="BOT", help="Only sessions with this chatbot, by id or name.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@config_option
@json_option
@asynchronous
async def erase(
    user_id: str, bot: str | None, yes: bool, config_path: Path | None, as_json: bool
) -> None:
    """Erase all sessions of a user, with everything said in them; what it cost stays in the sums.

    A turn that runs is erased too, and nothing of it is stored when it ends.
    """
    async with _opened(config_path) as storage:
        chatbot = None if bot is None else await find_chatbot(storage, bot)
        found = sum([len(page) async for page in _of_user(storage, user_id, chatbot)])
        if found and not yes:
            what = f'Erase {_sessions(found)} of the user "{user_id}"'
            click.confirm(what + (f' with "{chatbot.name}"?' if chatbot else "?"), abort=True)
        with Bar("Erasing sessions", found) as bar:
            erased = await _erase(storage, user_id, chatbot, bar)
        # Even when nothing was found: an erasure may have been broken off just before this.
        await storage.reclaim()
    click.echo(json.dumps({"sessions": erased}) if as_json else f"Erased {_sessions(erased)}")


async def _erase(storage: Storage, user_id: str, chatbot: Chatbot | None, bar: Bar) -> int:
    """Erases until there is nothing more, also of sessions that are made meanwhile."""
    erased, before = 0, -1
    while erased > before:
        before = erased
        async for page in _of_user(storage, user_id, chatbot):
            for start in range(0, len(page), AT_ONCE):
                gone = await asyncio.gather(
                    *(storage.delete_session(s.id, s.chatbot_id) for s in page[start:][:AT_ONCE])
                )
                erased += sum(gone)
                bar.to(erased)
    return erased


async def _of_user(
    storage: Storage, user_id: str, chatbot: Chatbot | None
) -> AsyncIterator[list[Session]]:
    """A user's sessions, in pages."""
    after: str | None = None
    bot = None if chatbot is None else chatbot.id
    while page := await storage.list_sessions(
        limit=PAGE, after=after, user_id=user_id, chatbot_id=bot
    ):
        after = page[-1].id
        yield list(page)


@click.command()
@click.argument("bot", required=False)
@config_option
@json_option
@asynchronous
async def retention(bot: str | None, config_path: Path | None, as_json: bool) -> None:
    """Erase the sessions that are older than their chatbot's retention_days, now.

    A server does the same at its start and every hour. BOT is an id or a name; else it is all.
    """
    async with _opened(config_path) as storage:
        chatbots = [await find_chatbot(storage, bot)] if bot else await storage.list_chatbots()
        with Bar("Erasing sessions") as bar:
            erased = await enforce(storage, chatbots, bar.to)
    if as_json:
        click.echo(json.dumps(dict(erased)))
        return
    for chatbot in chatbots:
        if (days := chatbot.settings.retention_days) is not None:
            told = _sessions(erased[chatbot.id])
            click.echo(
                f'"{chatbot.name}": erased {told} older than {days} day{"s" if days != 1 else ""}'
            )
    if not erased:
        click.echo(
            "Nothing is erased by its age: `chatd bots set BOT --retention-days DAYS` says so.",
            err=True,
        )


def _sessions(number: int) -> str:
    return "1 session" if number == 1 else f"{number:,} sessions"
