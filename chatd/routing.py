"""Who answers: from a chatbot's model to providers in order, with deadlines for all of them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from chatd.errors import ProviderError, ProviderErrorKind
from chatd.provider import Event, Finish, Provider, ProviderRequest, TextDelta, Timeouts

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
    """One request to one provider, kept with the turn."""

    provider: str
    model: str
    error: ProviderErrorKind | None = None
    ms: int = 0

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {"provider": self.provider, "model": self.model, "error": self.error, "ms": self.ms}


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

    async def stream(
        self, request: ProviderRequest, attempts: list[Attempt]
    ) -> AsyncGenerator[Event, None]:
        """The events of the first provider that answers, ending in `Finish`.

        Every attempt is appended to `attempts`, so the last one is who answered. Raises the
        last `ProviderError`; after the first text nothing else is tried.
        """
        chain = self.chain(request.model)
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
                        said = said or isinstance(event, TextDelta)
                        yield event
                return
            except ProviderError as error:
                failure = error
                attempt.error = error.kind
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


async def _ask(
    target: Target, request: ProviderRequest, model: str, *, last: bool
) -> AsyncGenerator[Event, None]:
    """One attempt, held to the contract: text, one end, in time, no foreign exception."""
    timeouts = target.timeouts
    events = target.provider.stream(replace(request, model=model, timeouts=timeouts))
    # A plain answer comes whole, within the turn's deadline; the next in the chain needs some of it.
    limit = timeouts.first_token if request.stream or not last else None
    said = False
    try:
        while True:
            async with asyncio.timeout(limit):
                event = await anext(events)
            if isinstance(event, Finish):
                if not said:
                    raise ProviderError(
                        ProviderErrorKind.EMPTY, "an answer without text", reached_model=True
                    )
                yield event
                return
            said = said or isinstance(event, TextDelta)
            limit = timeouts.idle if request.stream else None
            yield event
    except StopAsyncIteration:
        raise ProviderError(
            ProviderErrorKind.INCOMPLETE, "the answer stopped without an end", reached_model=True
        ) from None
    except TimeoutError:
        raise ProviderError(
            ProviderErrorKind.TIMEOUT, f"nothing came for {limit} s", reached_model=True
        ) from None
    except ProviderError:
        raise
    except Exception as error:
        log.exception("provider %s raised what no provider should", target.name)
        raise ProviderError(
            ProviderErrorKind.PROTOCOL, f"{type(error).__name__} in the plugin", reached_model=True
        ) from error
    finally:
        await events.aclose()


def _pattern(match: str) -> re.Pattern[str]:
    return re.compile(re.escape(match).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
