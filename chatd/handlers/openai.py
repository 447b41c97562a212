"""OpenAI's chat completions: the same turns for clients that speak that dialect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import orjson

from chatd.domain import Chatbot, Message, Session, TurnStatus, Usage, canonical_id, new_id, text_of
from chatd.errors import (
    BudgetExhausted,
    Fault,
    IdempotencyKeyReused,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProviderFailed,
    ProviderTimeout,
    RateLimited,
    RequestError,
    ShuttingDown,
    StorageUnavailable,
    TurnInProgress,
    TurnRefused,
)
from chatd.handlers.base import ApiHandler, Operation, Route, UnknownPathHandler
from chatd.handlers.problems import problem_body, problem_of
from chatd.handlers.streaming import IDEMPOTENCY_KEY, MAX_WRITE_CHARS, TurnHandler
from chatd.provider import ToolCallDelta
from chatd.reply import Reply, TurnResult, whole_calls
from chatd.turns import Extras

DEFAULT_MODEL = "default"
"""What a client may call the model of every chatbot."""

PASSED_ON = (
    "frequency_penalty",
    "logit_bias",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning_effort",
    "response_format",
    "seed",
    "stop",
    "tool_choice",
    "tools",
    "top_p",
    "verbosity",
)
"""What goes to the provider as it is."""

_EVENTS = (
    "OpenAI's chunks: `data:` lines with a `chat.completion.chunk`, and `data: [DONE]` last. A "
    "failure in mid-stream is a `data:` line with an `error`."
)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: RequestError, request_id: str) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    status = problem_of(error).status
    faults = [(_parameter(fault.pointer), fault.message) for fault in error.errors]
    said = "; ".join(f"{parameter}: {message}" for parameter, message in faults)
    return {
        "error": {
            "message": said or problem_body(error, request_id)["detail"],
            "type": "server_error"
            if status >= 500
            else _TYPES.get(status, "invalid_request_error"),
            "param": faults[0][0] if faults else None,
            "code": _code(error),
        }
    }


def _code(error: RequestError) -> str:
    """OpenAI's word where it has one, else chatd's."""
    if isinstance(error, RateLimited):
        return "rate_limit_exceeded"
    return "model_not_found" if isinstance(error, NotFound) and error.errors else error.code


def _parameter(pointer: str) -> str:
    """`/messages/0/content` as OpenAI writes it: `messages[0].content`."""
    words = pointer.split("/")[1:]
    return "".join(f"[{w}]" if w.isdigit() else f".{w}" for w in words).removeprefix(".")


class OpenAIHandler(ApiHandler):
    """A handler whose errors are OpenAI's."""

    error_type = "application/json"

    def error_body(self, error: RequestError) -> dict[str, Any]:
        return error_body(error, self.request_id)

    async def tenant(self) -> Chatbot:
        """The chatbot of the request's key. Raises `InvalidApiKey`."""
        try:
            chatbot = await self.services.access.client_by_key(self.api_key({}))
        except InvalidApiKey:
            detail = "The API key is missing or wrong. Send it as `Authorization: Bearer …`."
            raise InvalidApiKey(detail) from None
        return self.serve_chatbot(chatbot, check_origin=False)


class UnknownOpenAIPathHandler(OpenAIHandler, UnknownPathHandler):
    """Answers every other path under `/v1`."""


class ModelsHandler(OpenAIHandler):
    """`GET /v1/models`."""

    async def get(self) -> None:
        chatbot = await self.tenant()
        created = int(chatbot.created_at.timestamp()) if chatbot.created_at else 0
        self.answer(
            {
                "object": "list",
                "data": [
                    {"id": name, "object": "model", "created": created, "owned_by": "chatd"}
                    for name in _names(chatbot)
                ],
            }
        )


def _names(chatbot: Chatbot) -> list[str]:
    """What a client may call the chatbot's model."""
    return list(dict.fromkeys([chatbot.model, chatbot.name, DEFAULT_MODEL]))


