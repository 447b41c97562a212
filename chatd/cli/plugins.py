"""`chatd plugins`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from chatd.cli.common import config_option, configured, json_option, reports_errors
from chatd.config import ConfigFile
from chatd.offers import Offer
from chatd.registry import Registry, load_registry


@click.command()
@config_option
@json_option
@reports_errors
def plugins(config_path: Path | None, as_json: bool) -> None:
    """List the plugins: what each offers, where it comes from and which hooks it implements."""
    wanted = ConfigFile.read(configured(config_path)).plugins
    registry = load_registry(wanted.folder, wanted.disable)
    rows = [
        {
            "name": plugin.name,
            "source": plugin.source,
            "hooks": list(plugin.hooks),
            "offers": _offers(registry, plugin.name),
        }
        for plugin in registry.plugins
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['name']}  ({row['source']})")
        for offer in row["offers"]:
            click.echo(f"    {offer}")
        click.echo(f"    hooks: {', '.join(row['hooks']) or 'none'}")


def _offers(registry: Registry, plugin: str) -> list[str]:
    """One line for each thing that the plugin offers."""
    kinds: dict[str, Iterable[Offer[Any]]] = {
        "storage": registry.storages.values(),
        "provider": registry.providers.values(),
        "interceptor": registry.interceptors.values(),
        "shared": registry.shared.values(),
    }
    return [
        f"{kind} {offer.name}: {offer.description}"
        for kind, offers in kinds.items()
        for offer in offers
        if offer.plugin == plugin
    ]
