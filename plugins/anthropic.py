"""Anthropic's Messages API, and servers that speak it.

chatd's terms are OpenAI's, so what is asked is put into Anthropic's here, and back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import chatd

from .openai_compatible import BASE_URL, HEADER_VALUE

DEFAULT_BASE_URL = "https://api.anthropic.com"
DEFAULT_VERSION = "2023-06-01"
DEFAULT_MAX_TOKENS = 4096

_Block = dict[str, Any]
_FINISH_REASONS: dict[str, chatd.FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]+);base64,", re.I)
_NOT_OF_AN_ID = re.compile(r"[^a-zA-Z0-9_-]")


class Anthropic(chatd.HttpProvider):
    """`chatd.Provider` over `POST {base_url}/v1/messages`.

    :param parameters: put into every request's body.
    :param max_tokens: the most tokens of an answer when the chatbot does not say; the API wants it.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"tools", "images"})
    path = "/v1/messages"
    check_path = "/v1/models"

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str],
        parameters: Mapping[str, Any],
        max_tokens: int,
        secrets: tuple[str, ...] = (),
    ) -> None:
        super().__init__(base_url, headers=headers, secrets=secrets)
        self._parameters = parameters
        self._max_tokens = max_tokens

    def body(self, request: chatd.ProviderRequest) -> dict[str, Any]:
        system, messages = _conversation(request.messages)
        body: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.max_output_tokens or self._max_tokens,
            "messages": messages,
            "stream": request.stream,
        }
        if system:
            body["system"] = system
        if request.temperature is not None:
            # OpenAI's scale ends at 2, this one at 1.
            body["temperature"] = min(request.temperature, 1)
        if request.user is not None:
            body["metadata"] = {"user_id": request.user}
        return {**body, **self._parameters, **_parameters(request.parameters, messages)}

    def answer(self) -> chatd.HttpAnswer:
        return MessageAnswer()


# What is asked


def _conversation(messages: Sequence[chatd.Message]) -> tuple[str, list[dict[str, Any]]]:
    """The system prompt, and the messages: the user's first, and never two of one role in a row."""
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role in ("system", "developer"):
            system += [message.content] if message.content.strip() else []
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = list(_blocks(message))
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    if turns and turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": [{"type": "text", "text": "(begins)"}]})
    if turns and turns[-1]["role"] == "assistant" and turns[-1]["content"][-1]["type"] == "text":
        # The API refuses an answer to go on from that ends in space.
        last = turns[-1]["content"][-1]
        last["text"] = last["text"].rstrip()
    return "\n\n".join(system), turns


def _blocks(message: chatd.Message) -> Iterator[_Block]:
    """The content of a message. Text of nothing but space is left out: the API refuses it."""
    if message.role == "tool":
        content = list(_content(message))
        result: _Block = {"type": "tool_result", "tool_use_id": _id(message.tool_call_id)}
        yield {**result, "content": content} if content else result
        return
    yield from _content(message)
    for call in message.tool_calls or ():
        function = call.get("function") or {}
        yield {
            "type": "tool_use",
            "id": _id(call.get("id")),
            "name": function.get("name", ""),
            "input": _input(function.get("arguments")),
        }


def _content(message: chatd.Message) -> Iterator[_Block]:
    whole = message.whole
    for part in [{"type": "text", "text": whole}] if isinstance(whole, str) else whole:
        if part.get("type") == "text":
            if str(part.get("text", "")).strip():
                yield {"type": "text", "text": part["text"]}
        elif part.get("type") == "image_url":
            image = part.get("image_url")
            url = str(image.get("url", "")) if isinstance(image, Mapping) else ""
            yield {"type": "image", "source": _source(url)}
        else:
            raise chatd.ProviderError(
                chatd.ProviderErrorKind.INVALID_REQUEST,
                "a part of a message is neither text nor an image",
            )


def _source(url: str) -> dict[str, str]:
    if found := _DATA_URL.match(url):
        data = url[found.end() :]
        return {"type": "base64", "media_type": found[1].lower(), "data": data}
    return {"type": "url", "url": url}


def _id(id: Any) -> str:
    """A call's id in the characters that the API takes, the same for the same id."""
    return _NOT_OF_AN_ID.sub("_", str(id or "")) or "_"


