"""An answer, as it is collected: what a plugin may yield around it, and what its ends mean."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from chatd import logs
from chatd.budgets import Reservation
from chatd.domain import Chatbot, TurnStatus, Usage
from chatd.errors import (
    InvalidRequest,
    Overloaded,
    ProviderError,
    ProviderErrorKind,
    ProviderFailed,
    ProviderTimeout,
    RateLimited,
    RequestError,
    ShuttingDown,
)
from chatd.interceptor import Interceptor, Proceed, TurnContext
from chatd.provider import (
    Event,
    Finish,
    ProviderRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    UsageReport,
    checked,
)
from chatd.reply import Reply, whole_calls
from chatd.routing import Trail

log = logging.getLogger(__name__)

MAX_RETRY_AFTER = 60.0
"""The most seconds a client is told to wait, whatever a provider asks."""


@dataclass(slots=True)
class RunningTurn:
    """A turn that runs.

    `since` is when it was accepted, on `time.monotonic`; `span` is there while turns are traced.
    `ending` is how it is to end, when it was told to end before its answer does.
    """

    chatbot: Chatbot
    reply: Reply
    request: ProviderRequest
    history_truncated: bool
    prompt_chars: int
    usage: Usage = Usage()
    finish: Finish | None = None
    trail: Trail = field(default_factory=Trail)
    answering: bool = True
    ending: TurnStatus | None = None
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    is_late: bool = False
    began: bool = False
    reserved: Reservation | None = None
    since: float = field(default_factory=time.monotonic)
    span: Any = None
    _half: str = ""
    _thought_bytes: int = 0

    @property
    def id(self) -> str:
        return self.reply.turn_id

    @property
    def has_answer(self) -> bool:
        """Whether anything was said, or a tool called."""
        return bool(self.reply.length or self.reply.tool_calls)

    @property
    def answer_bytes(self) -> int:
        """What came of the answer so far, in UTF-8: words, thoughts and calls of tools."""
        calls = sum(len(call.arguments.encode()) for call in self.reply.tool_calls)
        return self._thought_bytes + len(self.reply.text.encode()) + calls

    def take(self, event: Event) -> None:
        """Adds an event to what the turn has."""
        match event:
            case TextDelta(text):
                self.say(text)
            case ReasoningDelta(text):
                self._thought_bytes += len(text.encode("utf-8", "surrogatepass"))
            case ToolCallDelta(index, id, name, arguments):
                texts = (id and storable(id), name and storable(name), storable(arguments))
                self.reply.call(ToolCallDelta(index, *texts))
            case UsageReport(usage):
                self.usage = usage
            case Finish():
                self.finish = event

    def attempts_json(self) -> list[dict[str, Any]]:
        """The attempts as they are stored, that which answered with the tools that were called."""
        attempts = [attempt.to_json() for attempt in self.trail.attempts]
        answering = self.trail.answering
        if answering is not None and self.reply.tool_calls:
            place = self.trail.attempts.index(answering)
            attempts[place]["tool_calls"] = [asdict(call) for call in whole_calls(self.reply)]
        return attempts

    def say(self, text: str) -> None:
        """Adds to the answer what storage can hold of it: no U+0000, no half of a character."""
        text = (self._half + text).replace("\0", "")
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        if whole := storable(text[: -len(self._half) or None]):
            self.reply.say(whole)

    def be_late(self) -> None:
        """Ends the answering, since its time is over."""
        if self.answering and self.ending is None and self.task is not None:
            self.is_late = True
            self.task.cancel()

    def end_early(self, status: TurnStatus) -> None:
        """Ends the answering, if it goes on; what was said is kept."""
        if self.answering and self.ending is None:
            self.ending = status
            # A task that has not begun would never run at all.
            if self.task is not None and self.began:
                self.task.cancel()


async def collect(
    turn: RunningTurn, events: AsyncGenerator[Event, None]
) -> tuple[TurnStatus, RequestError | None]:
    """Collects the answer into `turn`, and says how it ended."""
    turn.began = True
    try:
        if turn.ending is not None:
            return _ended_early(turn)
        try:
            async for event in events:
                turn.take(event)
        finally:
            # As `aclosing` does, at half the cost.
            await events.aclose()
        if turn.finish is not None and turn.has_answer:
            return TurnStatus.COMPLETED, None
        log.warning("turn %s has no answer: %s said nothing", turn.id, asked(turn))
        error: RequestError = ProviderFailed()
    except asyncio.CancelledError as cancelled:
        task = asyncio.current_task()
        if turn.ending is not None and task is not None:
            task.uncancel()
            return _ended_early(turn)
        if turn.is_late and task is not None:
            task.uncancel()
        error = _late(turn) if turn.is_late else _failed(turn, cancelled)
    except Exception as failure:
        error = _late(turn) if turn.is_late else _failed(turn, failure)
    return unfinished(turn), error


def _late(turn: RunningTurn) -> RequestError:
    """What the client is told of a deadline that passed."""
    if turn.trail.answering is not None:
        turn.trail.answering.fail(ProviderErrorKind.TIMEOUT, reached_model=True)
    log.warning("turn %s: %s did not answer in time", turn.id, asked(turn))
    return ProviderTimeout()


def unfinished(turn: RunningTurn) -> TurnStatus:
    """What a turn is that did not come to its end."""
    return TurnStatus.INTERRUPTED if turn.has_answer else TurnStatus.FAILED


def _ended_early(turn: RunningTurn) -> tuple[TurnStatus, RequestError | None]:
    if turn.ending is TurnStatus.STOPPED:
        return TurnStatus.STOPPED, None
    return unfinished(turn), ShuttingDown()


def _failed(turn: RunningTurn, failure: BaseException) -> RequestError:
    """What the client is told of what ended the answering."""
    if isinstance(failure, ProviderError):
        return _told(failure)
    if isinstance(failure, RequestError):
        return failure
    if not isinstance(failure, PluginFailed):
        log.error("turn %s failed: %s", turn.id, logs.trace(failure))
    return RequestError()


class PluginFailed(Exception):
    """A plugin around the turn failed, and was named in the log."""


def around(name: str, interceptor: Interceptor, inner: Proceed) -> Proceed:
    """`inner` inside of `interceptor`, whose own failures are logged by name."""

    async def outer(context: TurnContext) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(interceptor.around(context, inner)) as events:
                async for event in events:
                    yield checked(event)
        except (ProviderError, RequestError, PluginFailed):
            raise
        except Exception as error:
            log.error("interceptor %s raised %s", name, logs.trace(error))
            raise PluginFailed from None

    return outer


def asked(turn: RunningTurn) -> str:
    """Who was asked last, for the log."""
    answering = turn.trail.answering
    return f"provider {answering.provider}" if answering else "no provider"


def _told(failure: ProviderError) -> RequestError:
    """What the client is told of a provider's failure: nothing of the provider's own words."""
    asked = failure.retry_after
    known = isinstance(asked, int | float) and 0 < asked < math.inf
    wait = min(asked, MAX_RETRY_AFTER) if known and asked is not None else None
    match failure.kind:
        case ProviderErrorKind.TIMEOUT:
            return ProviderTimeout()
        case ProviderErrorKind.RATE_LIMIT:
            return RateLimited(
                "The model provider takes no more requests just now. Try again later.",
                retry_after=math.ceil(wait) if wait else 5,
            )
        case ProviderErrorKind.OVERLOADED if wait:
            return Overloaded(retry_after=math.ceil(wait))
        case ProviderErrorKind.CONTEXT_LENGTH:
            return InvalidRequest("The conversation is too long for this chatbot's model.")
        case _:
            return ProviderFailed()


def storable(text: str) -> str:
    """`text` as UTF-8 can hold it: pairs of surrogates joined, single ones replaced, no U+0000."""
    if text.isascii():
        return text.replace("\0", "")
    units = text.replace("\0", "").encode("utf-16-le", "surrogatepass")
    return units.decode("utf-16-le", "replace")
