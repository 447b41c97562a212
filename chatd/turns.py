"""A turn, from accepted to stored.

A running turn is a task of its own, not the request's: whoever reads it may go away, the turn
goes on and is stored, and anybody can read it again from any place.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from chatd.answering import RunningTurn, around, asked, collect, storable, unfinished
from chatd.bookkeeping import STORE_SECONDS, Books
from chatd.budgets import Budgets
from chatd.config import LimitsConfig
from chatd.domain import (
    CHARS_PER_TOKEN,
    MESSAGE_OVERHEAD_CHARS,
    Chatbot,
    Message,
    TurnStatus,
    Usage,
    new_turn_id,
)
from chatd.elsewhere import Following, Telling
from chatd.errors import NotFound, ProviderTimeout, RequestError, ShuttingDown
from chatd.estimates import Estimates, Said
from chatd.interceptor import Interceptor, Proceed, TurnContext
from chatd.metrics import Metrics
from chatd.observing import count_settled, count_turn
from chatd.provider import Event, ProviderRequest, Timeouts, needs
from chatd.reply import Reply, TurnResult, shown_reason
from chatd.routing import Router, Trail
from chatd.settling import settle, unsettled
from chatd.sharing import Message as Told
from chatd.sharing import Sharing
from chatd.storage import BeginTurn, ExistingTurn, FinishTurn, Renewed, Storage, TurnRecord
from chatd.tracing import Tracing
from chatd.turn_spans import begin_turn_span, end_turn_span

log = logging.getLogger(__name__)

GIVE_UP_SECONDS = 2.0
"""How long after its deadline a turn may take to be cancelled before it is ended without."""

STOP_SECONDS = 1.0
"""How long it is waited for a turn to end that another process was told to stop."""

MAX_MODELS = 1000
"""Models whose tokens are measured; there are as many as chatbots use."""


@dataclass(slots=True)
class Started:
    """A turn's reply. `replayed` says that the turn was there before, by its idempotency key."""

    reply: Reply
    replayed: bool = False


@dataclass(slots=True)
class Extras:
    """What a client that knows how models are asked may say beside its new messages.

    The model reads `given` in place of the new messages, which are just stored.
    """

    given: Sequence[Message]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    max_output_tokens: int | None = None

    @property
    def needed(self) -> frozenset[str]:
        """What a provider must take for it."""
        return needs(self.given, self.parameters)

    def without(self, history: Sequence[Message]) -> Sequence[Message]:
        """`history` without what `given` repeats of it, which is when a tool was called."""
        if not any(message.role == "assistant" for message in self.given):
            return history
        said = {message.content for message in self.given if message.role == "assistant"}
        end = len(history)
        while end and history[end - 1].role == "assistant" and history[end - 1].content in said:
            end -= 1
        while end and history[end - 1].role == "user":
            end -= 1
        return history[:end]


