"""A turn, from accepted to stored.

A running turn is a task of its own, not the request's: whoever waits for it may go away, the
turn goes on and is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from chatd import logs
from chatd.answering import RunningTurn, TurnResult, around, asked, collect, storable
from chatd.domain import CHARS_PER_TOKEN, Chatbot, Message, TurnStatus, Usage, new_id
from chatd.errors import (
    NotFound,
    ProviderTimeout,
    RequestError,
    ShuttingDown,
    StorageUnavailable,
)
from chatd.interceptor import Interceptor, Proceed, TurnContext
from chatd.provider import Event, ProviderRequest, Timeouts
from chatd.routing import Router, total_usage
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

GIVE_UP_SECONDS = 2.0
"""How long after its deadline a turn may take to be cancelled before it is ended without."""

MAX_MODELS = 1000
"""Models whose tokens are measured; there are as many as chatbots use."""


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
        self._unstored: dict[str, FinishTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._chars_per_token: dict[str, float] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._starting = 0
        self._closing = False
        self.stuck: set[asyncio.Task[None]] = set()
        """Tasks of turns that were given up because a plugin in them does not end."""

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
        self._starting += 1
        try:
            return await self._start(chatbot, session_id, messages, label, stream)
        finally:
            self._starting -= 1

    async def _start(
        self,
        chatbot: Chatbot,
        session_id: str,
        messages: Sequence[Message],
        label: str | None,
        stream: bool,
    ) -> RunningTurn:
        accepted = asyncio.get_running_loop().time()
        settings = chatbot.settings
        system = [Message("system", settings.system_prompt)] if settings.system_prompt else []
        given = sum(message.cost_chars for message in (*system, *messages))
        budget = settings.context_tokens * self._chars_per_token.get(chatbot.model, CHARS_PER_TOKEN)
        begun = await self._begin(
            BeginTurn(
                turn_id=new_id(),
                session_id=session_id,
                chatbot_id=chatbot.id,
                messages=messages,
                history_chars=max(0, int(budget) - given),
                lease_seconds=LEASE_SECONDS,
                label=label,
            )
        )
        asked = (*system, *begun.history, *messages)
        request = ProviderRequest(
            model=chatbot.model,
            messages=asked,
            stream=stream,
            max_output_tokens=settings.max_output_tokens,
            temperature=settings.temperature,
            user=_pseudonym(chatbot.id, begun.user_id or session_id),
            # Not the id itself: a widget's session is opened by it.
            session_id=_pseudonym(chatbot.id, session_id),
        )
        turn = RunningTurn(
            id=begun.turn_id,
            run=begun.run,
            session_id=session_id,
            chatbot=chatbot,
            history_truncated=begun.history_truncated,
            prompt_chars=sum(len(message.content) for message in asked),
        )
        self._running[turn.id] = turn
        turn.task = self._spawn(self._run(turn, request, accepted + self._deadline(request)))
        return turn

    async def _begin(self, request: BeginTurn) -> BegunTurn:
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                begun = await self._storage.begin_turn(request)
        except (TimeoutError, StorageUnavailable) as error:
            # It may have begun all the same, and nobody would run it.
            self._spawn(self._take_back(request.turn_id))
            if isinstance(error, StorageUnavailable):
                raise
            raise StorageUnavailable(f"begin_turn took more than {BEGIN_SECONDS} s") from None
        except NotFound:
            raise NotFound("This chatbot has no session with this id.") from None
        assert isinstance(begun, BegunTurn), "without an idempotency key every turn is new"
        return begun

    async def drain(self, seconds: float) -> None:
        """Begins no more turns, and waits that long for those that run; the rest is interrupted."""
        self._closing = True
        await self._until_idle(seconds)
        for turn in list(self._running.values()):
            turn.interrupt()
        await self._until_idle(STORE_SECONDS * 2)
        for task in self._tasks:
            task.cancel()

    async def _until_idle(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (self._starting or self._tasks) and (left := end - loop.time()) > 0:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=min(left, 0.1))
            else:
                await asyncio.sleep(min(left, 0.01))

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

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep(self) -> None:
        """Renews the leases of running turns, and ends those of processes that are gone."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            turns = [(turn.id, turn.run) for turn in self._running.values()]
            turns += [(finish.turn_id, finish.run) for finish in self._unstored.values()]
            try:
                async with asyncio.timeout(LEASE_SECONDS / 3):
                    if turns:
                        await self._storage.renew_turns(turns, LEASE_SECONDS)
                    await self._storage.sweep()
            except (TimeoutError, StorageUnavailable) as error:
                log.warning("leases cannot be renewed: %s", error or "no answer in time")
            except Exception:
                log.exception("storage raised what no storage should while renewing leases")

    async def _run(self, turn: RunningTurn, request: ProviderRequest, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        # A plugin may not let itself be cancelled; its turn ends all the same.
        giving_up = loop.call_at(deadline + GIVE_UP_SECONDS, self._give_up, turn)
        try:
            status, error = await collect(turn, self._events(turn, request), deadline)
        finally:
            giving_up.cancel()
        if turn.answering:
            turn.answering = False
            await self._end(turn, status, error)

    def _give_up(self, turn: RunningTurn) -> None:
        """Ends a turn whose task does not end."""
        log.error("turn %s was given up: %s does not end", turn.id, asked(turn))
        turn.answering = False
        if turn.task is not None:
            self._tasks.discard(turn.task)
            self.stuck.add(turn.task)
            turn.task.add_done_callback(self.stuck.discard)
        status = TurnStatus.INTERRUPTED if turn.parts else TurnStatus.FAILED
        self._spawn(self._end(turn, status, ProviderTimeout()))

    def _deadline(self, request: ProviderRequest) -> float:
        """How many seconds a turn may take from being accepted."""
        chain = self._router.chain(request.model)
        timeouts = chain[0].timeouts if chain else Timeouts()
        return timeouts.total if request.stream else timeouts.plain

    def _events(self, turn: RunningTurn, request: ProviderRequest) -> AsyncGenerator[Event, None]:
        """The events of the turn, through the interceptors in their order."""
        if not self._interceptors:
            return self._router.stream(request, turn.attempts)

        def ask(context: TurnContext) -> AsyncGenerator[Event, None]:
            return self._router.stream(replace(request, messages=context.messages), turn.attempts)

        proceed: Proceed = ask
        for name, interceptor in reversed(self._interceptors):
            proceed = around(name, interceptor, proceed)
        return proceed(TurnContext(turn.id, turn.session_id, turn.chatbot, request.messages))

    async def _end(self, turn: RunningTurn, status: TurnStatus, error: RequestError | None) -> None:
        """Stores how a turn ended, and tells who waits for it."""
        reply = "".join(turn.parts)
        answered = turn.attempts[-1] if turn.attempts else None
        model = turn.finish.model if turn.finish else None
        if model is None and answered is not None:
            model = answered.model
        model = model and storable(model)
        finish_reason = turn.finish.reason if turn.finish else None
        usage = total_usage(turn.attempts) or turn.usage
        finish = FinishTurn(
            turn_id=turn.id,
            run=turn.run,
            status=status,
            reply=reply,
            model=model,
            provider=answered.provider if answered else None,
            finish_reason=finish_reason,
            error_code=error.code if error else None,
            usage=usage,
            attempts=[attempt.to_json() for attempt in turn.attempts],
            rerunnable=status is TurnStatus.FAILED
            and not any(attempt.reached_model for attempt in turn.attempts),
        )
        stored = False
        try:
            stored = await self._store(finish)
        finally:
            self._running.pop(turn.id, None)
            turn.ended.set_result(
                TurnResult(
                    turn_id=turn.id,
                    status=status,
                    reply=reply,
                    model=model,
                    usage=usage,
                    finish_reason=finish_reason or (status.value if reply else None),
                    history_truncated=turn.history_truncated,
                    stored=stored,
                    # Part of an answer is shown, and `finish_reason` tells that it is one.
                    error=None if reply else error,
                )
            )
        self._learn(turn, usage)

    def _learn(self, turn: RunningTurn, usage: Usage) -> None:
        """Lets what a provider counted of the prompt mend the estimate of a token's characters."""
        if len(turn.attempts) == 1 and usage.input_tokens and turn.prompt_chars:
            counted = min(max(turn.prompt_chars / usage.input_tokens, 1.0), 8.0)
            model = turn.chatbot.model
            known = self._chars_per_token.get(model, float(CHARS_PER_TOKEN))
            if model in self._chars_per_token or len(self._chars_per_token) < MAX_MODELS:
                self._chars_per_token[model] = 0.8 * known + 0.2 * counted

    async def _store(self, finish: FinishTurn) -> bool:
        try:
            async with asyncio.timeout(STORE_SECONDS):
                stored = await self._storage.finish_turn(finish)
        except Exception as error:
            known = isinstance(error, TimeoutError | StorageUnavailable)
            told = (error or "no answer in time") if known else logs.trace(error)
            log.error("turn %s is not stored yet: %s", finish.turn_id, told)
            self._unstored[finish.turn_id] = finish
            self._spawn(self._store_later(finish))
            return False
        if not stored:
            log.warning("turn %s was not stored: its session went on or is gone", finish.turn_id)
        return stored

    async def _take_back(self, turn_id: str) -> None:
        """Ends a turn that began although nobody was told so."""
        finish = FinishTurn(turn_id, TurnStatus.FAILED, error_code=StorageUnavailable.code)
        finish = replace(finish, rerunnable=True)
        for pause in _backoff(STORE_LATER_SECONDS):
            try:
                await self._storage.finish_turn(finish)
                return
            except StorageUnavailable:
                await asyncio.sleep(pause)

    async def _store_later(self, finish: FinishTurn) -> None:
        stored = False
        try:
            for pause in _backoff(STORE_LATER_SECONDS):
                await asyncio.sleep(pause)
                try:
                    async with asyncio.timeout(STORE_LATER_SECONDS / 4):
                        stored = await self._storage.finish_turn(finish)
                    break
                except Exception as error:
                    log.error("turn %s is not stored yet: %s", finish.turn_id, type(error).__name__)
        finally:
            del self._unstored[finish.turn_id]
            if stored:
                log.warning("turn %s is stored now", finish.turn_id)
            else:
                log.error("turn %s could not be stored: its reply is lost", finish.turn_id)


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
