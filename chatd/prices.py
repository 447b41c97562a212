"""What tokens cost where a provider does not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chatd.domain import Usage, matches

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens, for the models that match a pattern (`*` and `?`).

    :param input: of what the model is given.
    :param output: of what it answers, with what it thinks.
    :param cached: of the input that the provider had in its cache; `None`: as all input.
    """

    match: str
    input: float
    output: float
    cached: float | None = None

    def of(self, usage: Usage) -> float | None:
        """USD for what was taken; None while a count is unknown."""
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        cached = min(usage.cached_tokens or 0, usage.input_tokens)
        dear = self.input if self.cached is None else self.cached
        fresh = (usage.input_tokens - cached) * self.input
        return (fresh + cached * dear + usage.output_tokens * self.output) / MILLION


def priced(usage: Usage, models: Sequence[str | None], prices: Sequence[Price]) -> Usage:
    """`usage` with its cost from the table, where the provider told none.

    The first price that matches one of `models`, tried in their order, counts. What no price is
    known for stays unknown.
    """
    if usage.cost_usd is not None:
        return usage
    price = price_of(models, prices)
    return usage if price is None else replace(usage, cost_usd=price.of(usage))


def price_of(models: Sequence[str | None], prices: Sequence[Price]) -> Price | None:
    """The first price that matches one of `models`, tried in their order."""
    for model in models:
        for price in prices:
            if model is not None and matches(price.match, model):
                return price
    return None