class ChatCompletionsHandler(OpenAIHandler, TurnHandler):
    """`POST /v1/chat/completions`."""

    async def post(self) -> None:
        chatbot = await self.tenant()
        body = self.body()
        if body["model"] not in _names(chatbot):
            unknown = "this key's chatbot has no such model; GET /v1/models lists its names"
            raise NotFound(errors=[Fault("/model", unknown)])
        messages = [_message(message) for message in body["messages"]]
        _require_allowed(chatbot, body, messages)
        key = self.idempotency_key()
        metadata = dict(body.get("metadata") or {})
        session_id = metadata.pop("session_id", None)
        new = _new(messages)
        extras = Extras(
            given=messages if session_id is None else _tail(messages, new),
            parameters={k: body[k] for k in PASSED_ON if body.get(k) is not None},
            temperature=body.get("temperature"),
            max_output_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
        )
        self.services.turns.require(chatbot, extras)
        stream = self.wants_events(body)
        async with self.admitted("turns", key=""):
            started = await self.services.turns.start(
                chatbot,
                await self._session(chatbot, session_id, body.get("user"), metadata),
                new,
                label="openai",
                stream=stream,
                idempotency_key=None if session_id is None else key,
                extras=extras,
            )
        if stream:
            self.tell_replayed(started)
            options = body.get("stream_options") or {}
            format = ChatCompletionChunks(
                started.reply,
                chatbot.model,
                usage=bool(options.get("include_usage")),
                request_id=self.request_id,
            )
            await self.stream(started.reply, format)
            return
        result = await self.whole(started)
        if result.error is not None:
            # A part of an answer would be taken for the whole.
            raise result.error
        self.answer(_completion(result, started.reply, chatbot.model))

    async def _session(
        self,
        chatbot: Chatbot,
        session_id: str | None,
        user_id: str | None,
        metadata: Mapping[str, Any],
    ) -> str:
        """The session that the client names, else one of the call's own. Raises `NotFound`."""
        if session_id is not None:
            if (known := canonical_id(session_id)) is None:
                raise NotFound("This chatbot has no session with this id.")
            return known
        session = Session(new_id(), chatbot.id, "api", user_id, metadata)
        await self.services.storage.create_session(session)
        return session.id


def _message(value: Mapping[str, Any]) -> Message:
    """A message of the request."""
    content = value.get("content") or ""
    parts = None
    if not isinstance(content, str):
        parts = content if any(part["type"] != "text" for part in content) else None
        content = text_of(content) if parts else "\n".join(part["text"] for part in content)
    return Message(
        value["role"],
        content,
        parts,
        value.get("tool_calls") or None,
        value.get("tool_call_id"),
    )


def _new(messages: Sequence[Message]) -> list[Message]:
    """What the user says after the last answer."""
    end = takewhile(lambda message: message.role != "assistant", reversed(messages))
    return [message for message in end if message.role == "user" and message.content][::-1]


def _tail(messages: Sequence[Message], new: Sequence[Message]) -> Sequence[Message]:
    """What a session does not have yet: what the user says, or the tools that were called for it.

    Raises `InvalidRequest` when there is neither.
    """
    after = next((i for i in range(len(messages), 0, -1) if messages[i - 1].role == "assistant"), 0)
    if any(message.role == "tool" for message in messages[after:]):
        asked = max((i for i in range(after) if messages[i].role == "user"), default=-1)
        while asked > 0 and messages[asked - 1].role == "user":
            asked -= 1
        kept = ("user", "assistant", "tool")
        return [message for message in messages[max(asked, 0) :] if message.role in kept]
    if not new:
        fault = Fault(f"/messages/{len(messages) - 1}/role", "must be the user's or a tool's")
        raise InvalidRequest(errors=[fault])
    return new


def _require_allowed(
    chatbot: Chatbot, body: Mapping[str, Any], messages: Sequence[Message]
) -> None:
    """Raises `InvalidRequest` for what the chatbot's operator forbids."""
    settings = chatbot.settings
    faults: list[Fault] = []
    if not settings.allow_tools and body.get("tools"):
        faults.append(Fault("/tools", "this chatbot takes no tools"))
    for i, message in enumerate(messages):
        if not settings.allow_tools and (message.role == "tool" or message.tool_calls):
            faults.append(Fault(f"/messages/{i}", "this chatbot takes no tools"))
        if not settings.allow_images and message.parts:
            faults.append(Fault(f"/messages/{i}/content", "this chatbot takes no images"))
    if faults:
        raise InvalidRequest(errors=faults)


# Answers


def _completion(result: TurnResult, reply: Reply, model: str) -> dict[str, Any]:
    """An answer in one piece; `model` is named when the provider names none."""
    message: dict[str, Any] = {"role": "assistant", "content": result.reply or None}
    if calls := whole_calls(reply):
        message["tool_calls"] = [
            {
                "id": call.id or _call_id(reply, call),
                "type": "function",
                "function": {"name": call.name or "", "arguments": call.arguments},
            }
            for call in calls
        ]
    choice = {"index": 0, "message": message, "finish_reason": _reason(result, reply)}
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{result.turn_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.model or model,
        "choices": [choice],
    }
    if (usage := _usage(result.usage)) is not None:
        answer["usage"] = usage
    return answer


def _call_id(reply: Reply, call: ToolCallDelta) -> str:
    """An id for a call to which the provider gave none."""
    return f"call_{reply.turn_id}_{call.index}"


