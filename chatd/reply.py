"""A reply as it comes: written once, read by any number of readers at their own pace."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from chatd.domain import TurnStatus, Usage
from chatd.errors import RequestError, ShuttingDown, error_of
from chatd.provider import ToolCallDelta
from chatd.storage import TurnRecord


@dataclass(slots=True)
class TurnResult:
    """How a turn ended, for whoever waits for it.

    `error` says why there is no whole answer; `reply` may hold a part of one all the same.
    `stored` is false while the reply could not be stored; that is tried again for a while.
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

    def require(self) -> TurnResult:
        """This result, if it has something to show. Raises its error else."""
        if self.error is not None and not self.reply:
            raise self.error
        return self

    @classmethod
    def of(cls, record: TurnRecord) -> TurnResult:
        """How a turn ended, as storage has it. A running one is taken as interrupted here."""
        error: RequestError | None = None
        if record.status not in (TurnStatus.COMPLETED, TurnStatus.STOPPED):
            error = error_of(record.error_code) if record.error_code else ShuttingDown()
        reply = record.reply or ""
        return cls(
            turn_id=record.id,
            status=record.status,
            reply=reply,
            model=record.model,
            usage=record.usage,
            finish_reason=shown_reason(record.finish_reason, record.status, reply),
            history_truncated=record.history_truncated,
            stored=True,
            error=error,
        )


def shown_reason(finish_reason: str | None, status: TurnStatus, reply: str) -> str | None:
    """What a client reads as `finish_reason`: the provider's, else how the turn ended."""
    if finish_reason is not None:
        return finish_reason
    return status.value if reply or status is TurnStatus.STOPPED else None


class Reply:
    """What is said in a turn, with its end.

    A place in it is a number of characters, so it means the same whether the reply is read while
    it comes, afterwards, or from storage. `run` tells runs of one turn apart.

    :param is_known: whether what was said so far is all here; what another process says is not,
        before its end.
    """

    def __init__(
        self, turn_id: str, session_id: str, run: int = 1, *, is_known: bool = True
    ) -> None:
        self.is_known = is_known
        self.turn_id = turn_id
        self.session_id = session_id
        self.run = run
        self.result: TurnResult | None = None
        self.tool_calls: list[ToolCallDelta] = []
        self._parts: list[str] = []
        self._ends: list[int] = []
        self._readers: list[Callable[[], None]] = []
        self._waiters: list[asyncio.Future[None]] = []

    @classmethod
    def of(cls, record: TurnRecord) -> Reply:
        """The reply of a turn that ended, as storage has it."""
        reply = cls(record.id, record.session_id, record.run)
        reply.end_as(record)
        return reply

    @property
    def text(self) -> str:
        """All that was said so far."""
        return "".join(self._parts)

    @property
    def length(self) -> int:
        """How many characters were said so far."""
        return self._ends[-1] if self._ends else 0

    def text_from(self, place: int, limit: int) -> str:
        """What was said from `place` on, at most `limit` characters of it."""
        ends = self._ends
        if not ends or place >= ends[-1]:
            return ""
        # Who keeps up lacks the last part alone.
        if len(ends) > 1 and place == ends[-2]:
            return self._parts[-1][:limit]
        first = bisect_right(ends, place)
        start = place - (ends[first - 1] if first else 0)
        last = min(bisect_right(ends, place + limit), len(self._parts) - 1)
        if first == last:
            return self._parts[first][start : start + limit]
        return "".join(self._parts[first : last + 1])[start : start + limit]

    def say(self, text: str) -> None:
        """Adds to what was said."""
        if text:
            self._ends.append(self.length + len(text))
            self._parts.append(text)
            self._tell()

    def call(self, delta: ToolCallDelta) -> None:
        """Adds to the tools that the model calls."""
        self.tool_calls.append(delta)
        self._tell()

    def end(self, result: TurnResult) -> None:
        """Says how the turn ended; nothing is said after that."""
        self.result = result
        self._tell()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def end_as(self, record: TurnRecord) -> None:
        """Says what storage has of a turn that ended, as far as it is not said yet."""
        self.say((record.reply or "")[self.length :])
        known = {call.index: call for call in whole_calls(self)}
        for attempt in record.attempts:
            for call in attempt.get("tool_calls", ()):
                rest = _rest(ToolCallDelta(**call), known.get(call["index"]))
                if rest is not None:
                    self.call(rest)
        self.end(TurnResult.of(record))

    async def ended(self) -> TurnResult:
        """How the turn ended, once it has. Cancelling the wait does not touch the turn."""
        if self.result is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        assert self.result is not None
        return self.result

    @property
    def is_read(self) -> bool:
        """Whether anybody reads this reply."""
        return bool(self._readers)

    def add_reader(self, wake: Callable[[], None]) -> None:
        """Lets `wake` be called whenever something was said, and at the end."""
        self._readers.append(wake)

    def remove_reader(self, wake: Callable[[], None]) -> None:
        """Ends what `add_reader` began."""
        if wake in self._readers:
            self._readers.remove(wake)

    def _tell(self) -> None:
        for wake in tuple(self._readers):
            wake()


def _rest(call: ToolCallDelta, known: ToolCallDelta | None) -> ToolCallDelta | None:
    """What is not known yet of a whole call; None when all of it is."""
    if known is None:
        return call
    id, name = (None if known.id else call.id), (None if known.name else call.name)
    arguments = call.arguments[len(known.arguments) :]
    return ToolCallDelta(call.index, id, name, arguments) if id or name or arguments else None


def whole_calls(reply: Reply) -> list[ToolCallDelta]:
    """The tools that were called, each in one piece."""
    calls: dict[int, ToolCallDelta] = {}
    for delta in reply.tool_calls:
        known = calls.get(delta.index, ToolCallDelta(delta.index))
        calls[delta.index] = ToolCallDelta(
            delta.index,
            known.id or delta.id,
            known.name or delta.name,
            known.arguments + delta.arguments,
        )
    return [calls[index] for index in sorted(calls)]
