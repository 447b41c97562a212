"""`chatd usage`: what turns took, by chatbot and day, model or side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import click

from chatd.cli.common import asynchronous, config_option, configured, find_chatbot, json_option
from chatd.cli.places import place_in
from chatd.errors import ChatdError
from chatd.storage import UsageBy, UsageTotal

_COUNTS = ("completed", "failed", "stopped", "interrupted")
_TOKENS = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")


class BadDate(ChatdError):
    """A date on the command line that is none."""


@click.command()
@click.argument("bot", required=False)
@config_option
@click.option(
    "--by",
    type=click.Choice(get_args(UsageBy)),
    default="day",
    show_default=True,
    help="A row for each UTC day, for each model that answered, or for each side of split traffic.",
)
@click.option("--since", metavar="DATE", help="Turns that began on this UTC day or later.")
@click.option("--until", metavar="DATE", help="Turns that began on this UTC day or earlier.")
@json_option
@asynchronous
async def usage(
    bot: str | None,
    config_path: Path | None,
    by: UsageBy,
    since: str | None,
    until: str | None,
    as_json: bool,
) -> None:
    """Show the tokens and dollars that turns took, of a chatbot by id or name, or of all."""
    first, last = _day("--since", since), _day("--until", until)
    if first and last and first > last:
        raise BadDate(f"--since {since} is after --until {until}")
    place = place_in(configured(config_path))
    place.require_files()
    async with place.patient().opened() as storage:
        wanted = None if bot is None else await find_chatbot(storage, bot)
        totals = await storage.usage_totals(
            by=by,
            chatbot_id=None if wanted is None else wanted.id,
            since=first,
            until=last and last + timedelta(days=1),
        )
        names = {chatbot.id: chatbot.name for chatbot in await storage.list_chatbots()}
    if as_json:
        click.echo(json.dumps([_shown(total, by, names) for total in totals]))
    elif totals:
        _tell(totals, by, names)
    else:
        click.echo("No turn has ended that would be counted.", err=True)


def _day(option: str, text: str | None) -> datetime | None:
    """The start of a UTC day. Raises `BadDate`."""
    if text is None:
        return None
    try:
        day = datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
        if day.date().isoformat() == text and day.date() < date.max:
            return day
    except ValueError:
        pass
    raise BadDate(f"{option} {text}: must be a date like 2026-01-31")


def _shown(total: UsageTotal, by: UsageBy, names: dict[str, str]) -> dict[str, Any]:
    """A total as JSON."""
    figures = dataclasses.asdict(total)
    del figures["chatbot_id"], figures["key"]
    name = names.get(total.chatbot_id)
    return {"chatbot_id": total.chatbot_id, "name": name, by: total.key, **figures}


def _tell(totals: Sequence[UsageTotal], by: UsageBy, names: dict[str, str]) -> None:
    """Prints a table, with the sum of it where it has more than a row."""
    several = len({total.chatbot_id for total in totals}) > 1
    left = ["chatbot", by] if several else [by]
    counts = _COUNTS if by == "side" else ()
    head = [*left, "turns", *counts, "input", "output", "cached", "reasoning", "USD", "unknown"]
    head += ["up", "down"] if by == "side" else []
    rows = [head]
    for total in totals:
        name = names.get(total.chatbot_id, total.chatbot_id)
        rows.append([*([name] if several else []), _printable(total.key), *_cells(total, by)])
    if len(totals) > 1:
        rows.append([*(["all", ""] if several else ["all"]), *_cells(_sum(totals), by)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:<{width}}" if at < len(left) else f"{cell:>{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
    if unknown := sum(total.unknown_cost for total in totals):
        turns = "1 turn" if unknown == 1 else f"{unknown:,} turns"
        click.echo(f"The cost of {turns} is unknown and not in the sum.", err=True)


def _cells(total: UsageTotal, by: UsageBy) -> list[str]:
    counts = ("turns", *(_COUNTS if by == "side" else ()))
    cells = [f"{getattr(total, name):,}" for name in counts]
    cells += [_number(getattr(total, name)) for name in _TOKENS]
    cells += [
        "-" if total.cost_usd is None else f"{total.cost_usd:,.6f}",
        f"{total.unknown_cost:,}",
    ]
    return cells + ([f"{total.rated_up:,}", f"{total.rated_down:,}"] if by == "side" else [])


def _printable(key: str | None) -> str:
    """A key for the terminal; a model's name is a provider's word."""
    return "-" if key is None else "".join(c if c.isprintable() else "?" for c in key)


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _sum(totals: Sequence[UsageTotal]) -> UsageTotal:
    """All of them in one; what is unknown of all stays so."""
    known: dict[str, list[Any]] = {
        field.name: [v for total in totals if (v := getattr(total, field.name)) is not None]
        for field in dataclasses.fields(UsageTotal)
        if field.name not in ("chatbot_id", "key")
    }
    sums: dict[str, Any] = {name: sum(v) if v else None for name, v in known.items()}
    return UsageTotal("", None, **sums)
