"""Storage in one SQLite file: the embedded default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chatd

from .storage import SQLiteStorage


async def open_sqlite(settings: Mapping[str, Any]) -> SQLiteStorage:
    """Opens the database that the settings name, and makes it when it does not exist."""
    storage = SQLiteStorage(
        Path(settings.get("path", "chatd.db")),
        synchronous=settings.get("synchronous", "full"),
        busy_timeout=settings.get("busy_timeout", 5),
    )
    await storage.open()
    return storage


_SETTINGS: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "path": {
            "type": "string",
            "minLength": 1,
            "default": "chatd.db",
            "description": "The file, relative to the folder that chatd runs in.",
            "x-place": "file",
        },
        "synchronous": {
            "enum": ["full", "normal", "off"],
            "default": "full",
            "description": (
                "What a turn waits for: `full` survives a power cut, `normal` may lose the last "
                "turns in one (not in a crash of chatd), `off` may damage the file in one."
            ),
        },
        "busy_timeout": {
            "type": "number",
            "minimum": 0,
            "maximum": 60,
            "default": 5,
            "description": "Seconds to wait while another process writes.",
        },
        "allow_ephemeral": {
            "type": "boolean",
            "default": False,
            "description": "Run on a Heroku dyno although its disk is wiped daily.",
        },
    },
}


_WIPED = (
    "must be true: a dyno's disk is wiped at least once a day, and every conversation with it. "
    "Use a storage elsewhere, or set storage.allow_ephemeral: true if losing it is fine"
)


def _settings_on_a_dyno() -> dict[str, Any]:
    """The settings where the disk does not last: SQLite must be told that this is fine."""
    told = {**_SETTINGS["properties"]["allow_ephemeral"], "const": True}
    told |= {"x-error": _WIPED, "x-required": _WIPED}
    properties = {**_SETTINGS["properties"], "allow_ephemeral": told}
    return {**_SETTINGS, "required": ["allow_ephemeral"], "properties": properties}


_ONE_WRITER = (
    "a SQLite file has one writer at a time: turns of several processes would wait for each "
    "other's commits instead of sharing them. Use one worker, or supabase or postgres"
)


@chatd.hookimpl
def chatd_register_storage(register: chatd.StorageRegister) -> None:
    settings = _settings_on_a_dyno() if os.environ.get("DYNO") else _SETTINGS
    register.add(
        "sqlite",
        open_sqlite,
        settings,
        "one file on this machine's disk (WAL)",
        single_process=_ONE_WRITER,
    )
