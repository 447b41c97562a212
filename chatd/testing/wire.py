"""Wire formats, from the service's side: what a faulty one sends, for `FaultConformance`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from chatd.domain import Usage
from chatd.errors import ProviderErrorKind
from chatd.testing.fake_provider import http_response, sse

MODEL = "answering/model"
"""The model that says it answers, unless a test has another."""

USAGE = Usage(input_tokens=11, output_tokens=3)
"""What each answer says that it took."""

_Kind = ProviderErrorKind


class WireFormat(Protocol):
    """How a service says things over HTTP. Bytes of streams are whole server-sent events.

    A stream is `start`, any number of `said`, and `end`. `upstream` in messages stands for words
    that no client may see.
    """

    def whole(self, text: str, *, model: str = MODEL) -> bytes:
        """An answer in one piece, as an HTTP response. An empty text is an answer without one."""

    def start(self, *, model: str = MODEL) -> bytes:
        """How a stream begins, before anything is said."""

    def said(self, text: str) -> bytes:
        """Some text in a stream."""

    def thought(self, text: str) -> bytes:
        """Something that the model thinks and does not answer; empty where there is no such thing."""

    def end(self) -> bytes:
        """How a stream ends well, with what it took."""

    def ends(self) -> Mapping[str, bytes]:
        """Other ends of a stream that are as good, by what is special about them."""

    def failures(self, upstream: str) -> Mapping[str, tuple[bytes, ProviderErrorKind]]:
        """Ways to say in a stream that it failed, each with its kind."""

    def empties(self) -> Mapping[str, bytes]:
        """Streams that end well without a word in them, without their start."""

    def error(self, kind: ProviderErrorKind, upstream: str) -> tuple[int, Mapping[str, Any]]:
        """Status and body of an error of this kind."""


class OpenAIWire:
    """OpenAI's chat completions."""

    def whole(self, text: str, *, model: str = MODEL) -> bytes:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return http_response(200, {"model": model, "choices": [choice], "usage": self._usage()})

    def start(self, *, model: str = MODEL) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return sse({"model": model, "choices": [{"index": 0, "delta": delta}]})

    def said(self, text: str) -> bytes:
        return sse({"choices": [{"index": 0, "delta": {"content": text}}]})

    def thought(self, text: str) -> bytes:
        return sse({"choices": [{"index": 0, "delta": {"reasoning_content": text}}]})

    def end(self) -> bytes:
        return self._finish() + sse({"choices": [], "usage": self._usage()}, "[DONE]")

    def ends(self) -> Mapping[str, bytes]:
        return {
            "done without finish reason": sse("[DONE]"),
            "finish reason without done": self._finish(),
            "two finish chunks": self._finish() * 2 + sse("[DONE]"),
            "done twice": self._finish() + sse("[DONE]", "[DONE]"),
        }

    def failures(self, upstream: str) -> Mapping[str, tuple[bytes, ProviderErrorKind]]:
        def error(**more: Any) -> dict[str, Any]:
            return {"message": upstream, **more}

        broken = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
        return {
            "code as a number": (sse({"error": error(code=502), "choices": []}), _Kind.OVERLOADED),
            "code as text": (
                sse({"error": error(code="429"), "choices": [broken]}),
                _Kind.RATE_LIMIT,
            ),
            "no code": (sse({"error": error()}), _Kind.OVERLOADED),
            "an error of text": (sse({"error": upstream}), _Kind.OVERLOADED),
            "in the choice": (
                sse({"choices": [{**broken, "error": error(code=503)}]}),
                _Kind.OVERLOADED,
            ),
            "native finish reason": (
                sse({"choices": [{"delta": {}, "native_finish_reason": "error"}]}),
                _Kind.OVERLOADED,
            ),
        }

    def empties(self) -> Mapping[str, bytes]:
        return {
            "no choices": sse({"choices": []}, "[DONE]"),
            "no text": self.said("") + self.end(),
            "only thoughts": self.thought("Hm.") + self.end(),
        }

    def error(self, kind: ProviderErrorKind, upstream: str) -> tuple[int, Mapping[str, Any]]:
        told: dict[ProviderErrorKind, tuple[int, dict[str, Any]]] = {
            _Kind.INVALID_REQUEST: (400, {}),
            _Kind.AUTHENTICATION: (401, {"code": "invalid_api_key"}),
            _Kind.CREDIT: (402, {}),
            _Kind.MODERATION: (403, {"metadata": {"reasons": ["violence"]}}),
            _Kind.RATE_LIMIT: (429, {}),
            _Kind.OVERLOADED: (503, {}),
            _Kind.CONTEXT_LENGTH: (400, {"code": "context_length_exceeded"}),
        }
        status, more = told[kind]
        return status, {"error": {"message": upstream, "code": status, **more}}

    def _finish(self) -> bytes:
        return sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})

    def _usage(self) -> dict[str, Any]:
        return {"prompt_tokens": USAGE.input_tokens, "completion_tokens": USAGE.output_tokens}


