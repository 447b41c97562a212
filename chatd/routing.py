"""Who answers: from a chatbot's model to providers in order, with retries and deadlines for all."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from chatd import logs
from chatd.breaker import Breaker, BreakerSettings, BreakerState, Ticket
from chatd.domain import Message, Usage, matches
from chatd.errors import InvalidRequest, ProviderError, ProviderErrorKind
from chatd.prices import Price, priced
from chatd.provider import (
    Event,
    Finish,
    GenerationId,
    Provider,
    ProviderRequest,
    ReasoningDelta,
    Retries,
    TextDelta,
    Timeouts,
    ToolCallDelta,
    UsageReport,
    checked,
    needs,
    options_of,
    takes,
)
from chatd.racing import VISIBLE, Racer, first_to_begin
from chatd.watchdog import Patience, Watchdog

log = logging.getLogger(__name__)

_Kind = ProviderErrorKind

_SAME_EVERYWHERE = {_Kind.CONTEXT_LENGTH, _Kind.MODERATION}
"""Failures of what was said: another provider is not bothered with it."""

_OF_THE_REQUEST = {*_SAME_EVERYWHERE, _Kind.INVALID_REQUEST}
"""Failures that say nothing of the provider's health."""

MAX_PAIRS = 1000
"""Providers with a model of which something is known; the oldest is forgotten first."""

_CHARGED = {
    _Kind.TIMEOUT,
    _Kind.INCOMPLETE,
    _Kind.EMPTY,
    _Kind.PROTOCOL,
    _Kind.CONNECTION,
}
"""Failures behind which a model may have worked, so that it may be charged."""

CLOSE_SECONDS = 1.0
"""How long a provider may take to let go of an answer that is over."""

HANG_UP_SECONDS = 0.1
"""How long the end of a race waits for those that were hung up on."""

HEDGE_SAMPLES = 20
"""How many first tokens must have been timed before one can be called late."""

MAX_SAMPLES = 200
"""How many of the last first tokens count as usual."""

HEDGE_QUANTILE = 0.95
"""The share of first tokens that come sooner than a late one."""

TOKENS = (*VISIBLE, ReasoningDelta)
"""What shows that the model works; nothing else puts off a timeout."""


