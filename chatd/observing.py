"""What is counted of a turn at its end, in one go: a turn waits for none of it."""

from __future__ import annotations

import time

from chatd.answering import RunningTurn
from chatd.domain import TurnStatus
from chatd.errors import RequestError
from chatd.metrics import NONE, Asked, Metrics
from chatd.routing import Attempt


def count_turn(
    metrics: Metrics, turn: RunningTurn, status: TurnStatus, error: RequestError | None
) -> None:
    """Counts a turn that ended just now, and its attempts."""
    now = time.monotonic()
    trail = turn.trail
    answered = trail.answering
    if answered is not None:
        asked = metrics.asked(answered.provider, answered.model)
        if answered.first_token is not None and turn.request.stream:
            asked.first_token.observe(answered.first_token - turn.since)
        metrics.overhead.observe(_overhead(turn, now))
    else:
        asked = metrics.asked(NONE, turn.chatbot.model)
        # An interceptor may have answered, by means of its own.
        asked.took(turn.usage)
    asked.ended(status)
    asked.seconds.observe(now - turn.since)
    if error is not None:
        metrics.turn_errors.add(error.code)
    for attempt in trail.attempts:
        if attempt is answered:
            _count_attempt(asked, attempt)
        else:
            _count_attempt(metrics.asked(attempt.provider, attempt.model), attempt)


def count_settled(metrics: Metrics, turn: RunningTurn) -> None:
    """Counts what a turn took that became known after its end."""
    for attempt in turn.trail.attempts:
        if attempt.usage is not None and not attempt.is_counted:
            attempt.is_counted = True
            metrics.asked(attempt.provider, attempt.model).took(attempt.usage)


def _count_attempt(asked: Asked, attempt: Attempt) -> None:
    asked.tried(attempt.error or ("lost" if attempt.lost else "answered"))
    if attempt.usage is not None:
        attempt.is_counted = True
        asked.took(attempt.usage)
    if attempt.may_have_cost:
        asked.unknown += 1


def _overhead(turn: RunningTurn, now: float) -> float:
    """The seconds before the first attempt and after the last one."""
    attempts = turn.trail.attempts
    ended = max([attempt.ended or now for attempt in attempts])
    return max(0.0, attempts[0].began - turn.since) + now - ended