class AnthropicWire:
    """Anthropic's Messages."""

    def whole(self, text: str, *, model: str = MODEL) -> bytes:
        content = [{"type": "text", "text": text}] if text else []
        return http_response(
            200, {**self._message(model), "content": content, "stop_reason": "end_turn"}
        )

    def start(self, *, model: str = MODEL) -> bytes:
        block = {"type": "content_block_start", "index": 0}
        return _typed(
            {"type": "message_start", "message": self._message(model)},
            {**block, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
        )

    def said(self, text: str) -> bytes:
        return self._delta({"type": "text_delta", "text": text})

    def thought(self, text: str) -> bytes:
        return self._delta({"type": "thinking_delta", "thinking": text})

    def end(self) -> bytes:
        return self._closed() + self._reason() + _typed({"type": "message_stop"})

    def ends(self) -> Mapping[str, bytes]:
        stop = _typed({"type": "message_stop"})
        return {
            "stop without stop reason": stop,
            "stop reason without stop": self._closed() + self._reason(),
            "two stop reasons": self._closed() + self._reason() * 2 + stop,
            "stop twice": self._reason() + stop * 2,
        }

    def failures(self, upstream: str) -> Mapping[str, tuple[bytes, ProviderErrorKind]]:
        kinds = {
            "overloaded_error": _Kind.OVERLOADED,
            "api_error": _Kind.OVERLOADED,
            "rate_limit_error": _Kind.RATE_LIMIT,
        }
        return {
            name: (
                _typed({"type": "error", "error": {"type": name, "message": upstream}}),
                kind,
            )
            for name, kind in kinds.items()
        }

    def empties(self) -> Mapping[str, bytes]:
        return {
            "no block": self.end(),
            "no text": self.said("") + self.end(),
            "only thoughts": self.thought("Hm.") + self.end(),
        }

    def error(self, kind: ProviderErrorKind, upstream: str) -> tuple[int, Mapping[str, Any]]:
        status, name = {
            _Kind.INVALID_REQUEST: (400, "invalid_request_error"),
            _Kind.AUTHENTICATION: (401, "authentication_error"),
            _Kind.CREDIT: (402, "billing_error"),
            _Kind.RATE_LIMIT: (429, "rate_limit_error"),
            _Kind.OVERLOADED: (529, "overloaded_error"),
            _Kind.CONTEXT_LENGTH: (400, "invalid_request_error"),
        }[kind]
        if kind is _Kind.CONTEXT_LENGTH:
            upstream = f"prompt is too long: 208310 tokens > 200000 maximum {upstream}"
        return status, {"type": "error", "error": {"type": name, "message": upstream}}

    def _message(self, model: str) -> dict[str, Any]:
        usage = {"input_tokens": USAGE.input_tokens, "output_tokens": USAGE.output_tokens}
        return {
            "id": "msg_0123456789",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "usage": usage,
        }

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _typed({"type": "content_block_delta", "index": 0, "delta": delta})

    def _closed(self) -> bytes:
        return _typed({"type": "content_block_stop", "index": 0})

    def _reason(self) -> bytes:
        usage = {"output_tokens": USAGE.output_tokens}
        return _typed(
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
        )


def _typed(*events: Mapping[str, Any]) -> bytes:
    """Server-sent events with their type as the event's name, as Anthropic sends them."""
    return "".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
        for event in events
    ).encode()