@dataclass(frozen=True, slots=True)
class Target:
    """One provider to ask, by its name in the configuration.

    :param model: its own name for the model, `None` the chatbot's.
    :param use: the name that its plugin offers it under.
    :param weight: its share of the sessions that go to a target with a weight first.
    """

    name: str
    provider: Provider
    timeouts: Timeouts
    model: str | None = None
    use: str = ""
    weight: float | None = None
    retries: Retries = Retries()
    breaker: BreakerSettings = BreakerSettings()
    prices: tuple[Price, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """The chain for models that match a pattern, in which `*` is any text and `?` a character.

    :param hedge: whether the next in the chain is asked as well once the first token is late.
    """

    match: str
    chain: tuple[Target, ...]
    hedge: bool = False


@dataclass(slots=True, eq=False)
class Attempt:
    """One request to one provider, kept with the turn.

    `reached_model` says that a model may have worked on it, so that it may be billed. `generation`
    asks the provider what it took, where it can say that afterwards.
    """

    provider: str
    model: str
    error: ProviderErrorKind | None = None
    reached_model: bool = False
    usage: Usage | None = None
    ms: int = 0
    answered_by: str | None = None
    """The model that answered, by the provider's word."""
    first_token: float | None = None
    """When its first visible token came, on the clock of `began`."""
    ended: float | None = None
    """When it was over, on the same clock."""
    span: Any = field(default=None, repr=False)
    """Its span, while turns are traced."""
    is_counted: bool = False
    """Whether its usage is in the metrics."""
    generated: bool = False
    """Whether anything came of an answer, seen or not."""
    lost: bool = False
    """Whether another was quicker, and this one was hung up on."""
    prices: tuple[Price, ...] = ()
    generation: Callable[[], Awaitable[Usage | None]] | None = field(default=None, repr=False)
    ticket: Ticket | None = field(default=None, repr=False)
    """What its breaker waits for, until it ends."""
    began: float = field(default_factory=time.monotonic, repr=False)

    def end(self) -> None:
        """Records that it is over; called again, it changes nothing."""
        if self.ticket is not None:
            self.ended = time.monotonic()
            self.ms = round((self.ended - self.began) * 1000)
            self.ticket = None

    def lose(self) -> None:
        """Records that another was quicker. A breaker does not wait for how this one ends."""
        self.lost = True
        if self.ticket is not None:
            self.ticket.dropped()
        self.end()

    def fail(self, kind: ProviderErrorKind, *, reached_model: bool) -> None:
        """Records how the attempt failed."""
        self.error = kind
        self.reached_model = self.reached_model or reached_model

    @property
    def may_have_cost(self) -> bool:
        """Whether a model worked on it, and what that cost is not known.

        Services do not charge for what they refuse, but for what they began or is hung up on.
        """
        if self.usage is not None and self.usage.cost_usd is not None:
            return False
        if self.lost or self.generated or self.error is None:
            return True
        return self.reached_model and self.error in _CHARGED

    def priced(self, usage: Usage) -> Usage:
        """`usage` with its cost, where only the configuration knows the price."""
        return priced(usage, (self.answered_by, self.model), self.prices)

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        told = {"provider": self.provider, "model": self.model, "error": self.error, "ms": self.ms}
        return {**told, "lost": True} if self.lost else told


@dataclass(slots=True)
class Trail:
    """What becomes of a turn on its way through the providers.

    :param deadline: on the event loop's clock; no pause goes beyond it.
    :param new_messages: how many messages at the end of the request are not history.
    """

    deadline: float = math.inf
    new_messages: int = 1
    attempts: list[Attempt] = field(default_factory=list)
    side: str | None = None
    """What splitting the traffic chose, as provider/model; None where nothing is split."""
    shortened: bool = False
    """Whether history was left out because the model found it too long."""
    answering: Attempt | None = None
    """Who answers, or was asked last."""
    on_attempt: Callable[[Attempt], None] | None = None
    """Called with each attempt before its provider is asked, in the task that asks."""

    def give_up(self) -> None:
        """Counts what does not end as failed: no breaker waits for it."""
        for attempt in self.attempts:
            if attempt.ticket is not None:
                attempt.fail(_Kind.TIMEOUT, reached_model=True)
                attempt.ticket.failed()
                attempt.end()

    @property
    def usage(self) -> Usage | None:
        """What all attempts took together; `None` when nothing is known of it.

        The cost is unknown while one that may have cost something has none. It is nothing when
        all that was asked refused.
        """
        reports = [attempt.usage for attempt in self.attempts if attempt.usage is not None]
        if not reports:
            asked = any(attempt.reached_model for attempt in self.attempts)
            free = asked and not any(attempt.may_have_cost for attempt in self.attempts)
            return Usage(cost_usd=0.0) if free else None
        if len(self.attempts) == 1:
            return reports[0]
        total = Usage(*(_sum(getattr(r, f.name) for r in reports) for f in fields(Usage)))
        if any(attempt.may_have_cost for attempt in self.attempts):
            return replace(total, cost_usd=None)
        return total


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


class _Course:
    """The attempts of one side of a race, or of all of it; each is the trail's as well."""

    def __init__(self, trail: Trail, outer: _Course | None = None) -> None:
        self._trail = trail
        self._outer = outer
        self.attempts: list[Attempt] = []
        self.answering: Attempt | None = None

    def add(self, attempt: Attempt) -> None:
        """Takes an attempt that begins."""
        self._trail.attempts.append(attempt)
        if self._trail.on_attempt is not None:
            self._trail.on_attempt(attempt)
        course: _Course | None = self
        while course is not None:
            course.attempts.append(attempt)
            course = course._outer
        self.answers(attempt)

    def answers(self, attempt: Attempt | None) -> None:
        """Takes note of who answers, or was asked last."""
        if attempt is None:
            return
        self._trail.answering = attempt
        course: _Course | None = self
        while course is not None:
            course.answering = attempt
            course = course._outer

    def lose(self) -> None:
        """Records of all that go on that another was quicker."""
        for attempt in self.attempts:
            if attempt.ticket is not None:
                attempt.lose()


@dataclass(slots=True)
class _Run:
    """A request on its way; `request` changes when it turns out to be too long."""

    request: ProviderRequest
    trail: Trail
    hedge: bool = False


@dataclass(slots=True)
class _Race:
    """Whether the second side of a race was asked, and with it all of the chain."""

    is_joined: bool = False


@dataclass(slots=True)
class _Pair:
    """What is known of a provider with a model."""

    breaker: Breaker
    first_tokens: defaultdict[bool, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=MAX_SAMPLES))
    )
    """Seconds to the first token, of streams and of answers in one piece, which come later."""

    def late_after(self, *, stream: bool) -> float | None:
        """Seconds after which a first token is later than usual; None while that is not known."""
        times = self.first_tokens[stream]
        if len(times) < HEDGE_SAMPLES:
            return None
        return sorted(times)[math.ceil(len(times) * HEDGE_QUANTILE) - 1]


