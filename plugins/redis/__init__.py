"""What processes share, in Redis or Valkey: one server, or a cluster.

Keys hold no address, no session and no API key: whoever is counted is named by a digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chatd

_INSTALL = "redis: redis-py is not installed. Type: pip install 'chatd[redis]'"


@chatd.hookimpl
def chatd_register_shared(register: chatd.SharedRegister) -> None:
    """Registers `redis`."""
    register.add("redis", open_redis, CONFIG_SCHEMA, "Redis or Valkey, for several processes")


async def open_redis(settings: Mapping[str, Any]) -> chatd.Shared:
    """Opens it without asking the server. Raises `chatd.PluginError`."""
    try:
        from .shared import RedisShared  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise chatd.PluginError(_INSTALL) from None
    return RedisShared(
        settings["url"],
        cluster=settings.get("cluster", False),
        prefix=settings.get("prefix", "chatd"),
        connections=settings.get("connections", 16),
    )


CONFIG_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["url"],
    "properties": {
        "url": {
            "type": "string",
            "pattern": "^((redis|valkey)s?|unix)://.+$",
            "x-error": "must be an address like redis://host:6379/0 or rediss://:password@host:6379",
        },
        "cluster": {"type": "boolean", "default": False},
        "prefix": {
            "type": "string",
            "pattern": "^[A-Za-z0-9._-]{1,64}$",
            "x-error": "must be 1 to 64 of A-Z a-z 0-9 . _ -",
            "default": "chatd",
        },
        "connections": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 16},
    },
}
