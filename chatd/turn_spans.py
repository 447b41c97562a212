"""The spans of a turn, and of its requests to providers."""

from __future__ import annotations

from typing import Any

from chatd.answering import RunningTurn
from chatd.domain import TurnStatus
from chatd.errors import RequestError
from chatd.routing import Attempt
from chatd.tracing import Tracing


def begin_turn_span(tracing: Tracing, turn: RunningTurn) -> None:
    """Begins a turn's span, within the request's, and those of its attempts as they begin."""
    known = {"chatd.turn.id": turn.id, "chatd.chatbot.id": turn.chatbot.id}
    span = turn.span = tracing.begin("turn", "internal", known, since=turn.since)

    def attempt_begins(attempt: Attempt) -> None:
        request = turn.request
        attempt.span = tracing.begin(
            f"chat {attempt.model}",
            "client",
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": attempt.provider,
                "gen_ai.request.model": attempt.model,
                "gen_ai.request.stream": request.stream,
                "gen_ai.request.max_tokens": request.max_output_tokens,
                "gen_ai.request.temperature": request.temperature,
            },
            parent=span,
        )
        tracing.call_within(attempt.span)

    turn.trail.on_attempt = attempt_begins


def end_turn_span(
    tracing: Tracing, turn: RunningTurn, status: TurnStatus, error: RequestError | None
) -> None:
    """Ends a turn's span and those of its attempts."""
    for attempt in turn.trail.attempts:
        if attempt.span is not None:
            _end_attempt(tracing, turn, attempt)
    code = error.code if error is not None else None
    tracing.end(turn.span, {"chatd.turn.result": status.value}, error=code)


def _end_attempt(tracing: Tracing, turn: RunningTurn, attempt: Attempt) -> None:
    usage, first = attempt.usage, attempt.first_token
    answered = attempt is turn.trail.answering and turn.finish is not None
    told: dict[str, Any] = {
        "gen_ai.response.model": attempt.answered_by,
        "gen_ai.response.time_to_first_chunk": None if first is None else first - attempt.began,
        "chatd.attempt.lost": True if attempt.lost else None,
    }
    if answered and turn.finish is not None:
        told["gen_ai.response.finish_reasons"] = [turn.finish.reason]
    if usage is not None:
        told |= {
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
            "chatd.cost_usd": usage.cost_usd,
        }
    error = attempt.error.value if attempt.error is not None else None
    tracing.end(attempt.span, told, error=error, at=attempt.ended)
