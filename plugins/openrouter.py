"""OpenRouter: OpenAI's chat completions with attribution, sticky caching and costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chatd

from .openai_compatible import BASE_URL, HEADER_VALUE, PARAMETERS, ChatCompletions

DEFAULT_BASE_URL = "https://openrouter.ai/api/v1"


class OpenRouter(ChatCompletions):
    """`ChatCompletions` with what only OpenRouter takes and tells."""

    check_path = "/key"

    def body(self, request: chatd.ProviderRequest) -> dict[str, Any]:
        body = super().body(request)
        # Usage with its cost comes unasked; `stream_options` means nothing to OpenRouter.
        body.pop("stream_options", None)
        if request.session_id is not None:
            body.setdefault("session_id", request.session_id)
        return body


async def open_openrouter(settings: Mapping[str, Any]) -> OpenRouter:
    """Makes a client from the settings. Raises `PluginError` without a key."""
    key = settings.get("api_key") or ""
    if not key:
        raise chatd.PluginError(
            "openrouter: api_key is empty. Set OPENROUTER_API_KEY in the environment or in .env "
            "(keys are made at https://openrouter.ai/keys), or do not enable this provider"
        )
    title = settings.get("app_title", "chatd")
    # The first is the header's name now, the second its name before.
    headers = {"Authorization": f"Bearer {key}", "X-OpenRouter-Title": title, "X-Title": title}
    if url := settings.get("app_url"):
        headers["HTTP-Referer"] = url
    return OpenRouter(
        settings.get("base_url", DEFAULT_BASE_URL),
        headers=headers,
        parameters=settings.get("parameters", {}),
        secrets=(key,),
    )


_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["api_key"],
    "properties": {
        "api_key": {**HEADER_VALUE, "description": "An OpenRouter API key."},
        "base_url": {**BASE_URL, "default": DEFAULT_BASE_URL},
        "app_title": {
            **HEADER_VALUE,
            "default": "chatd",
            "description": "What OpenRouter's rankings call this server (X-Title).",
        },
        "app_url": {
            **HEADER_VALUE,
            "description": "The address of your site, for the same rankings (HTTP-Referer).",
        },
        "parameters": PARAMETERS,
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add("openrouter", open_openrouter, _SETTINGS, "any model on openrouter.ai")
