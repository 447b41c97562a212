"""A provider without a model: it repeats what it was told, and says that it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import chatd

_REPLY = (
    "This is an echo, not a model: no model provider is set up here. You said: {message}\n\n"
    "Set OPENROUTER_API_KEY and start chatd again to get answers."
)


class EchoProvider:
    """Answers `reply`, in which `{message}` stands for the last thing said, word by word."""

    def __init__(self, reply: str, word_seconds: float) -> None:
        self._reply = reply
        self._word_seconds = word_seconds

    async def stream(self, request: chatd.ProviderRequest) -> AsyncGenerator[chatd.Event, None]:
        said = request.messages[-1].content if request.messages else ""
        text = self._reply.replace("{message}", said)
        # Told first, so that it is known of an answer that is stopped too.
        yield chatd.UsageReport(chatd.Usage(cost_usd=0.0))
        words = text.split(" ")
        for i, word in enumerate(words):
            if self._word_seconds:
                await asyncio.sleep(self._word_seconds)
            if delta := word if i == 0 else f" {word}":
                yield chatd.TextDelta(delta)
        yield chatd.Finish("stop", "echo")

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def open_echo(settings: Mapping[str, Any]) -> EchoProvider:
    """Makes an echo from the settings."""
    return EchoProvider(settings.get("reply", _REPLY), settings.get("word_seconds", 0))


_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "reply": {
            "type": "string",
            "minLength": 1,
            "description": "What to answer; {message} stands for what was said.",
        },
        "word_seconds": {
            "type": "number",
            "minimum": 0,
            "maximum": 60,
            "default": 0,
            "description": "How long each word takes, to try out slow answers.",
        },
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add("echo", open_echo, _SETTINGS, "no model: it repeats what it is told")
