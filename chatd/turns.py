"""A turn, from accepted to stored.

A running turn is a task of its own, not the request's: whoever waits for it may go away, the
turn goes on and is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from chatd.domain import CHARS_PER_TOKEN, Chatbot, Message, TurnStatus, Usage, new_id
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
    StorageUnavailable,
)
from chatd.interceptor import Interceptor, Proceed, TurnContext
from chatd.provider import Event, Finish, ProviderRequest, TextDelta, UsageReport
from chatd.routing import Attempt, Router
from chatd.storage import BeginTurn, BegunTurn, FinishTurn, Storage

log = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
"""How long a turn outlives a process that died, unless storage knows sooner; renewed thrice."""

BEGIN_SECONDS = 10.0
"""How long storage may take to begin a turn before the client is told to come back."""

STORE_SECONDS = 2.0
"""How long an answer waits to be stored before the client gets it all the same."""

STORE_LATER_SECONDS = 60.0
"""How long storing is tried again after that."""

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
    session_id: str
    chatbot: Chatbot
    history_truncated: bool
    parts: list[str] = field(default_factory=list)
    usage: Usage = Usage()
    finish: Finish | None = None
    attempts: list[Attempt] = field(default_factory=list)
    _half: str = ""
    ended: asyncio.Future[TurnResult] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def say(self, text: str) -> None:
        """Adds to the answer what storage can hold of it: no U+0000, no half of a character."""
        text = (self._half + text).replace("\0", "")
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        if whole := storable(text[: -len(self._half) or None]):
            self.parts.append(whole)

    async def result(self) -> TurnResult:
        """How the turn ended, once it has. Cancelling the wait does not touch the turn."""
        return await asyncio.shield(self.ended)


class Turns:
    """Runs turns and sees them stored."""

    def __init__(
        self,
        storage: Storage,
        router: Router,
        interceptors: Sequence[tuple[str, Interceptor]] = (),
    ) -> None:
        self._storage = storage
        self._router = router
        self._interceptors = tuple(interceptors)
        self._running: dict[str, RunningTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False

    async def open(self) -> None:
        """Clears up after processes that died, and goes on doing so."""
        try:
            await self._storage.sweep()
        except StorageUnavailable as error:
            # It comes back by itself, and so does this.
            log.error("storage is unavailable: %s", error.detail)
        self._keeper = asyncio.create_task(self._keep())

    async def start(
        self,
        chatbot: Chatbot,
        session_id: str,
        messages: Sequence[Message],
        *,
        label: str | None = None,
        stream: bool = False,
    ) -> RunningTurn:
        """Begins a turn and lets it run. Raises `RequestError` when it cannot begin."""
        if self._closing:
            raise ShuttingDown
        settings = chatbot.settings
        system = [Message("system", settings.system_prompt)] if settings.system_prompt else []
        given = sum(message.cost_chars for message in (*system, *messages))
        begin = BeginTurn(
            turn_id=new_id(),
            session_id=session_id,
            chatbot_id=chatbot.id,
            messages=messages,
            history_chars=max(0, settings.context_tokens * CHARS_PER_TOKEN - given),
            lease_seconds=LEASE_SECONDS,
            label=label,
        )
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                begun = await self._storage.begin_turn(begin)
        except TimeoutError:
            raise StorageUnavailable(f"begin_turn took more than {BEGIN_SECONDS} s") from None
        assert isinstance(begun, BegunTurn), "without an idempotency key every turn is new"
        turn = RunningTurn(begun.turn_id, session_id, chatbot, begun.history_truncated)
        request = ProviderRequest(
            model=chatbot.model,
            messages=(*system, *begun.history, *messages),
            stream=stream,
            max_output_tokens=settings.max_output_tokens,
            temperature=settings.temperature,
            user=_pseudonym(chatbot.id, begun.user_id) if begun.user_id else session_id,
            session_id=session_id,
        )
        self._running[turn.id] = turn
        self._spawn(self._run(turn, request))
        return turn

    async def drain(self, seconds: float) -> None:
        """Begins no more turns, and waits that long for those that run; the rest is interrupted."""
        self._closing = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=STORE_SECONDS * 2)

    async def close(self) -> None:
        """Ends what is left. Called once, after `drain`."""
        await self.drain(0)
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    @property
    def closing(self) -> bool:
        """Whether no more turns are begun."""
        return self._closing

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self) -> None:
        """Renews the leases of running turns, and ends those of processes that are gone."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            try:
                if self._running:
                    await self._storage.renew_turns(list(self._running), LEASE_SECONDS)
                await self._storage.sweep()
            except StorageUnavailable as error:
                log.warning("leases cannot be renewed: %s", error.detail)
            except Exception:
                log.exception("storage raised what no storage should while renewing leases")

    async def _run(self, turn: RunningTurn, request: ProviderRequest) -> None:
        try:
            status, error = await self._answer(turn, request)
            await self._end(turn, status, error)
        except Exception:
            log.exception("turn %s failed in chatd itself", turn.id)
            await self._store(FinishTurn(turn.id, TurnStatus.FAILED, error_code=RequestError.code))
            if not turn.ended.done():
                turn.ended.set_exception(RequestError())
        finally:
            self._running.pop(turn.id, None)

    async def _answer(
        self, turn: RunningTurn, request: ProviderRequest
    ) -> tuple[TurnStatus, RequestError | None]:
        """Collects the answer, and says how it ended."""
        try:
            async with asyncio.timeout(self._deadline(request)):
                async with aclosing(self._events(turn, request)) as events:
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
            error: RequestError = ProviderFailed()
        except TimeoutError:
            error = ProviderTimeout()
            if turn.attempts:
                late = turn.attempts[-1]
                late.error = ProviderErrorKind.TIMEOUT
                log.warning("provider %s did not answer turn %s in time", late.provider, turn.id)
        except ProviderError as failure:
            error = _told(failure)
        except RequestError as refused:
            error = refused
        except asyncio.CancelledError:
            # Cancelled only by `drain`: what was said is kept.
            error = ShuttingDown()
            return TurnStatus.INTERRUPTED, error
        except Exception:
            # Its plugin was named where it was raised.
            error = RequestError()
        return (TurnStatus.INTERRUPTED if turn.parts else TurnStatus.FAILED), error

    def _deadline(self, request: ProviderRequest) -> float | None:
        chain = self._router.chain(request.model)
        if not chain:
            return None
        return chain[0].timeouts.total if request.stream else chain[0].timeouts.plain

    def _events(self, turn: RunningTurn, request: ProviderRequest) -> AsyncGenerator[Event, None]:
        """The events of the turn, through the interceptors in their order."""
        if not self._interceptors:
            return self._router.stream(request, turn.attempts)

        def ask(context: TurnContext) -> AsyncGenerator[Event, None]:
            return self._router.stream(replace(request, messages=context.messages), turn.attempts)

        proceed: Proceed = ask
        for name, interceptor in reversed(self._interceptors):
            proceed = _around(name, interceptor, proceed)
        return proceed(TurnContext(turn.id, turn.session_id, turn.chatbot, request.messages))

    async def _end(self, turn: RunningTurn, status: TurnStatus, error: RequestError | None) -> None:
        reply = "".join(turn.parts)
        answered = turn.attempts[-1] if turn.attempts else None
        model = turn.finish.model if turn.finish else None
        if model is None and answered is not None:
            model = answered.model
        model = model and storable(model)
        finish_reason = turn.finish.reason if turn.finish else None
        finish = FinishTurn(
            turn_id=turn.id,
            status=status,
            reply=reply,
            model=model,
            provider=answered.provider if answered else None,
            finish_reason=finish_reason,
            error_code=error.code if error else None,
            usage=turn.usage,
            attempts=[attempt.to_json() for attempt in turn.attempts],
            rerunnable=status is TurnStatus.FAILED and not _reached_model(turn),
        )
        stored = await self._store(finish)
        turn.ended.set_result(
            TurnResult(
                turn_id=turn.id,
                status=status,
                reply=reply,
                model=model,
                usage=turn.usage,
                finish_reason=finish_reason or (status.value if reply else None),
                history_truncated=turn.history_truncated,
                stored=stored,
                # Part of an answer is shown, and `finish_reason` tells that it is one.
                error=None if reply else error,
            )
        )

    async def _store(self, finish: FinishTurn) -> bool:
        try:
            async with asyncio.timeout(STORE_SECONDS):
                stored = await self._storage.finish_turn(finish)
        except (TimeoutError, StorageUnavailable) as error:
            log.error("turn %s is not stored yet: %s", finish.turn_id, error or "no answer in time")
            self._spawn(self._store_later(finish))
            return False
        except Exception:
            log.exception("storage raised what no storage should at the end of %s", finish.turn_id)
            self._spawn(self._store_later(finish))
            return False
        if not stored:
            log.warning("turn %s was not stored: its session went on or is gone", finish.turn_id)
        return stored

    async def _store_later(self, finish: FinishTurn) -> None:
        for pause in _backoff(STORE_LATER_SECONDS):
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(STORE_LATER_SECONDS / 4):
                    stored = await self._storage.finish_turn(finish)
                log.warning("turn %s is %s", finish.turn_id, "stored now" if stored else "gone")
                return
            except Exception as error:
                log.error("turn %s is not stored yet: %s", finish.turn_id, error)
        log.error("turn %s could not be stored and its reply is lost", finish.turn_id)