def _input(arguments: Any) -> dict[str, Any]:
    """The arguments of a call; those that a model wrote wrongly are kept as they are."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, TypeError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _parameters(given: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """OpenAI's parameters in Anthropic's terms; those that have no equal are left out."""
    body: dict[str, Any] = {}
    if (top_p := given.get("top_p")) is not None:
        body["top_p"] = top_p
    if stop := given.get("stop"):
        stops = [stop] if isinstance(stop, str) else stop
        body["stop_sequences"] = [text for text in stops if text.strip()]
    schema = _object(_object(given.get("response_format")).get("json_schema")).get("schema")
    if isinstance(schema, Mapping):
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    functions = [_object(tool.get("function")) for tool in given.get("tools") or ()]
    if functions:
        body["tools"] = [_tool(function) for function in functions]
        body["tool_choice"] = _choice(given)
    elif used := _tools_used(messages):
        # The API wants to know every tool that the conversation speaks of.
        body["tools"] = [_tool({"name": name}) for name in used]
        body["tool_choice"] = {"type": "none"}
    return body


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", **_object(function.get("parameters"))}
    tool: dict[str, Any] = {"name": function.get("name", ""), "input_schema": schema}
    if function.get("description"):
        tool["description"] = function["description"]
    if function.get("strict"):
        tool["strict"] = True
    return tool


def _choice(given: Mapping[str, Any]) -> dict[str, Any]:
    wanted = given.get("tool_choice")
    choice: dict[str, Any] = {"type": "auto"}
    if isinstance(wanted, Mapping):
        choice = {"type": "tool", "name": _object(wanted.get("function")).get("name", "")}
    elif wanted in ("none", "required"):
        choice = {"type": "any" if wanted == "required" else "none"}
    if given.get("parallel_tool_calls") is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    return choice


def _tools_used(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    blocks = [block for message in messages for block in message["content"]]
    return list(dict.fromkeys(block["name"] for block in blocks if block["type"] == "tool_use"))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# What is answered


class MessageAnswer(chatd.HttpAnswer):
    """An answer of the Messages API: its events, or a message in one piece.

    What begins with an unknown word is passed over: the API's versioning allows new ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, Any] = {}
        self._calls: dict[int, _Call] = {}

    def chunk(self, data: bytes) -> Iterable[chatd.Event]:
        event = self.json(data)
        match event.get("type"):
            case "content_block_delta":
                return self._delta(_index(event), _object(event.get("delta")))
            case "content_block_start":
                return self._start(_index(event), _object(event.get("content_block")))
            case "content_block_stop":
                return self._stop(_index(event))
            case "message_start":
                message = _object(event.get("message"))
                self.named(message.get("model"))
                self._count(message.get("usage"))
                if self.usage is not None:
                    # All that is known of an answer that is broken off later.
                    return (chatd.UsageReport(replace(self.usage, output_tokens=None)),)
            case "message_delta":
                self._count(event.get("usage"))
                self._ended(_object(event.get("delta")).get("stop_reason"))
            case "message_stop":
                self.is_whole = self.is_done = True
            case _:
                # A proxy may leave out the word.
                if event.get("error"):
                    raise chatd.ServiceError(event["error"])
        return ()

    def whole(self, value: dict[str, Any]) -> Iterable[chatd.Event]:
        if value.get("error"):
            raise chatd.ServiceError(value["error"])
        self.named(value.get("model"))
        self._count(value.get("usage"))
        self._ended(value.get("stop_reason"))
        events: list[chatd.Event] = []
        content = value.get("content")
        for index, block in enumerate(content if isinstance(content, list) else ()):
            events += self._start(index, _object(block))
            events += self._stop(index)
        return events

    def _start(self, index: int, block: Mapping[str, Any]) -> Sequence[chatd.Event]:
        match block.get("type"):
            case "text":
                return _text(chatd.TextDelta, block.get("text"))
            case "thinking":
                return _text(chatd.ReasoningDelta, block.get("thinking"))
            case "tool_use":
                call = self._calls[index] = _Call(len(self._calls), block.get("input"))
                id, name = block.get("id"), block.get("name")
                return [
                    chatd.ToolCallDelta(
                        call.place,
                        id if isinstance(id, str) and id else None,
                        name if isinstance(name, str) and name else None,
                    )
                ]
        return ()

    def _delta(self, index: int, delta: Mapping[str, Any]) -> Sequence[chatd.Event]:
        match delta.get("type"):
            case "text_delta":
                return _text(chatd.TextDelta, delta.get("text"))
            case "thinking_delta":
                return _text(chatd.ReasoningDelta, delta.get("thinking"))
            case "input_json_delta":
                text, call = delta.get("partial_json"), self._calls.get(index)
                # Calls of tools that the service runs itself are not the client's.
                if call is not None and isinstance(text, str) and text:
                    call.has_arguments = True
                    return [chatd.ToolCallDelta(call.place, arguments=text)]
        return ()

    def _stop(self, index: int) -> Sequence[chatd.Event]:
        call = self._calls.get(index)
        if call is None or call.has_arguments:
            return ()
        # Of a call without arguments nothing comes; OpenAI's clients parse them all the same.
        call.has_arguments = True
        return [chatd.ToolCallDelta(call.place, arguments=json.dumps(call.input))]

    def _ended(self, reason: Any) -> None:
        if isinstance(reason, str) and reason:
            self.is_whole = True
            self.reason = _FINISH_REASONS.get(reason, "other")

    def _count(self, usage: Any) -> None:
        """Takes counts; each is of the whole answer so far, so that the last one holds."""
        told = _object(usage)
        self._counts.update({name: value for name, value in told.items() if value is not None})
        if not told:
            return
        fresh, created, read = (
            self.count(self._counts.get(name))
            for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        )
        details = _object(self._counts.get("output_tokens_details"))
        self.usage = chatd.Usage(
            # Those of the cache are not among `input_tokens` here, as they are with OpenAI.
            input_tokens=None if fresh is None else fresh + (created or 0) + (read or 0),
            output_tokens=self.count(self._counts.get("output_tokens")),
            cached_tokens=read,
            reasoning_tokens=self.count(details.get("thinking_tokens")),
        )


