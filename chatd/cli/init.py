"""`chatd init`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from chatd.app import packaged_config
from chatd.config import find_config


@click.command()
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(force: bool) -> None:
    """Write a commented configuration, chatd.yaml, into this folder."""
    path = Path("chatd.yaml")
    if path.exists() and not force:
        click.echo(f"chatd: {path} exists already; --force replaces it", err=True)
        sys.exit(1)
    path.write_text(packaged_config().read_text(encoding="utf-8"), encoding="utf-8")
    found = find_config(None, Path(), packaged_config())
    named = "" if found == path else f" --config {path}"
    click.echo(
        f"Wrote {path}. Check it with `chatd check{named}`, start with `chatd serve{named}`."
    )
    if named:
        click.echo(f"Without {named.strip()} it is {found} that is used.", err=True)
