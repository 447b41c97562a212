"""Who answers: from a chatbot's model to providers in order, with deadlines for all of them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from chatd import logs
from chatd.domain import Usage
from chatd.errors import InvalidRequest, ProviderError, ProviderErrorKind
from chatd.provider import (
    Event,
    Finish,
    Provider,
    ProviderRequest,
    TextDelta,
    Timeouts,
    ToolCallDelta,
    UsageReport,
    checked,
    needs,
    takes,
)

log = logging.getLogger(__name__)

_SAME_EVERYWHERE = {
    ProviderErrorKind.CONTEXT_LENGTH,
    ProviderErrorKind.MODERATION,
}
"""Failures of what was said: another provider is not bothered with it."""


@dataclass(frozen=True, slots=True)
class Target:
    """One provider to ask; `model` is its own name for the model, `None` the chatbot's."""

    name: str
    provider: Provider
    timeouts: Timeouts
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """The chain for models that match a pattern, in which `*` is any text and `?` a character."""

    match: str
    chain: tuple[Target, ...]


@dataclass(slots=True)
class Attempt:
    """One request to one provider, kept with the turn.

    `reached_model` says that a model may have worked on it, so that it may be billed.
    """

    provider: str
    model: str
    error: ProviderErrorKind | None = None
    reached_model: bool = False
    usage: Usage | None = None
    ms: int = 0

    def fail(self, kind: ProviderErrorKind, *, reached_model: bool) -> None:
        """Records how the attempt failed."""
        self.error = kind
        self.reached_model = self.reached_model or reached_model

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {"provider": self.provider, "model": self.model, "error": self.error, "ms": self.ms}


def total_usage(attempts: Sequence[Attempt]) -> Usage | None:
    """What all attempts took together; `None` when no provider told of any."""
    reports = [attempt.usage for attempt in attempts if attempt.usage is not None]
    if len(reports) < 2:
        return reports[0] if reports else None
    return Usage(*(_sum(getattr(r, f.name) for r in reports) for f in fields(Usage)))


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


class Router:
    """Asks the providers that a model leads to, one after the other."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [(_pattern(rule.match), rule.chain) for rule in rules if rule.chain]
        self.chain = lru_cache(1024)(self._chain)

    def _chain(self, model: str) -> tuple[Target, ...]:
        """The providers for `model`, in order; empty when no rule matches."""
        for pattern, chain in self._rules:
            if pattern.fullmatch(model):
                return chain
        return ()

    def takers(self, model: str, needed: frozenset[str]) -> tuple[Target, ...]:
        """The providers for `model` that take what is needed; empty when no rule matches.

        Raises `InvalidRequest` when there are providers, and none takes it.
        """
        chain = self.chain(model)
        able = tuple(target for target in chain if needed <= takes(target.provider))
        if chain and not able:
            what = " and ".join(sorted(needed))
            raise InvalidRequest(f"No provider of this chatbot's model takes {what}.")
        return able

    async def stream(
        self, request: ProviderRequest, attempts: list[Attempt]
    ) -> AsyncGenerator[Event, None]:
        """The events of the first provider that answers, ending in `Finish`.

        Every attempt is appended to `attempts`, so the last one is who answered. Raises the
        last `ProviderError`; after the first text nothing else is tried. Raises `InvalidRequest`
        as `takers` does.
        """
        chain = self.takers(request.model, needs(request.messages, request.parameters))
        if not chain:
            raise ProviderError(
                ProviderErrorKind.INVALID_REQUEST,
                f'no rule under models leads "{request.model}" to a provider that is enabled',
                retryable=False,
            )
        failure: ProviderError | None = None
        for target in chain:
            attempt = Attempt(target.name, target.model or request.model)
            attempts.append(attempt)
            began, said = time.monotonic(), False
            try:
                last = target is chain[-1]
                async with aclosing(_ask(target, request, attempt.model, last=last)) as events:
                    async for event in events:
                        if isinstance(event, TextDelta | ToolCallDelta):
                            said = True
                        elif isinstance(event, UsageReport):
                            attempt.usage = event.usage
                        attempt.reached_model = True
                        yield event
                return
            except ProviderError as error:
                failure = error
                attempt.fail(error.kind, reached_model=error.reached_model)
                log.warning(
                    "provider %s failed with %s for model %s: %s",
                    target.name,
                    error.kind,
                    attempt.model,
                    error.detail,
                )
                if said or error.kind in _SAME_EVERYWHERE:
                    raise
            finally:
                attempt.ms = round((time.monotonic() - began) * 1000)
        assert failure is not None
        raise failure


CLOSE_SECONDS = 1.0
"""How long a provider may take to let go of an answer that is over."""


async def _ask(
    target: Target, request: ProviderRequest, model: str, *, last: bool
) -> AsyncGenerator[Event, None]:
    """One attempt, held to the contract: text, one end, in time, no foreign exception."""
    timeouts = target.timeouts
    # A plain answer comes whole, within the turn's deadline; the next in the chain needs some of it.
    limit = timeouts.first_token if request.stream or not last else None
    said, events = False, None
    try:
        while True:
            try:
                if events is None:
                    asked = replace(request, model=model, timeouts=timeouts)
                    events = target.provider.stream(asked)
                event = await _next(events, limit)
            except ProviderError:
                raise
            except BaseException as error:
                raise _failure(target, error) from None
            if isinstance(event, Finish) and not said:
                raise ProviderError(
                    ProviderErrorKind.EMPTY, "an answer without text", reached_model=True
                )
            yield event
            if isinstance(event, Finish):
                return
            if isinstance(event, ToolCallDelta) or (isinstance(event, TextDelta) and event.text):
                said = True
            limit = timeouts.idle if request.stream else limit
    finally:
        if events is not None:
            await _close(target, events)


async def _next(events: AsyncGenerator[Event, None], limit: float | None) -> Event:
    """The next event. Raises `ProviderError` when none comes in `limit` seconds, or none at all."""
    scope = asyncio.timeout(limit)
    try:
        async with scope:
            return checked(await anext(events))
    except TimeoutError:
        if not scope.expired():
            raise
        raise ProviderError(
            ProviderErrorKind.TIMEOUT, f"nothing came for {limit:g} s", reached_model=True
        ) from None
    except StopAsyncIteration:
        raise ProviderError(
            ProviderErrorKind.INCOMPLETE, "the answer stopped without an end", reached_model=True
        ) from None


def _failure(target: Target, error: BaseException) -> BaseException:
    """What a provider raised that none should, as a failure of its own; a cancellation stays one."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        return error
    log.error("provider %s raised %s", target.name, logs.trace(error))
    return ProviderError(
        ProviderErrorKind.PROTOCOL, f"{type(error).__name__} in the plugin", reached_model=True
    )


async def _close(target: Target, events: AsyncGenerator[Event, None]) -> None:
    """Lets go of an answer; a provider that cannot is named, and the answer stands."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await events.aclose()
    except BaseException as error:
        failure = _failure(target, error)
        if failure is error:
            raise


def _pattern(match: str) -> re.Pattern[str]:
    return re.compile(re.escape(match).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