def _index(event: Mapping[str, Any]) -> int:
    index = event.get("index")
    return index if isinstance(index, int) else -1


class _Call:
    """A call of a tool: its place among the calls, and whether its arguments have come."""

    def __init__(self, place: int, input: Any) -> None:
        self.place = place
        self.input = input if isinstance(input, dict) else {}
        self.has_arguments = False


def _text(
    kind: type[chatd.TextDelta] | type[chatd.ReasoningDelta], text: Any
) -> Sequence[chatd.Event]:
    return (kind(text),) if isinstance(text, str) and text else ()


async def open_anthropic(settings: Mapping[str, Any]) -> Anthropic:
    """Makes a client from the settings. Raises `PluginError` without a key."""
    key = settings.get("api_key") or ""
    if not key:
        raise chatd.PluginError(
            "anthropic: api_key is empty. Set ANTHROPIC_API_KEY in the environment or in .env "
            "(keys are made at https://console.anthropic.com/settings/keys), or do not enable this "
            "provider"
        )
    more = settings.get("headers", {})
    version = settings.get("version", DEFAULT_VERSION)
    return Anthropic(
        settings.get("base_url", DEFAULT_BASE_URL),
        headers={**more, "x-api-key": key, "anthropic-version": version},
        parameters=settings.get("parameters", {}),
        max_tokens=settings.get("max_tokens", DEFAULT_MAX_TOKENS),
        secrets=(key, *more.values()),
    )


_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["api_key"],
    "properties": {
        "api_key": {**HEADER_VALUE, "description": "An Anthropic API key."},
        "base_url": {
            **BASE_URL,
            "x-error": "must be an address like https://api.anthropic.com",
            "default": DEFAULT_BASE_URL,
            "description": "The address before /v1/messages.",
        },
        "version": {
            **HEADER_VALUE,
            "default": DEFAULT_VERSION,
            "description": "The version of the API (header anthropic-version).",
        },
        "max_tokens": {
            "type": "integer",
            "minimum": 1,
            "maximum": 10000000,
            "default": DEFAULT_MAX_TOKENS,
            "description": "The most tokens of an answer when the chatbot does not say.",
        },
        "headers": {
            "type": "object",
            "additionalProperties": HEADER_VALUE,
            "description": "Further headers of every request, like anthropic-beta.",
        },
        "parameters": {
            "type": "object",
            "description": "Put into the body of every request, in Anthropic's own terms.",
        },
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add("anthropic", open_anthropic, _SETTINGS, "Claude, by Anthropic's Messages API")
