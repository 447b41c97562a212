"""What a turn cost at a guess, where its providers do not say: for budgets only, and never stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatd.domain import IMAGE_CHARS, MESSAGE_OVERHEAD_CHARS, Message, Usage
from chatd.prices import price_of
from chatd.provider import ProviderRequest
from chatd.routing import Attempt, Trail

BYTES_PER_TOKEN = 4
"""Of UTF-8. As characters in English; scripts of more bytes take more tokens as well."""

MAX_LEARNT = 1000
"""Models whose price is learnt; there are as many as chatbots use."""


@dataclass(frozen=True, slots=True)
class Said:
    """What was asked, and what came of an answer so far: its words, thoughts and calls of tools."""

    request: ProviderRequest
    answer_bytes: int


@dataclass(slots=True)
class _Ceiling:
    """USD that a token of input and one of output cost at most, as the answers so far show."""

    input: float = math.inf
    output: float = math.inf


class Estimates:
    """Guesses costs by the configured prices, and else by what a model's whole answers cost."""

    def __init__(self) -> None:
        self._ceilings: dict[tuple[str, str], _Ceiling] = {}

    def learn(self, trail: Trail) -> None:
        """Takes note of what the answers of a turn cost, where that is known."""
        for attempt in trail.attempts:
            usage, key = attempt.usage, (attempt.provider, attempt.model)
            if usage is None or usage.cost_usd is None:
                continue
            if key not in self._ceilings and len(self._ceilings) >= MAX_LEARNT:
                self._ceilings.pop(next(iter(self._ceilings)))
            ceiling = self._ceilings.setdefault(key, _Ceiling())
            # A price cannot be more than if the other kind of token had cost nothing; what was in
            # a cache was cheaper than the rest will be.
            if usage.input_tokens and not usage.cached_tokens:
                ceiling.input = min(ceiling.input, usage.cost_usd / usage.input_tokens)
            if usage.output_tokens:
                ceiling.output = min(ceiling.output, usage.cost_usd / usage.output_tokens)

    def of(self, trail: Trail, said: Said, *, reserve: float) -> float | None:
        """USD that a turn cost, at a guess; None while nothing is known to guess by.

        :param reserve: no more than this is guessed of an attempt whose price is learnt, for that
            is an upper bound.
        """
        total = 0.0
        for attempt in trail.attempts:
            known = attempt.usage.cost_usd if attempt.usage else None
            if known is None and attempt.may_have_cost:
                known = self._guessed(attempt, trail, said, reserve)
                if known is None:
                    return None
            total += known or 0.0
        return total

    def _guessed(self, attempt: Attempt, trail: Trail, said: Said, reserve: float) -> float | None:
        tokens = _tokens(attempt, trail, said)
        if tokens is None:
            return None
        price = price_of((attempt.answered_by, attempt.model), attempt.prices)
        if price is not None:
            return price.of(tokens)
        ceiling = self._ceilings.get((attempt.provider, attempt.model))
        if ceiling is None:
            return None
        most = ceiling.input * (tokens.input_tokens or 0) + ceiling.output * (
            tokens.output_tokens or 0
        )
        # Not a number where a price is unbounded and no token is of it.
        return min(most, reserve) if most >= 0 else reserve


def _tokens(attempt: Attempt, trail: Trail, said: Said) -> Usage | None:
    """What an attempt took, as told and else at a guess; None where its answer was not seen."""
    told = attempt.usage or Usage()
    output = told.output_tokens
    if attempt is trail.answering and said.request.stream:
        output = max(output or 0, _of_bytes(said.answer_bytes))
    elif output is None and (attempt.generated or not said.request.stream):
        # An answer in one piece may be whole there, and unseen here.
        return None
    given = told.input_tokens
    if given is None:
        given = _given(said.request.messages, said.request.parameters)
    return Usage(input_tokens=given, output_tokens=output or 0, cached_tokens=told.cached_tokens)


def _given(messages: Sequence[Message], parameters: Mapping[str, Any]) -> int:
    """The tokens of what a model was asked."""
    size = len(json.dumps(parameters)) if parameters else 0
    for message in messages:
        images = sum(1 for part in message.parts or () if part.get("type") != "text")
        calls = len(json.dumps(message.tool_calls)) if message.tool_calls else 0
        size += len(message.content.encode()) + calls
        size += images * IMAGE_CHARS + MESSAGE_OVERHEAD_CHARS
    return _of_bytes(size)


def _of_bytes(size: int) -> int:
    return math.ceil(size / BYTES_PER_TOKEN)