class Turns:
    """Runs turns, sees them stored, and finds them again."""

    def __init__(
        self,
        storage: Storage,
        router: Router,
        interceptors: Sequence[tuple[str, Interceptor]] = (),
        *,
        lease_seconds: float = 30,
        budgets: Budgets | None = None,
        sharing: Sharing | None = None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._storage = storage
        self._books = Books(storage, lease_seconds)
        self._router = router
        self._interceptors = tuple(interceptors)
        self._budgets = budgets
        self._tracing = tracing
        self.metrics = metrics or Metrics()
        """What is counted of turns, and whatever else this process counts."""
        self._estimates = Estimates()
        self._running: dict[str, RunningTurn] = {}
        self._beginning: dict[str, asyncio.Future[None]] = {}
        self._sharing = sharing or Sharing()
        self._elsewhere = Following(storage, self._sharing)
        self._telling = Telling(self._sharing, self._reply, self.left)
        self._sharing.on("stop", self._asked_to_stop)
        self._sharing.on("erased", self._asked_to_stop)
        self._trailing: set[asyncio.Task[None]] = set()
        self._chars_per_token: dict[str, float] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self.stuck: set[asyncio.Task[None]] = set()
        """Tasks of turns that were given up because a plugin in them does not end."""

    async def open(self) -> None:
        """Clears up after processes that died, and goes on doing so."""
        await self._books.sweep()
        self._keeper = asyncio.create_task(self._books.keep(self._leases, self._told))

    def answer_with(
        self,
        router: Router,
        interceptors: Sequence[tuple[str, Interceptor]],
        limits: LimitsConfig,
        lease_seconds: float,
    ) -> None:
        """Lets turns that begin from now on be answered by these; others keep what they have."""
        self._router = router
        self._interceptors = tuple(interceptors)
        self._books.lease_seconds = lease_seconds
        if self._budgets is not None:
            self._budgets.defaults = limits

    async def outlived(self) -> None:
        """Returns when every turn that is begun or runs now has ended, and is settled.

        Those that were given up because they do not end are not waited for.
        """
        for beginning in list(self._beginning.values()):
            await asyncio.wait([beginning])
        for tasks in (self._books.tasks, self._trailing):
            now = set(tasks)
            while pending := {task for task in now if not task.done()} - self.stuck:
                await asyncio.wait(pending, timeout=1)

    # Starting

    async def start(
        self,
        chatbot: Chatbot,
        session_id: str,
        messages: Sequence[Message],
        *,
        label: str | None = None,
        stream: bool = False,
        idempotency_key: str | None = None,
        extras: Extras | None = None,
    ) -> Started:
        """Begins a turn and lets it run, or finds the one that the idempotency key began.

        Raises `RequestError` when it cannot begin.
        """
        if self._closing:
            raise ShuttingDown
        turn_id = new_turn_id()
        begun = self._beginning[turn_id] = asyncio.get_running_loop().create_future()
        reserved = None
        try:
            if self._budgets is not None:
                reserved = await self._budgets.reserve(chatbot, turn_id)
            started = await self._start(
                turn_id, chatbot, session_id, messages, label, stream, idempotency_key, extras
            )
            if isinstance(started, RunningTurn):
                started.reserved, reserved = reserved, None
        finally:
            del self._beginning[turn_id]
            begun.set_result(None)
            if reserved is not None:
                reserved.release()
        if isinstance(started, RunningTurn):
            return Started(started.reply)
        return Started(await self._find(started, chatbot.id), replayed=True)

    async def _start(
        self,
        turn_id: str,
        chatbot: Chatbot,
        session_id: str,
        messages: Sequence[Message],
        label: str | None,
        stream: bool,
        idempotency_key: str | None,
        extras: Extras | None,
    ) -> RunningTurn | TurnRecord:
        accepted, since = asyncio.get_running_loop().time(), time.monotonic()
        settings = chatbot.settings
        system = [Message("system", settings.system_prompt)] if settings.system_prompt else []
        said = extras or Extras(messages)
        given = sum([message.cost_chars for message in (*system, *said.given)])
        budget = settings.context_tokens * self._chars_per_token.get(chatbot.model, CHARS_PER_TOKEN)
        begun = await self._books.begin(
            BeginTurn(
                turn_id=turn_id,
                session_id=session_id,
                chatbot_id=chatbot.id,
                messages=messages,
                history_chars=max(0, int(budget) - given),
                lease_seconds=self._books.lease_seconds,
                label=label,
                idempotency_key=idempotency_key,
                request_hash=_digest(label, messages, extras) if idempotency_key else None,
            )
        )
        if isinstance(begun, ExistingTurn):
            return begun.turn
        asked = (*system, *said.without(begun.history), *said.given)
        deadline = accepted + self.timeouts(chatbot).of(stream)
        request = ProviderRequest(
            model=chatbot.model,
            messages=asked,
            stream=stream,
            max_output_tokens=_least(said.max_output_tokens, settings.max_output_tokens),
            temperature=settings.temperature if said.temperature is None else said.temperature,
            parameters=said.parameters,
            user=_pseudonym(chatbot.id, begun.user_id or session_id),
            # Not the id itself: a widget's session is opened by it.
            session_id=_pseudonym(chatbot.id, session_id),
            options=settings.provider_options or {},
        )
        turn = RunningTurn(
            chatbot=chatbot,
            reply=Reply(begun.turn_id, session_id, begun.run),
            request=request,
            history_truncated=begun.history_truncated,
            # Images and tools are counted by no known measure.
            prompt_chars=0
            if said.needed
            else sum([len(message.content) for message in asked])
            + MESSAGE_OVERHEAD_CHARS * len(asked),
            trail=Trail(deadline, len(said.given)),
            since=since,
        )
        self._running[turn.id] = turn
        if self._tracing is None:
            turn.task = self._books.spawn(self._run(turn, request, deadline))
        else:
            # What begins meanwhile is a part of the turn.
            begin_turn_span(self._tracing, turn)
            with self._tracing.within(turn.span):
                turn.task = self._books.spawn(self._run(turn, request, deadline))
        return turn

    def require(self, chatbot: Chatbot, extras: Extras) -> None:
        """Raises `RequestError` when a turn with these could not begin, before anything is stored."""
        if self._closing:
            raise ShuttingDown
        self._router.takers(chatbot.model, extras.needed)

    def timeouts(self, chatbot: Chatbot) -> Timeouts:
        """How long a turn of this chatbot may take."""
        chain = self._router.chain(chatbot.model)
        return chain[0].timeouts if chain else Timeouts()

    # Finding again

    async def follow(
        self, chatbot: Chatbot, turn_id: str, *, session_id: str | None = None
    ) -> Reply:
        """The reply of a turn of this chatbot, whether it runs here, elsewhere, or has ended.

        Raises `NotFound`, also for a turn of another session when `session_id` is given.
        """
        if (turn := self._here(chatbot, turn_id, session_id)) is not None:
            return turn.reply
        return await self._find(await self.get(chatbot, turn_id, session_id=session_id), chatbot.id)

    def _here(self, chatbot: Chatbot, turn_id: str, session_id: str | None) -> RunningTurn | None:
        """The turn of this chatbot, and of this session when one is given, if it runs here."""
        turn = self._running.get(turn_id)
        if turn is None or turn.chatbot.id != chatbot.id:
            return None
        return turn if session_id in (None, turn.reply.session_id) else None

    async def get(
        self, chatbot: Chatbot, turn_id: str, *, session_id: str | None = None
    ) -> TurnRecord:
        """A turn of this chatbot as storage has it. Raises `NotFound`, as `follow` does."""
        record = await self._storage.get_turn(turn_id, chatbot.id)
        if record is None or session_id not in (None, record.session_id):
            raise NotFound("There is no turn with this id.")
        return record

    async def running_in(self, chatbot: Chatbot, session_id: str) -> Reply | None:
        """The reply of the turn that runs in a session now. Raises `NotFound`."""
        record = await self._storage.running_turn(session_id, chatbot.id)
        return None if record is None else await self._find(record, chatbot.id)

    async def stop(
        self, chatbot: Chatbot, turn_id: str, *, session_id: str | None = None
    ) -> TurnResult | None:
        """Ends a turn and says how it ended; what was said so far is kept.

        One that has ended stays as it is. None when another process runs it and did not end it at
        once: it does when it renews its lease. Raises `NotFound`, as `follow` does.
        """
        if (turn := self._here(chatbot, turn_id, session_id)) is not None:
            turn.end_early(TurnStatus.STOPPED)
            return await turn.reply.ended()
        record = await self.get(chatbot, turn_id, session_id=session_id)
        if record.status is not TurnStatus.RUNNING:
            return TurnResult.of(record)
        await self._storage.stop_turn(turn_id, chatbot.id)
        return await self._stopped_elsewhere(record, chatbot)

    async def _stopped_elsewhere(self, record: TurnRecord, chatbot: Chatbot) -> TurnResult | None:
        """Tells who runs a turn to end it; None when that takes long, or nobody can be told."""
        if not self._sharing.is_up:
            return None
        self._sharing.tell("stop", turn=record.id)
        reply = await self._find(record, chatbot.id)
        reply.add_reader(_reader)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                return await reply.ended()
        except TimeoutError:
            return None
        finally:
            reply.remove_reader(_reader)

    def _asked_to_stop(self, message: Told) -> None:
        """Another process tells that a turn is to end, or that its session was erased."""
        for turn in list(self._running.values()):
            if message.get("turn") == turn.id or message.get("session") == turn.reply.session_id:
                turn.end_early(TurnStatus.STOPPED)

    async def stop_in(self, chatbot: Chatbot, session_id: str) -> None:
        """Ends the turn that runs in a session of this chatbot here, if one does."""
        for turn in list(self._running.values()):
            if turn.reply.session_id == session_id and turn.chatbot.id == chatbot.id:
                turn.end_early(TurnStatus.STOPPED)
                await turn.reply.ended()

    def left(self, reply: Reply) -> None:
        """A reader of `reply` went away before its end."""
        turn = self._running.get(reply.turn_id)
        if turn is None or reply.is_read:
            return
        if turn.chatbot.settings.on_disconnect == "stop":
            turn.end_early(TurnStatus.STOPPED)

    async def _find(self, record: TurnRecord, chatbot_id: str) -> Reply:
        """The reply of a turn that storage has."""
        if (beginning := self._beginning.get(record.id)) is not None:
            await asyncio.wait([beginning])
        if (turn := self._running.get(record.id)) is not None:
            return turn.reply
        if record.status is not TurnStatus.RUNNING:
            return Reply.of(record)
        if (reply := self._elsewhere.reply(record)) is not None:
            return reply
        reply = self._elsewhere.begin(record, chatbot_id)
        self._behind(self._elsewhere.follow(reply))
        return reply

    def _reply(self, turn_id: str) -> Reply | None:
        """The reply of a turn that runs here."""
        turn = self._running.get(turn_id)
        return turn.reply if turn else None

    # Ending

    async def drain(self, seconds: float) -> None:
        """Begins no more turns, and waits that long for those that run; the rest is interrupted."""
        self._closing = True
        await self._until_idle(seconds)
        for turn in list(self._running.values()):
            turn.end_early(TurnStatus.INTERRUPTED)
        await self._until_idle(STORE_SECONDS * 2)
        for task in (*self._books.tasks, *self._trailing):
            task.cancel()

    async def _until_idle(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (self._beginning or self._books.tasks) and (left := end - loop.time()) > 0:
            if self._books.tasks:
                await asyncio.wait(self._books.tasks, timeout=min(left, 0.1))
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

    @property
    def count(self) -> int:
        """How many turns run here."""
        return len(self._running)

    @property
    def unstored(self) -> int:
        """How many ended that storage did not take yet."""
        return len(self._books.unstored)

    def _leases(self) -> list[tuple[str, int]]:
        return [(turn.id, turn.reply.run) for turn in self._running.values()]

    async def _told(self, renewed: Renewed) -> None:
        """Ends turns that another process was asked to stop, and those that nobody can read."""
        for turn_id in renewed.stopping | renewed.lost:
            turn = self._running.get(turn_id)
            if turn is None:
                continue
            if turn_id in renewed.lost:
                record = await self._storage.get_turn(turn_id, turn.chatbot.id)
                # One whose lease ran out meanwhile may still be finished.
                if record is not None and record.run == turn.reply.run:
                    continue
            turn.end_early(TurnStatus.STOPPED)

    # Running

    async def _run(self, turn: RunningTurn, request: ProviderRequest, deadline: float) -> None:
        turn.timer = asyncio.get_running_loop().call_at(deadline, self._is_late, turn)
        try:
            status, error = await collect(turn, self._events(turn, request))
        finally:
            turn.timer.cancel()
        if turn.answering:
            turn.answering = False
            await self._end(turn, status, error)

    def _is_late(self, turn: RunningTurn) -> None:
        """Ends the answering of a turn whose deadline has come."""
        turn.be_late()
        # A plugin may not let itself be cancelled; its turn ends all the same.
        turn.timer = asyncio.get_running_loop().call_later(GIVE_UP_SECONDS, self._give_up, turn)

    def _give_up(self, turn: RunningTurn) -> None:
        """Ends a turn whose task does not end."""
        log.error("turn %s was given up: %s does not end", turn.id, asked(turn))
        turn.answering = False
        turn.trail.give_up()
        if turn.task is not None:
            self._books.tasks.discard(turn.task)
            self.stuck.add(turn.task)
            turn.task.add_done_callback(self.stuck.discard)
        self._books.spawn(self._end(turn, unfinished(turn), ProviderTimeout()))

    def _events(self, turn: RunningTurn, request: ProviderRequest) -> AsyncGenerator[Event, None]:
        """The events of the turn, through the interceptors in their order."""
        router = self._router
        if not self._interceptors:
            return router.stream(request, turn.trail)

        def ask(context: TurnContext) -> AsyncGenerator[Event, None]:
            turn.request = replace(request, messages=context.messages)
            return router.stream(turn.request, turn.trail)

        proceed: Proceed = ask
        for name, interceptor in reversed(self._interceptors):
            proceed = around(name, interceptor, proceed)
        context = TurnContext(turn.id, turn.reply.session_id, turn.chatbot, request.messages)
        return proceed(context)

    async def _end(self, turn: RunningTurn, status: TurnStatus, error: RequestError | None) -> None:
        """Stores how a turn ended, and tells who waits for it."""
        text = turn.reply.text
        trail = turn.trail
        answered = trail.answering
        model = turn.finish.model if turn.finish else None
        if model is None and answered is not None:
            model = answered.model
        model = model and storable(model)
        finish_reason = turn.finish.reason if turn.finish else None
        usage = trail.usage or turn.usage
        truncated = turn.history_truncated or trail.shortened
        finish = FinishTurn(
            turn_id=turn.id,
            run=turn.reply.run,
            status=status,
            reply=text,
            model=model,
            provider=answered.provider if answered else None,
            finish_reason=finish_reason,
            error_code=error.code if error else None,
            usage=usage,
            attempts=turn.attempts_json(),
            rerunnable=status is TurnStatus.FAILED
            and not any(attempt.reached_model for attempt in trail.attempts),
            history_truncated=truncated,
            side=trail.side,
        )
        stored = False
        try:
            stored = await self._books.finish(finish)
        finally:
            self._running.pop(turn.id, None)
            if turn.reserved is not None:
                guess = None
                if usage.cost_usd is None:
                    guess = 0.0 if finish.rerunnable else self._guess(turn, turn.reserved.reserve)
                turn.reserved.settle(usage.cost_usd, guess=guess)
            turn.reply.end(
                TurnResult(
                    turn_id=turn.id,
                    status=status,
                    reply=text,
                    model=model,
                    usage=usage,
                    finish_reason=shown_reason(finish_reason, status, text),
                    history_truncated=truncated,
                    stored=stored,
                    error=error,
                )
            )
        self._learn(turn, usage)
        count_turn(self.metrics, turn, status, error)
        if self._tracing is not None:
            end_turn_span(self._tracing, turn, status, error)
        if unsettled(trail) and not self._closing:
            self._behind(self._settle(turn))

    async def _settle(self, turn: RunningTurn) -> None:
        """Learns what a turn took that is not known at its end, if that can be."""
        told = turn.reserved.correct if turn.reserved else None
        await settle(self._storage, turn.id, turn.reply.run, turn.trail, told)
        count_settled(self.metrics, turn)

    def _guess(self, turn: RunningTurn, reserve: float) -> float | None:
        """What a turn cost, for its budget, where that is not known; None without anything to go by."""
        if turn.has_answer and not turn.trail.attempts:
            # An interceptor answered, by means of its own.
            return None
        said = Said(turn.request, turn.answer_bytes)
        return self._estimates.of(turn.trail, said, reserve=reserve)

    def _behind(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` as a task that draining ends."""
        task = asyncio.create_task(work)
        self._trailing.add(task)
        task.add_done_callback(self._trailing.discard)

    def _learn(self, turn: RunningTurn, usage: Usage) -> None:
        """Lets what a provider counted and charged mend the estimates of a token's size and price."""
        self._estimates.learn(turn.trail)
        if len(turn.trail.attempts) == 1 and usage.input_tokens and turn.prompt_chars:
            counted = min(max(turn.prompt_chars / usage.input_tokens, 1.0), 8.0)
            model = turn.chatbot.model
            known = self._chars_per_token.get(model, float(CHARS_PER_TOKEN))
            if model in self._chars_per_token or len(self._chars_per_token) < MAX_MODELS:
                self._chars_per_token[model] = 0.8 * known + 0.2 * counted


def _reader() -> None:
    """Counts as one who reads."""


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _digest(label: str | None, messages: Sequence[Message], extras: Extras | None) -> bytes:
    """What a request says, for telling whether an idempotency key comes with the same again."""
    said: list[Any] = [label, *([message.role, message.content] for message in messages)]
    if extras is not None:
        said.append(asdict(extras))
    return hashlib.sha256(json.dumps(said).encode()).digest()


@lru_cache(10_000)
def _pseudonym(chatbot_id: str, user_id: str) -> str:
    """A stable name of a visitor for a provider, which does not tell who it is."""
    return hashlib.sha256(f"{chatbot_id}\n{user_id}".encode()).hexdigest()[:32]