class Router:
    """Asks the providers that a model leads to, one after the other."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [rule for rule in rules if rule.chain]
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._closing = Patience(CLOSE_SECONDS)
        self.rule = lru_cache(1024)(self._rule)
        self.takers = lru_cache(1024)(self._takers)

    def _rule(self, model: str) -> Rule:
        """The first rule that matches `model`; one without a chain when none does."""
        for rule in self._rules:
            if matches(rule.match, model):
                return rule
        return Rule(model, ())

    def chain(self, model: str) -> tuple[Target, ...]:
        """The providers for `model`, in order; empty when no rule matches."""
        return self.rule(model).chain

    def _takers(self, model: str, needed: frozenset[str]) -> tuple[Target, ...]:
        """The providers for `model` that take what is needed; empty when no rule matches.

        Raises `InvalidRequest` when there are providers, and none takes it.
        """
        chain = self.chain(model)
        able = tuple(target for target in chain if needed <= takes(target.provider))
        if chain and not able:
            what = " and ".join(sorted(needed))
            raise InvalidRequest(f"No provider of this chatbot's model takes {what}.")
        return able

    def states(self) -> dict[tuple[str, str], BreakerState]:
        """The breaker of each provider and model that was asked."""
        return {pair: known.breaker.state for pair, known in self._pairs.items()}

    def stream(self, request: ProviderRequest, trail: Trail) -> AsyncGenerator[Event, None]:
        """The events of the first provider that answers, ending in `Finish`.

        Every attempt is appended to `trail.attempts`. Raises the last `ProviderError`; after the
        first visible token nothing else is tried. Raises `InvalidRequest` as `takers` does.
        """
        return self._through(_Run(request, trail), None, _Course(trail))

    def _chain(self, run: _Run) -> Sequence[Target]:
        """Whom to ask, in order. Raises as `stream` does."""
        request = run.request
        chain = self.takers(request.model, needs(request.messages, request.parameters))
        if not chain:
            raise ProviderError(
                _Kind.INVALID_REQUEST,
                f'no rule under models leads "{request.model}" to a provider that is enabled',
                retryable=False,
            )
        run.hedge = self.rule(request.model).hedge
        chain, run.trail.side = _split(chain, request)
        return self._without_dead(chain, request.model)

    async def _through(
        self,
        run: _Run,
        chain: Sequence[Target] | None,
        course: _Course,
        *,
        asked: bool = False,
        ticket: Ticket | None = None,
        after: Sequence[Target] = (),
    ) -> AsyncGenerator[Event, None]:
        """The events of the first in the chain that answers, each asked again where that may help.

        Raises the last failure.

        :param chain: None for the request's own.
        :param asked: whether somebody before the chain was asked already.
        :param ticket: leave to ask the first, where there is one already.
        :param after: who else there is to ask, which is done elsewhere.
        """
        failure: ProviderError | None = None
        chain = self._chain(run) if chain is None else chain
        for place, target in enumerate(chain):
            others = (*chain[place + 1 :], *after)
            if ticket is None:
                ticket = self._ticket(run, target, others, asked=asked or failure is not None)
            late, count = None if after else self._late_after(run, target, others), 0
            while ticket is not None:
                said, race, count = False, None, count + 1
                if late is not None:
                    race = _Race()
                    lane = self._raced(run, target, others, ticket, course, late, race)
                else:
                    lane = self._events(run, target, ticket, course, last=not others)
                try:
                    async for event in lane:
                        if not said and isinstance(event, VISIBLE):
                            said = True
                        yield event
                    return
                except ProviderError as error:
                    failure = error
                finally:
                    # As `aclosing` does, at half the cost.
                    await lane.aclose()
                if said or (race is not None and race.is_joined):
                    raise failure
                # The sides of a race asked again themselves.
                again = late is None
                ticket = await self._again(run, target, others, failure, count) if again else None
            if failure is not None and failure.kind in _SAME_EVERYWHERE:
                break
        raise failure or ProviderError(_Kind.OVERLOADED, "all of the chain are left alone")

    async def _again(
        self,
        run: _Run,
        target: Target,
        others: Sequence[Target],
        failure: ProviderError,
        count: int,
    ) -> Ticket | None:
        """Leave to ask a target once more after a failure, when it is time to; None to go on.

        :param count: how often it was asked.
        """
        if (shorter := _shorter(run.request.messages, run.trail, failure)) is not None:
            run.trail.shortened = True
            run.request = replace(run.request, messages=shorter)
        elif failure.kind in _SAME_EVERYWHERE:
            return None
        else:
            able = any(self._breaker(run, other).lets for other in others)
            pause = _pause(target.retries, failure, count, able, run.trail.deadline)
            if pause is None:
                return None
            await asyncio.sleep(pause)
        return self._breaker(run, target).ask()

    async def _raced(
        self,
        run: _Run,
        target: Target,
        others: Sequence[Target],
        ticket: Ticket,
        course: _Course,
        late: float,
        race: _Race,
    ) -> AsyncGenerator[Event, None]:
        """The events of who says something first: one provider, or once it is late all the others.

        Each side is asked again and goes on by its own rules.
        """
        first, second = _Course(run.trail, course), _Course(run.trail, course)
        lane = self._through(run, (target,), first, ticket=ticket, after=others)
        racers = [Racer(first, lane)]
        try:
            await asyncio.wait([racers[0].begun], timeout=late)
            able = any(self._breaker(run, other).lets for other in others)
            if able and not racers[0].begun.done():
                race.is_joined = True
                racers.append(Racer(second, self._through(run, others, second, asked=True)))
            winner = await first_to_begin(racers)
            course.answers(winner.attempt.answering)
            if winner.attempt is second and winner.begun.result():
                self._was_late(run, target, first)
            for racer in racers:
                if racer is not winner:
                    racer.lose()
            async for event in winner.events():
                yield event
        finally:
            for racer in racers:
                racer.cancel()
            # So that what is stored of the attempts says how they ended.
            await asyncio.wait([racer.task for racer in racers], timeout=HANG_UP_SECONDS)

    def _late_after(self, run: _Run, target: Target, others: Sequence[Target]) -> float | None:
        """Seconds after which the others are asked as well; None where they are not."""
        if not (run.hedge and others):
            return None
        return self._pair(target, run.request.model).late_after(stream=run.request.stream)

    def _was_late(self, run: _Run, target: Target, course: _Course) -> None:
        """Lets it count that somebody who began later was quicker: one that hangs is left alone."""
        pair = self._pair(target, run.request.model)
        for attempt in course.attempts:
            if attempt.ticket is not None:
                pair.first_tokens[run.request.stream].append(time.monotonic() - attempt.began)
                if attempt.ticket.failed():
                    _tell_open(target, attempt)

    def _breaker(self, run: _Run, target: Target) -> Breaker:
        return self._pair(target, run.request.model).breaker

    def _pair(self, target: Target, model: str) -> _Pair:
        key = (target.name, target.model or model)
        if (pair := self._pairs.get(key)) is None:
            if len(self._pairs) >= MAX_PAIRS:
                self._pairs.pop(next(iter(self._pairs)))
            pair = self._pairs[key] = _Pair(Breaker(target.breaker))
        return pair

    def _without_dead(self, chain: tuple[Target, ...], model: str) -> tuple[Target, ...]:
        """The chain; when all of it is left alone, only who failed least recently."""
        if len(chain) < 2 or self._pair(chain[0], model).breaker.lets:
            return chain
        breakers = [self._pair(target, model).breaker for target in chain]
        if any(breaker.lets for breaker in breakers):
            return chain
        return (min(zip(breakers, chain, strict=True), key=lambda pair: pair[0].failed_at)[1],)

    def _ticket(
        self, run: _Run, target: Target, others: Sequence[Target], *, asked: bool
    ) -> Ticket | None:
        """Leave to ask a target; also one that is left alone, when nobody was asked or will be."""
        breaker = self._breaker(run, target)
        return breaker.ask() or (None if asked or others else breaker.force())

    async def _events(
        self,
        run: _Run,
        target: Target,
        ticket: Ticket,
        course: _Course,
        *,
        last: bool,
    ) -> AsyncGenerator[Event, None]:
        """One attempt, held to the contract: text, one end, in time, no foreign exception."""
        request, timeouts = run.request, target.timeouts
        model = target.model or request.model
        attempt = Attempt(target.name, model, prices=target.prices, ticket=ticket)
        course.add(attempt)
        # A plain answer comes whole, within the turn's deadline; the next in the chain needs some.
        limit = timeouts.first_token if request.stream or not last else math.inf
        said, events, tools = False, None, bool(request.parameters.get("tools"))
        watchdog = Watchdog()
        due = watchdog.in_seconds(limit)
        try:
            options = request.options.get(options_of(target.provider, target.use)) or {}
            watchdog.watch(due)
            events = target.provider.stream(_asked(request, model, timeouts, options))
            while True:
                event = checked(await anext(events))
                attempt.reached_model = True
                is_token = isinstance(event, TOKENS)
                is_nothing = is_token and _is_nothing(event, tools)
                attempt.generated |= is_token
                if not isinstance(event, VISIBLE):
                    _note(target, attempt, event, said)
                elif not said and not is_nothing:
                    said = True
                    self._began(target, attempt, ticket, stream=request.stream)
                    # Nobody else may answer now, so a plain answer has what is left of the turn.
                    due = due if request.stream else math.inf
                watchdog.rest()
                if not is_nothing:
                    yield event
                    if isinstance(event, Finish):
                        return
                    if is_token and request.stream:
                        due = watchdog.in_seconds(timeouts.idle)
                watchdog.watch(due)
        except BaseException as raised:
            failure = _understood(target, raised, watchdog)
            if isinstance(failure, asyncio.CancelledError) and watchdog.is_past(run.trail.deadline):
                late = ProviderError(_Kind.TIMEOUT, "the turn's deadline", reached_model=True)
                self._failed(target, attempt, ticket, late)
            if isinstance(failure, ProviderError):
                self._failed(target, attempt, ticket, failure)
            raise failure from None
        finally:
            watchdog.close()
            ticket.dropped()
            attempt.end()
            if attempt.usage is not None:
                attempt.usage = attempt.priced(attempt.usage)
            if events is not None:
                await _close(target, events, self._closing)

    def _began(self, target: Target, attempt: Attempt, ticket: Ticket, *, stream: bool) -> None:
        attempt.first_token = time.monotonic()
        seconds = attempt.first_token - attempt.began
        self._pair(target, attempt.model).first_tokens[stream].append(seconds)
        if ticket.succeeded():
            log.warning("provider %s answers again for model %s", target.name, attempt.model)

    def _failed(
        self, target: Target, attempt: Attempt, ticket: Ticket, error: ProviderError
    ) -> None:
        attempt.fail(error.kind, reached_model=error.reached_model)
        log.warning(
            "provider %s failed with %s for model %s: %s",
            target.name,
            error.kind,
            attempt.model,
            error.detail,
        )
        if error.kind not in _OF_THE_REQUEST and ticket.failed():
            _tell_open(target, attempt)


def _tell_open(target: Target, attempt: Attempt) -> None:
    log.error(
        "provider %s fails too often for model %s: it is left alone for %g s",
        target.name,
        attempt.model,
        target.breaker.open_seconds,
    )


def _split(
    chain: tuple[Target, ...], request: ProviderRequest
) -> tuple[tuple[Target, ...], str | None]:
    """The chain with the session's side first, and the side's name; a session keeps its side."""
    if len(chain) < 2:
        return chain, None
    weighted = [target for target in chain if target.weight]
    if len(weighted) < 2:
        return chain, None
    session = request.session_id or str(random.random())
    digest = hashlib.sha256(f"{request.model}\n{session}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64 * sum(target.weight or 0 for target in weighted)
    chosen = weighted[-1]
    for target in weighted:
        place -= target.weight or 0
        if place < 0:
            chosen = target
            break
    rest = (target for target in chain if target is not chosen)
    return (chosen, *rest), f"{chosen.name}/{chosen.model or request.model}"


def _pause(
    retries: Retries, failure: ProviderError, count: int, others: bool, deadline: float
) -> float | None:
    """How long to wait before the same provider is asked again; None when it is not."""
    if count >= retries.attempts or not failure.retryable:
        return None
    if failure.kind is _Kind.TIMEOUT and failure.status is None:
        # It took its time already.
        return None
    left = deadline - asyncio.get_running_loop().time()
    pause = random.uniform(0, min(retries.most, retries.base * 2 ** (count - 1)))
    hint = failure.retry_after
    # A plugin may have put anything there.
    if isinstance(hint, int | float) and 0 < hint < math.inf:
        if (others and hint > retries.patience) or hint >= left:
            return None
        pause += hint
    return pause if pause < left else None


def _asked(
    request: ProviderRequest, model: str, timeouts: Timeouts, options: Mapping[str, Any]
) -> ProviderRequest:
    """The request as one provider gets it; `dataclasses.replace` takes several times as long."""
    return ProviderRequest(
        model,
        request.messages,
        request.stream,
        request.max_output_tokens,
        request.temperature,
        request.user,
        request.session_id,
        request.parameters,
        timeouts,
        options,
    )


def _is_nothing(event: Event, tools: bool) -> bool:
    """Whether an event says nothing: without text, or the call of a tool that nobody gave."""
    if isinstance(event, ToolCallDelta):
        return not tools
    return isinstance(event, (TextDelta, ReasoningDelta)) and not event.text


def _note(target: Target, attempt: Attempt, event: Event, said: bool) -> None:
    """Records what a provider tells beside the answer. Raises `ProviderError` for an empty one."""
    match event:
        case GenerationId(id):
            if (ask := getattr(target.provider, "generation", None)) is not None:
                attempt.generation = lambda: ask(id)
        case UsageReport(usage):
            attempt.usage = usage
        case Finish(_, model):
            attempt.answered_by = model
            if not said:
                raise ProviderError(_Kind.EMPTY, "an answer without text", reached_model=True)


def _shorter(
    messages: Sequence[Message], trail: Trail, failure: ProviderError
) -> Sequence[Message] | None:
    """`messages` without the older half of the history, in whole turns, for a model's context.

    None where that was not the failure, where it was done already, and without a history.
    """
    if failure.kind is not _Kind.CONTEXT_LENGTH or trail.shortened:
        return None
    start, new = 0, trail.new_messages
    while start < len(messages) and messages[start].role in ("system", "developer"):
        start += 1
    end = max(start, len(messages) - new)
    half = sum(message.cost_chars for message in messages[start:end]) / 2
    place, dropped = start, 0
    while place < end and (dropped < half or messages[place].role != "user"):
        dropped += messages[place].cost_chars
        place += 1
    return [*messages[:start], *messages[place:]] if place > start else None


def _understood(target: Target, raised: BaseException, watchdog: Watchdog) -> BaseException:
    """What ended an attempt, as a `ProviderError` where it is the provider's doing."""
    if watchdog.fired():
        seconds = watchdog.seconds
        return ProviderError(_Kind.TIMEOUT, f"nothing came for {seconds:g} s", reached_model=True)
    if isinstance(raised, ProviderError) or not watchdog.is_waiting:
        return raised
    if isinstance(raised, StopAsyncIteration):
        return ProviderError(
            _Kind.INCOMPLETE, "the answer stopped without an end", reached_model=True
        )
    return _failure(target, raised)


def _failure(target: Target, error: BaseException) -> BaseException:
    """What a provider raised that none should, as a failure of its own; a cancellation stays one."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        return error
    log.error("provider %s raised %s", target.name, logs.trace(error))
    return ProviderError(
        _Kind.PROTOCOL, f"{type(error).__name__} in the plugin", reached_model=True
    )


async def _close(target: Target, events: AsyncGenerator[Event, None], patience: Patience) -> None:
    """Lets go of an answer; a provider that cannot is named, and the answer stands."""
    try:
        await patience.wait(events.aclose())
    except BaseException as error:
        failure = _failure(target, error)
        if failure is error:
            raise
