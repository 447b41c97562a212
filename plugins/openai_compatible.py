"""Any server that speaks OpenAI's chat completions: LiteLLM, vLLM, llama.cpp, Ollama and others.

The wire format is here once; `openrouter` builds on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import chatd

_FINISH_REASONS: dict[str, chatd.FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


class ChatCompletions(chatd.HttpProvider):
    """`chatd.Provider` over `POST {base_url}/chat/completions`.

    :param parameters: put into every request's body.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"tools", "images"})
    path = "/chat/completions"
    check_path = "/models"

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str],
        parameters: Mapping[str, Any],
        secrets: tuple[str, ...] = (),
    ) -> None:
        super().__init__(base_url, headers=headers, secrets=secrets)
        self._parameters = parameters

    def body(self, request: chatd.ProviderRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [
                # Most are no more than that, and there are many.
                {"role": message.role, "content": message.content}
                if message.parts is None
                and message.tool_calls is None
                and message.tool_call_id is None
                else _message(message)
                for message in request.messages
            ],
            "stream": request.stream,
        }
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        if request.max_output_tokens is not None:
            body["max_tokens"] = request.max_output_tokens
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.user is not None:
            body["user"] = request.user
        return {**body, **self._parameters, **request.parameters}

    def answer(self) -> chatd.HttpAnswer:
        return CompletionAnswer()


def _message(message: chatd.Message) -> dict[str, Any]:
    """The JSON of a message that is more than text."""
    value: dict[str, Any] = {"role": message.role, "content": message.whole}
    if message.tool_calls:
        value["content"] = message.whole or None
        value["tool_calls"] = message.tool_calls
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    return value


class CompletionAnswer(chatd.HttpAnswer):
    """An answer in OpenAI's format: chunks with a `delta`, or one piece with a `message`."""

    def chunk(self, data: bytes) -> Iterable[chatd.Event]:
        if data.strip() == b"[DONE]":
            self.is_whole = self.is_done = True
            return ()
        return self.read(self.json(data), "delta")

    def whole(self, value: dict[str, Any]) -> Iterable[chatd.Event]:
        events = self.read(value, "message")
        if value.get("choices"):
            self.is_whole = True
        return events

    def read(self, value: dict[str, Any], part: str) -> Sequence[chatd.Event]:
        """The events of a chunk, or of an answer in one piece."""
        if value.get("error"):
            raise chatd.ServiceError(value["error"])
        self.named(value.get("model"))
        if isinstance(usage := value.get("usage"), dict):
            self.usage = _usage(usage)
        choices = value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        return self._choice(choice, part) if isinstance(choice, dict) else ()

    def _choice(self, choice: dict[str, Any], part: str) -> Sequence[chatd.Event]:
        reason = choice.get("finish_reason")
        if choice.get("error") or "error" in (reason, choice.get("native_finish_reason")):
            raise chatd.ServiceError(choice.get("error") or "finish_reason error")
        events: list[chatd.Event] = []
        said = choice.get(part)
        if isinstance(said, dict):
            if thought := _text(said.get("reasoning") or said.get("reasoning_content")):
                events.append(chatd.ReasoningDelta(thought))
            if text := _text(said.get("content")):
                events.append(chatd.TextDelta(text))
            if isinstance(calls := said.get("tool_calls"), list):
                events += [_tool_call(c, i) for i, c in enumerate(calls) if isinstance(c, dict)]
        if isinstance(reason, str) and reason and not self.is_whole:
            self.is_whole = True
            self.reason = _FINISH_REASONS.get(reason, "other")
        return events


def _tool_call(call: dict[str, Any], place: int) -> chatd.ToolCallDelta:
    """A part of a tool call; `place` is its index where none is told, as in an answer in one piece."""
    index, function = call.get("index"), call.get("function")
    told = function if isinstance(function, dict) else {}
    id, name, arguments = call.get("id"), told.get("name"), told.get("arguments")
    index = index if isinstance(index, int) else place
    if not 0 <= index < chatd.MAX_TOOL_CALLS:
        raise chatd.ProviderError(
            chatd.ProviderErrorKind.PROTOCOL, "a tool call without a place", reached_model=True
        )
    return chatd.ToolCallDelta(
        index,
        id if isinstance(id, str) and id else None,
        name if isinstance(name, str) and name else None,
        # Some servers send the arguments themselves instead of their JSON text.
        json.dumps(arguments) if isinstance(arguments, dict) else _text(arguments),
    )


def _text(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def _usage(value: dict[str, Any]) -> chatd.Usage:
    prompt, completion = value.get("prompt_tokens_details"), value.get("completion_tokens_details")
    count = chatd.HttpAnswer.count
    return chatd.Usage(
        input_tokens=count(value.get("prompt_tokens")),
        output_tokens=count(value.get("completion_tokens")),
        cached_tokens=count(prompt.get("cached_tokens")) if isinstance(prompt, dict) else None,
        reasoning_tokens=count(completion.get("reasoning_tokens"))
        if isinstance(completion, dict)
        else None,
        cost_usd=chatd.HttpAnswer.dollars(value.get("cost")),
    )


async def open_openai_compatible(settings: Mapping[str, Any]) -> ChatCompletions:
    """Makes a client from the settings."""
    key = settings.get("api_key") or ""
    headers = dict(settings.get("headers", {}))
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return ChatCompletions(
        settings["base_url"],
        headers=headers,
        parameters=settings.get("parameters", {}),
        secrets=(key, *settings.get("headers", {}).values()),
    )


BASE_URL = {
    "type": "string",
    "pattern": "^https?://[^\\s?#]+$",
    "x-error": "must be an address like http://127.0.0.1:11434/v1",
    "description": "The address up to and including the version, like http://127.0.0.1:11434/v1.",
}
PARAMETERS = {
    "type": "object",
    "description": "Put into the body of every request, like {top_p: 0.9}.",
}
HEADER_VALUE = {
    "type": "string",
    "pattern": "^[ -~]*$",
    "x-error": "must be visible ASCII characters, as in a header",
}
_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["base_url"],
    "properties": {
        "base_url": BASE_URL,
        "api_key": {
            **HEADER_VALUE,
            "type": ["string", "null"],
            "description": "Sent as a bearer token; leave it out where none is needed.",
        },
        "headers": {
            "type": "object",
            "additionalProperties": HEADER_VALUE,
            "description": "Further headers of every request.",
        },
        "parameters": PARAMETERS,
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add(
        "openai_compatible",
        open_openai_compatible,
        _SETTINGS,
        "any server with OpenAI's /chat/completions",
    )
