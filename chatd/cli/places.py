"""Storages that a command names: which one, and where it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chatd.app import offers, open_used_storage, packaged_configs
from chatd.config import ConfigFile, Use
from chatd.errors import ChatdError, ConfigError
from chatd.registry import Registry, load_registry
from chatd.storage import Storage
from chatd.validation import did_you_mean, pointer

PATIENCE_SECONDS = 30
"""What a setting `timeout` is where whole sessions move, unless the configuration names one."""


class NoPlace(ChatdError):
    """There is nothing where a storage should be."""


@dataclass(frozen=True)
class Place:
    """A storage by its settings, not yet open.

    A plugin's schema says with `x-place` which settings tell where it is: "file" for a path,
    "address" for anything else.
    """

    use: Use
    registry: Registry

    @property
    def _properties(self) -> dict[str, Any]:
        schema = self.registry.storages[self.use.name].schema.document
        return dict(schema.get("properties", {}))

    def _told(self, kind: str) -> list[str]:
        return [
            str(self.use.settings.get(name, setting.get("default", "")))
            for name, setting in self._properties.items()
            if setting.get("x-place") == kind
        ]

    @property
    def files(self) -> list[Path]:
        """The files that it is in."""
        return [Path(path).resolve() for path in self._told("file")]

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for two that are one."""
        addresses = [_address(text).rpartition("://")[2] for text in self._told("address")]
        told = [*map(str, self.files), *addresses]
        if not told:
            defaults = {n: s["default"] for n, s in self._properties.items() if "default" in s}
            told = [json.dumps({**defaults, **self.use.settings}, sort_keys=True)]
        return (self.use.name, "".join(told))

    def __str__(self) -> str:
        told = [*map(str, self.files), *map(_address, self._told("address"))]
        return " ".join([self.use.name, "".join(told)]).strip()

    def require_files(self) -> None:
        """Raises `NoPlace` when there is no file to read; opening it would make one."""
        for path in self.files:
            if not path.is_file():
                raise NoPlace(f"there is no database at {path}")

    def patient(self) -> Place:
        """The same, with time for requests that carry much."""
        settings = self.use.settings
        if "timeout" not in self._properties or "timeout" in settings:
            return self
        use = Use(self.use.name, {**settings, "timeout": PATIENCE_SECONDS})
        return dataclasses.replace(self, use=use)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Storage]:
        """The storage, open. Raises `PluginError`."""
        storage = await open_used_storage(self.use, self.registry)
        try:
            yield storage
        finally:
            await storage.close()


def _address(text: str) -> str:
    """An address without what is secret in it, or of no account."""
    parts = urlsplit(text)
    if not parts.netloc:
        return text
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/")


def place_in(path: Path) -> Place:
    """The storage that a configuration file says. Raises `ConfigError`, `PluginError`."""
    file = ConfigFile.read(path)
    registry = load_registry(file.plugins.folder, file.plugins.disable)
    return Place(file.check_storage(offers(registry)), registry)


def place_named(name: str, in_force: Path) -> Place:
    """The storage of a command line: a configuration file, or a storage's name.

    A name takes its settings from the configuration in force if that uses it, else from one that
    chatd carries, else from the plugin's defaults. Raises `ConfigError`, `PluginError`.
    """
    if Path(name).is_file() or name.endswith((".yaml", ".yml")):
        return place_in(Path(name))
    file = ConfigFile.read(in_force)
    if file.storage_name == name:
        return place_in(in_force)
    registry = load_registry(file.plugins.folder, file.plugins.disable)
    if name not in registry.storages:
        known = sorted(registry.storages)
        hint = did_you_mean(name, known) or f"; there is {', '.join(known)}"
        raise ConfigError(
            [
                f'no plugin offers the storage "{name}"{hint}, and there is no such configuration file'
            ]
        )
    for path in packaged_configs():
        if (carried := ConfigFile.read(path)).storage_name == name:
            return Place(carried.check_storage(offers(registry)), registry)
    if faults := list(registry.storages[name].schema.faults({})):
        raise ConfigError(
            [f'storage "{name}": {pointer(path).strip("/")} {text}' for path, text in faults]
            + [f'name a configuration file that uses "{name}" in its place']
        )
    return Place(Use(name, {}), registry)
