"""An answer, as it is collected: what a plugin may yield around it, and what its ends mean."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from chatd import logs
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
from chatd.provider import Event, Finish, TextDelta, UsageReport, checked
from chatd.routing import Attempt

log = logging.getLogger(__name__)

MAX_RETRY_AFTER = 60.0
"""The most seconds a client is told to wait, whatever a provider asks."""


@dataclass(frozen=True, slots=True)
class TurnResult:
    """How a turn ended, for whoever waits for it.

    `error` is set when there is no answer to show. `stored` is false while the reply could not
    be stored; that is tried again for a while.
    """

    turn_id: str
    status: TurnStatus
    reply: str
    model: str | None
    usage: Usage
    finish_reason: str | None
    history_truncated: bool
    stored: bool
    error: RequestError | None


@dataclass(slots=True)
class RunningTurn:
    """A turn that runs."""

    id: str
    run: int
    session_id: str
    chatbot: Chatbot
    history_truncated: bool
    prompt_chars: int
    parts: list[str] = field(default_factory=list)
    usage: Usage = Usage()
    finish: Finish | None = None
    attempts: list[Attempt] = field(default_factory=list)
    answering: bool = True
    interrupted: bool = False
    task: asyncio.Task[None] | None = None
    ended: asyncio.Future[TurnResult] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    _half: str = ""

    def say(self, text: str) -> None:
        """Adds to the answer what storage can hold of it: no U+0000, no half of a character."""
        text = (self._half + text).replace("\0", "")
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        if whole := storable(text[: -len(self._half) or None]):
            self.parts.append(whole)

    def interrupt(self) -> None:
        """Ends the answering, if it goes on; what was said is kept."""
        if self.answering and self.task is not None:
            self.interrupted = True
            self.task.cancel()

    async def result(self) -> TurnResult:
        """How the turn ended, once it has. Cancelling the wait does not touch the turn."""
        return await asyncio.shield(self.ended)


async def collect(
    turn: RunningTurn, events: AsyncGenerator[Event, None], deadline: float
) -> tuple[TurnStatus, RequestError | None]:
    """Collects the answer into `turn`, and says how it ended.

    :param deadline: on the event loop's clock. A plugin that does not let itself be cancelled
        makes it later.
    """
    scope = asyncio.timeout_at(deadline)
    try:
        async with scope, aclosing(events):
            async for event in events:
                match event:
                    case TextDelta(text):
                        turn.say(text)
                    case UsageReport(usage):
                        turn.usage = usage
                    case Finish():
                        turn.finish = event
        if turn.finish is not None and turn.parts:
            return TurnStatus.COMPLETED, None
        log.warning("turn %s has no answer: %s said nothing", turn.id, asked(turn))
        error: RequestError = ProviderFailed()
    except asyncio.CancelledError as cancelled:
        task = asyncio.current_task()
        if turn.interrupted and task is not None:
            task.uncancel()
            error = ShuttingDown()
        else:
            error = _failed(turn, cancelled)
    except Exception as failure:
        if scope.expired():
            error = ProviderTimeout()
            if turn.attempts:
                turn.attempts[-1].fail(ProviderErrorKind.TIMEOUT, reached_model=True)
            log.warning("turn %s: %s did not answer in time", turn.id, asked(turn))
        else:
            error = _failed(turn, failure)
    return (TurnStatus.INTERRUPTED if turn.parts else TurnStatus.FAILED), error


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
    return f"provider {turn.attempts[-1].provider}" if turn.attempts else "no provider"


def _told(failure: ProviderError) -> RequestError:
    """What the client is told of a provider's failure: nothing of the provider's own words."""
    asked = failure.retry_after
    known = isinstance(asked, int | float) and 0 < asked < math.inf
    wait = min(float(asked), MAX_RETRY_AFTER) if known and asked is not None else None
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
