"""OpenRouter: OpenAI's chat completions with attribution, sticky caching, routing and costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import chatd

from .openai_compatible import (
    BASE_URL,
    HEADER_VALUE,
    PARAMETERS,
    ChatCompletions,
    CompletionAnswer,
)

DEFAULT_BASE_URL = "https://openrouter.ai/api/v1"
_ID = re.compile(r"[!-~]{1,200}")


class OpenRouter(ChatCompletions):
    """`ChatCompletions` with what only OpenRouter takes and tells."""

    check_path = "/key"

    def checks_out(self, told: Any) -> bool:
        return isinstance(told, dict) and isinstance(told.get("data"), dict)

    def body(self, request: chatd.ProviderRequest) -> dict[str, Any]:
        body = super().body(request)
        # Usage with its cost comes unasked; `stream_options` means nothing to OpenRouter.
        body.pop("stream_options", None)
        if request.session_id is not None:
            body.setdefault("session_id", request.session_id)
        if models := request.options.get("models"):
            body["models"] = models
        if preferences := request.options.get("provider"):
            # Key by key, so that a server's "data_collection: deny" holds for its chatbots.
            of_server = body.get("provider")
            of_server = of_server if isinstance(of_server, Mapping) else {}
            body["provider"] = {**of_server, **_preferences(preferences)}
        return body

    def answer(self) -> chatd.HttpAnswer:
        return IdentifiedAnswer()

    async def generation(self, id: str) -> chatd.Usage | None:
        """What an answer took, by OpenRouter's own count; None while it does not know it yet.

        Raises `ProviderError` when OpenRouter cannot be asked.
        """
        try:
            value = await self.get(f"/generation?id={quote(id, safe='')}")
        except chatd.ProviderError as error:
            if error.status == 404:
                return None
            raise
        data = value.get("data") if isinstance(value, dict) else None
        if not isinstance(data, dict):
            return None
        count = chatd.HttpAnswer.count
        usage = chatd.Usage(
            input_tokens=count(data.get("native_tokens_prompt")),
            output_tokens=count(data.get("native_tokens_completion")),
            cached_tokens=count(data.get("native_tokens_cached")),
            reasoning_tokens=count(data.get("native_tokens_reasoning")),
            cost_usd=chatd.HttpAnswer.dollars(data.get("total_cost")),
        )
        return None if usage == chatd.Usage() else usage


def _preferences(given: Mapping[str, Any]) -> dict[str, Any]:
    """Provider preferences as the API takes them: prices are text there."""
    preferences = dict(given)
    if prices := given.get("max_price"):
        preferences["max_price"] = {
            name: price if isinstance(price, str) else format(Decimal(str(price)), "f")
            for name, price in prices.items()
        }
    return preferences


class IdentifiedAnswer(CompletionAnswer):
    """An answer with the id under which OpenRouter keeps what it took.

    The header `X-Generation-Id` has it before the first token; else each chunk does.
    """

    _identified = False

    def begin(self, headers: Mapping[str, str]) -> Iterable[chatd.Event]:
        return self._identify(headers.get("X-Generation-Id"))

    def read(self, value: dict[str, Any], part: str) -> Sequence[chatd.Event]:
        events = super().read(value, part)
        return events if self._identified else [*self._identify(value.get("id")), *events]

    def _identify(self, id: Any) -> Sequence[chatd.Event]:
        if not isinstance(id, str) or not _ID.fullmatch(id):
            return ()
        self._identified = True
        return (chatd.GenerationId(id),)


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

_FLAG = {"type": "boolean"}
_NAMES = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "string", "minLength": 1, "maxLength": 200},
}
_PRICE = {
    "type": ["number", "string"],
    "minimum": 0,
    "pattern": r"^[0-9]+(\.[0-9]+)?$",
    "x-error": "must be a price in dollars like 0.5",
}
_BY = {"enum": ["price", "throughput", "latency", "exacto"]}
_CUTOFF = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                name: {"type": "number", "minimum": 0} for name in ("p50", "p75", "p90", "p99")
            },
        },
    ]
}
_OPTIONS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        # The models that OpenRouter tries, in order, when the chatbot's own does not answer.
        "models": {**_NAMES, "maxItems": 10},
        # https://openrouter.ai/docs/guides/routing/provider-selection
        "provider": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "order": _NAMES,
                "only": _NAMES,
                "ignore": _NAMES,
                "allow_fallbacks": _FLAG,
                "require_parameters": _FLAG,
                "data_collection": {"enum": ["allow", "deny"]},
                "zdr": _FLAG,
                "enforce_distillable_text": _FLAG,
                "quantizations": _NAMES,
                "sort": {
                    "anyOf": [
                        _BY,
                        {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "by": _BY,
                                "partition": {"enum": ["model", "none"]},
                            },
                        },
                    ]
                },
                "max_price": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": dict.fromkeys(
                        ("prompt", "completion", "request", "image", "audio"), _PRICE
                    ),
                },
                "preferred_min_throughput": _CUTOFF,
                "preferred_max_latency": _CUTOFF,
            },
        },
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add(
        "openrouter",
        open_openrouter,
        _SETTINGS,
        "any model on openrouter.ai",
        options_schema=_OPTIONS,
    )
