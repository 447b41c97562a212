"""What processes would share, kept by each for itself: as without `shared` in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chatd


@chatd.hookimpl
def chatd_register_shared(register: chatd.SharedRegister) -> None:
    """Registers `memory`."""
    register.add("memory", open_memory, CONFIG_SCHEMA, "each process by itself")


async def open_memory(settings: Mapping[str, Any]) -> chatd.Shared:
    """Something that nobody else has; there is nothing to set."""
    assert not settings
    return chatd.MemoryShared()


CONFIG_SCHEMA = {"type": "object", "additionalProperties": False}