def _reason(result: TurnResult, reply: Reply) -> str:
    """How the answer ended, in OpenAI's words."""
    known = ("stop", "length", "content_filter", "tool_calls")
    reason = result.finish_reason if result.finish_reason in known else "stop"
    stopped = result.status is TurnStatus.STOPPED
    return "tool_calls" if reply.tool_calls and reason == "stop" and not stopped else str(reason)


def _usage(usage: Usage) -> dict[str, Any] | None:
    """What the answer took; None when the provider did not count it."""
    if usage.input_tokens is None or usage.output_tokens is None:
        return None
    told: dict[str, Any] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    if usage.cached_tokens is not None:
        told["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return told


class ChatCompletionChunks:
    """OpenAI's stream of chunks.

    :param model: named until the provider has said which one answers.
    :param usage: whether a chunk tells what the answer took.
    :param request_id: what an error names, for the log.
    """

    headers: Mapping[str, str] = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "X-Accel-Buffering": "no",
    }

    def __init__(self, reply: Reply, model: str, *, usage: bool, request_id: str) -> None:
        self.is_done = False
        self._reply = reply
        self._model = model
        self._usage = usage
        self._request_id = request_id
        self._created = int(time.time())
        self._began = False
        self._place = 0
        self._calls = 0
        self._call_place = 0
        self._called: set[int] = set()

    def advance(self) -> bytes:
        events: list[bytes] = []
        if not self._began:
            self._began = True
            events.append(self._delta({"role": "assistant", "content": ""}))
        result = self._reply.result
        if text := self._reply.text_from(self._place, MAX_WRITE_CHARS):
            self._place += len(text)
            events.append(self._delta({"content": text}))
        elif self._calls < len(self._reply.tool_calls):
            events.append(self._delta({"tool_calls": [self._call()]}))
        elif result is not None and not self.is_done:
            self.is_done = True
            events += [*self._end(result), b"data: [DONE]\n\n"]
        return b"".join(events)

    def _call(self) -> dict[str, Any]:
        """Some more of the tool calls: a piece of the next delta, or the whole of it."""
        delta = self._reply.tool_calls[self._calls]
        piece = delta.arguments[self._call_place : self._call_place + MAX_WRITE_CHARS]
        self._call_place += len(piece)
        if self._call_place >= len(delta.arguments):
            self._calls += 1
            self._call_place = 0
        if delta.index in self._called:
            return {"index": delta.index, "function": {"arguments": piece}}
        self._called.add(delta.index)
        return {
            "index": delta.index,
            "id": delta.id or _call_id(self._reply, delta),
            "type": "function",
            "function": {"name": delta.name or "", "arguments": piece},
        }

    def _end(self, result: TurnResult) -> list[bytes]:
        if result.error is not None:
            return [_event(error_body(result.error, self._request_id))]
        self._model = result.model or self._model
        events = [self._delta({}, _reason(result, self._reply))]
        if self._usage and (usage := _usage(result.usage)) is not None:
            events.append(self._chunk([], usage=usage))
        return events

    def _delta(self, delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return self._chunk([choice], **({"usage": None} if self._usage else {}))

    def _chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        return _event(
            {
                "id": f"chatcmpl-{self._reply.turn_id}",
                "object": "chat.completion.chunk",
                "created": self._created,
                "model": self._model,
                "choices": choices,
                **more,
            }
        )


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(value)


ROUTES = [
    Route(
        "/v1/chat/completions",
        ChatCompletionsHandler,
        {
            "POST": Operation(
                summary="Say something in OpenAI's dialect",
                description="For clients of OpenAI's API: the key is the chatbot's. Each call is "
                "a session of its own, unless `metadata` names one with `session_id`.",
                auth="api_key",
                request="chat_completions_request",
                response="chat_completion",
                events=_EVENTS,
                parameters=(IDEMPOTENCY_KEY,),
                errors=(
                    InvalidApiKey,
                    NotFound,
                    IdempotencyKeyReused,
                    TurnRefused,
                    TurnInProgress,
                    RateLimited,
                    BudgetExhausted,
                    ProviderFailed,
                    ProviderTimeout,
                    StorageUnavailable,
                    Overloaded,
                    ShuttingDown,
                ),
                problem="openai_error",
            )
        },
        tag="REST",
    ),
    Route(
        "/v1/models",
        ModelsHandler,
        {
            "GET": Operation(
                summary="The names of the chatbot's model",
                auth="api_key",
                response="model_list",
                errors=(InvalidApiKey, StorageUnavailable),
                problem="openai_error",
            )
        },
        tag="REST",
    ),
]
