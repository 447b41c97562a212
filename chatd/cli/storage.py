"""`chatd storage`."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import click

from chatd.cli.common import asynchronous, config_option, configured, json_option
from chatd.cli.places import NoPlace, Place, place_named
from chatd.cli.progress import Bar
from chatd.copying import Report, copy
from chatd.errors import ChatdError, StorageUnavailable
from chatd.storage import Storage

NAMED = 10
"""How many sessions that differ are named."""


class NotCopied(ChatdError):
    """Why nothing, or not everything, was copied."""


@click.group()
def storage() -> None:
    """Move what is stored."""


@storage.command("copy")
@click.option("--from", "from_", required=True, metavar="STORAGE", help="Where everything is.")
@click.option(
    "--to",
    required=True,
    metavar="STORAGE",
    help="Where it is to be. Each is a storage's name, or a configuration file that uses it.",
)
@config_option
@json_option
@asynchronous
async def copy_(from_: str, to: str, config_path: Path | None, as_json: bool) -> None:
    """Copy chatbots, sessions, messages and turns into another storage.

    What is there already is passed over: run it again after anything that broke it off.
    """
    in_force = configured(config_path)
    source, target = place_named(from_, in_force), place_named(to, in_force)
    if source.identity == target.identity:
        raise NotCopied(f"--from and --to are the same: {source}")
    source.require_files()
    async with AsyncExitStack() as stack:
        there = await _open("source", source, stack)
        here = await _open("target", target, stack)
        if not await there.list_chatbots():
            raise NoPlace(f"there is no chatbot in {source}, so nothing to copy")
        try:
            with Bar("Copying sessions") as bar:
                report = await copy(there, here, lambda sessions, _: bar.to(sessions))
        except StorageUnavailable as error:
            raise NotCopied(f"{error.detail}. Run it again; it goes on where it stopped") from error
    _tell(report, as_json)
    if report.different:
        sys.exit(1)


async def _open(side: str, place: Place, stack: AsyncExitStack) -> Storage:
    """Opens one side and asks whether it can be used, before anything is written."""
    opened = await stack.enter_async_context(place.patient().opened())
    try:
        await opened.check()
    except StorageUnavailable as error:
        raise NotCopied(f"the {side}, {place}, cannot be used: {error.detail}") from error
    return opened


def _tell(report: Report, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        there, here = dataclasses.asdict(report.source), dataclasses.asdict(report.target)
        width = max(6, *(len(f"{count:,}") for count in (*there.values(), *here.values())))
        click.echo(f"{'':8}  {'source':>{width}}  {'target':>{width}}")
        for name in there:
            click.echo(f"{name:8}  {there[name]:>{width},}  {here[name]:>{width},}")
    for told in report.changed:
        click.echo(told, err=True)
    for told in list(report.conflicts.values())[:NAMED]:
        click.echo(f"chatd: {told} in the target, and is left as it is there", err=True)
    different = [id for id in report.different if id not in report.conflicts]
    if different:
        named = ", ".join(different[:NAMED]) + (", …" if len(different) > NAMED else "")
        click.echo(
            f"chatd: {len(different)} sessions differ: {named}. If a server uses the source, stop "
            "it and run this again",
            err=True,
        )