def _around(name: str, interceptor: Interceptor, inner: Proceed) -> Proceed:
    """`inner` inside of `interceptor`, whose own failures are logged by name."""

    async def outer(context: TurnContext) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(interceptor.around(context, inner)) as events:
                async for event in events:
                    yield event
        except (ProviderError, RequestError):
            raise
        except Exception as error:
            if not getattr(error, "_chatd_logged", False):
                log.exception("interceptor %s raised", name)
                error._chatd_logged = True  # type: ignore[attr-defined]
            raise

    return outer


def _reached_model(turn: RunningTurn) -> bool:
    free = {
        ProviderErrorKind.CONNECTION,
        ProviderErrorKind.AUTHENTICATION,
        ProviderErrorKind.CREDIT,
        ProviderErrorKind.RATE_LIMIT,
        ProviderErrorKind.INVALID_REQUEST,
        ProviderErrorKind.CONTEXT_LENGTH,
        ProviderErrorKind.MODERATION,
    }
    return any(attempt.error not in free for attempt in turn.attempts)


def _told(failure: ProviderError) -> RequestError:
    """What the client is told of a provider's failure: nothing of the provider's own words."""
    wait = None if failure.retry_after is None else min(failure.retry_after, MAX_RETRY_AFTER)
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


def _pseudonym(chatbot_id: str, user_id: str) -> str:
    """A stable name of a visitor for a provider, which does not tell who it is."""
    return hashlib.sha256(f"{chatbot_id}\n{user_id}".encode()).hexdigest()[:32]


def _backoff(total: float, first: float = 0.25, most: float = 5.0) -> list[float]:
    """Pauses in seconds, twice as long each time, that add up to `total`."""
    pauses: list[float] = []
    pause = first
    while sum(pauses) < total:
        pauses.append(pause)
        pause = min(pause * 2, most)
    return pauses
