"""What is counted of a turn at its end, in one go: a turn waits for none of it."""

from __future__ import annotations

import time

from chatd.answering import RunningTurn
from chatd.domain import TurnStatus, Usage
from chatd.errors import RequestError
from chatd.metrics import NONE, Labels, Metrics
from chatd.routing import Attempt


def count_turn(
    metrics: Metrics, turn: RunningTurn, status: TurnStatus, error: RequestError | None
) -> None:
    """Counts a turn that ended just now, and its attempts."""
    now = time.monotonic()
    answered = turn.trail.answering
    asked = _asked(metrics, answered) if answered else metrics.pair(NONE, turn.chatbot.model)
    metrics.turns.values[status.value, *asked] += 1
    metrics.turn_seconds[asked].observe(now - turn.since)
    if error is not None:
        metrics.turn_errors.values[(error.code,)] += 1
    if answered is not None:
        if answered.first_token is not None and turn.request.stream:
            metrics.first_token[asked].observe(answered.first_token - turn.since)
        metrics.overhead.observe(_overhead(turn, now))
    elif turn.usage != Usage():
        # An interceptor answered, by means of its own.
        _count_usage(metrics, asked, turn.usage)
    for attempt in turn.trail.attempts:
        labels = _asked(metrics, attempt)
        metrics.attempts.values[*labels, _outcome(attempt)] += 1
        if attempt.usage is not None:
            attempt.is_counted = True
            _count_usage(metrics, labels, attempt.usage)
        if attempt.may_have_cost:
            metrics.unknown_cost.values[labels] += 1


def count_settled(metrics: Metrics, turn: RunningTurn) -> None:
    """Counts what a turn took that became known after its end."""
    for attempt in turn.trail.attempts:
        if attempt.usage is not None and not attempt.is_counted:
            attempt.is_counted = True
            _count_usage(metrics, _asked(metrics, attempt), attempt.usage)


def _asked(metrics: Metrics, attempt: Attempt) -> Labels:
    return metrics.pair(attempt.provider, attempt.model)


def _outcome(attempt: Attempt) -> str:
    """How an attempt ended: `answered`, `lost` to a quicker one, or a kind of failure."""
    if attempt.error is not None:
        return attempt.error.value
    return "lost" if attempt.lost else "answered"


def _overhead(turn: RunningTurn, now: float) -> float:
    """The seconds before the first attempt and after the last one."""
    attempts = turn.trail.attempts
    ended = max([attempt.ended or now for attempt in attempts])
    return max(0.0, attempts[0].began - turn.since) + now - ended


def _count_usage(metrics: Metrics, labels: Labels, usage: Usage) -> None:
    tokens = metrics.tokens.values
    if usage.input_tokens:
        tokens[*labels, "input"] += usage.input_tokens
    if usage.output_tokens:
        tokens[*labels, "output"] += usage.output_tokens
    if usage.cached_tokens:
        tokens[*labels, "cached"] += usage.cached_tokens
    if usage.reasoning_tokens:
        tokens[*labels, "reasoning"] += usage.reasoning_tokens
    if usage.cost_usd:
        metrics.cost.values[labels] += usage.cost_usd
