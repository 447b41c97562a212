"""The contract of a model provider: one stream of events, with exactly one end.

`chatd.testing.ProviderConformance` holds an implementation to it. Requests and events are made for each
turn, so they are not frozen, at a fifth of the cost: nobody changes one.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from chatd.domain import Message, Usage

MAX_TOOL_CALLS = 128
"""The most tools that a model may call in one answer, as in OpenAI's API."""

FinishReason = Literal["stop", "length", "content_filter", "tool_calls", "other"]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an attempt may take, in seconds. `plain` is the whole of an answer in one piece.

    25 s for a plain answer, since Heroku's router gives up on a request after 30.
    """

    connect: float = 5
    first_token: float = 20
    idle: float = 60
    total: float = 120
    plain: float = 25

    def of(self, stream: bool) -> float:
        """How long a whole answer may take, in a stream or in one piece."""
        return self.total if stream else self.plain


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and when a provider is asked again, before the first visible token only.

    :param attempts: requests to it in one turn, the first included.
    :param base: seconds; the pause before the n-th repetition is drawn from 0 to `base * 2**n`
        (exponential backoff with full jitter).
    :param most: the longest pause that is drawn, in seconds.
    :param patience: the longest `Retry-After` that is waited for while another provider could be
        asked instead, in seconds. With nobody else it is the turn's deadline.
    """

    attempts: int = 3
    base: float = 0.5
    most: float = 8
    patience: float = 2


@dataclass(slots=True, unsafe_hash=True)
class ProviderRequest:
    """What a model is asked. `parameters` go into the request as they are, where a provider can.

    `user` and `session_id` are for the provider's abuse reports and sticky caches; they are ids
    of chatd's own, never a visitor's name. `options` are what the chatbot's settings say to this
    kind of provider, by the name it is offered under.
    """

    model: str
    messages: Sequence[Message]
    stream: bool = True
    max_output_tokens: int | None = None
    temperature: float | None = None
    user: str | None = None
    session_id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeouts: Timeouts = Timeouts()
    options: Mapping[str, Any] = field(default_factory=dict)


def needs(messages: Sequence[Message], parameters: Mapping[str, Any]) -> frozenset[str]:
    """What a provider must take to be asked this: `tools`, `images`."""
    more = [m for m in messages if m.tool_calls or m.parts or m.role == "tool"]
    if not more and not parameters.get("tools"):
        return _NOTHING
    tools = parameters.get("tools") or any(m.tool_calls or m.role == "tool" for m in more)
    images = any(message.parts for message in more)
    return frozenset({*(("tools",) if tools else ()), *(("images",) if images else ())})


_NOTHING: frozenset[str] = frozenset()


@dataclass(slots=True, unsafe_hash=True)
class TextDelta:
    """Some more of the answer; never empty."""

    text: str


@dataclass(slots=True, unsafe_hash=True)
class ReasoningDelta:
    """Some more of what the model thinks before it answers; not part of the answer."""

    text: str


@dataclass(slots=True, unsafe_hash=True)
class ToolCallDelta:
    """Some more of a tool that the model calls, in OpenAI's terms.

    The first of a call has its `id` and `name`; `arguments` adds up to JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True, unsafe_hash=True)
class UsageReport:
    """What the answer took; the last one counts."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class GenerationId:
    """By what name the provider knows the answer that now begins; comes before any of it.

    What an answer took that was broken off is asked for with it: see `Provider`.
    """

    id: str


@dataclass(slots=True, unsafe_hash=True)
class Finish:
    """The end of a whole answer. `model` is the one that answered, by the provider's word."""

    reason: FinishReason
    model: str | None = None


_REASONS = frozenset(get_args(FinishReason))

Event = TextDelta | ReasoningDelta | ToolCallDelta | UsageReport | GenerationId | Finish


def checked(event: Any) -> Event:
    """`event`, if it is one. Raises `TypeError` or `ValueError` for what no plugin may yield."""
    # What comes most is looked at first, and as cheaply as can be.
    if type(event) is TextDelta and type(event.text) is str:
        return event
    match event:
        case TextDelta(text) | ReasoningDelta(text):
            if not isinstance(text, str):
                raise TypeError(f"{type(event).__name__} with {type(text).__name__} as text")
        case ToolCallDelta():
            _check_tool_call(event)
        case UsageReport(usage):
            _check_usage(usage)
        case GenerationId(id):
            if not isinstance(id, str):
                raise TypeError(f"GenerationId with {type(id).__name__} as id")
        case Finish(reason, model):
            if reason not in _REASONS:
                raise ValueError("Finish with a reason that is none")
            if model is not None and not isinstance(model, str):
                raise TypeError(f"Finish with {type(model).__name__} as model")
        case _:
            raise TypeError(f"{type(event).__name__} is not an event")
    known: Event = event
    return known


def _check_tool_call(delta: ToolCallDelta) -> None:
    if type(delta.index) is not int or not 0 <= delta.index < MAX_TOOL_CALLS:
        raise ValueError("ToolCallDelta with an index that is none")
    for text in (delta.id, delta.name):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"ToolCallDelta with {type(text).__name__} as id or name")
    if not isinstance(delta.arguments, str):
        raise TypeError(f"ToolCallDelta with {type(delta.arguments).__name__} as arguments")


def _check_usage(usage: Any) -> None:
    if not isinstance(usage, Usage):
        raise TypeError(f"UsageReport with {type(usage).__name__}")
    counts = (usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens)
    for count in counts:
        if count is not None and not (type(count) is int and 0 <= count < 2**53):
            raise ValueError("UsageReport with a count that is none")
    cost = usage.cost_usd
    if cost is not None and not (isinstance(cost, int | float) and 0 <= cost < math.inf):
        raise ValueError("UsageReport with a cost that is none")


def options_of(provider: Provider, use: str) -> str:
    """Under which name a chatbot's options are meant for a provider; `use` is its own."""
    name: str = getattr(provider, "options_of", use)
    return name


def takes(provider: Provider) -> frozenset[str]:
    """What a provider takes beside text."""
    taken: frozenset[str] = getattr(provider, "takes", frozenset())
    return taken


class Provider(Protocol):
    """Somebody who answers.

    One that takes more than text says so in an attribute `takes: ClassVar[frozenset[str]]`, with
    `tools` (the parameter `tools`, and messages with `tool_calls` or of the role `tool`) and
    `images` (messages with `parts`); without it neither comes.

    One that hands requests to a provider of another kind says in an attribute `options_of: str`
    under which name that is offered, and gets the chatbot's options for it.

    One whose service tells afterwards what an answer took has a coroutine method
    `generation(id: str) -> Usage | None`: for an answer that ended without a `UsageReport`, it is
    called with the id of its `GenerationId`, and again a few times while it returns None.
    """

    def stream(self, request: ProviderRequest) -> AsyncGenerator[Event, None]:
        """Answers as events; the last is `Finish`, or `ProviderError` is raised.

        An async generator, so that it can be closed.

        With `request.stream` false the text may come as one event. Closing the iterator, or
        cancelling the task that reads it, ends the request to the provider at once. There is no
        retrying in here, and no deadline but `timeouts.connect`: both are `routing.py`'s, for
        all providers alike. An answer that just stops is a `ProviderError` of kind
        `incomplete`.
        """

    async def check(self) -> None:
        """Returns when the provider is there and takes the key; raises `ProviderError` else."""

    async def close(self) -> None:
        """Lets go of everything. Called once, last."""
