"""Turns that other processes run: read here as they come, and told to those who read them there.

Nobody is told of a turn who did not ask. Who asks says how much it has, and asks again every few
seconds and whenever something is missing; so what gets lost on the way is sent again, and what comes
twice is known by its place. Without any of it, storage is asked for the turn's end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, field

from chatd.domain import TurnStatus, Usage
from chatd.errors import NotFound, ShuttingDown, StorageUnavailable
from chatd.provider import ToolCallDelta
from chatd.reply import Reply, TurnResult
from chatd.shared import SharedUnavailable
from chatd.sharing import SAYING, Message, Sharing
from chatd.storage import Storage, TurnRecord

LOOK_SECONDS = 0.5
"""How often storage is asked about a turn that another process runs and does not tell of."""

ASK_AGAIN_SECONDS = 5.0
"""How often a process that tells of a turn is asked to go on, and storage whether it runs."""

TELL_SECONDS = 3 * ASK_AGAIN_SECONDS
"""How long who does not ask again is told."""

MAX_FRAME_CHARS = 64 * 1024
"""The most of a reply that is sent at once."""


class Telling:
    """Tells other processes what is said in turns that run here, once they ask.

    :param running: the reply of a turn that runs here, by its id.
    :param left: called when nobody reads a reply any more there.
    """

    def __init__(
        self,
        sharing: Sharing,
        running: Callable[[str], Reply | None],
        left: Callable[[Reply], None],
    ) -> None:
        self._sharing = sharing
        self._running = running
        self._left = left
        self._tellers: dict[tuple[str, str], _Teller] = {}
        sharing.on("read", self._asked)
        sharing.on("leave", self._leave)

    def _asked(self, message: Message) -> None:
        reply = self._running(message["turn"])
        if reply is None:
            return
        key = (reply.turn_id, message["from"])
        teller = self._tellers.get(key)
        if teller is None or teller.reply is not reply:
            teller = _Teller(self._sharing, message["from"], reply, lambda: self._drop(key))
            self._tellers[key] = teller
        teller.go_on(message["at"], message["calls"])

    def _leave(self, message: Message) -> None:
        if teller := self._tellers.get((message["turn"], message["from"])):
            teller.end()

    def _drop(self, key: tuple[str, str]) -> None:
        if teller := self._tellers.pop(key, None):
            self._left(teller.reply)


class _Teller:
    """Tells one process of one turn, one message after the other, each with all there is."""

    def __init__(
        self, sharing: Sharing, process: str, reply: Reply, ended: Callable[[], None]
    ) -> None:
        self.reply = reply
        self._sharing = sharing
        self._process = process
        self._ended = ended
        self._place = 0
        self._calls = 0
        self._owed = False
        self._end_told = False
        self._telling: asyncio.Task[None] | None = None
        self._end_later: asyncio.TimerHandle | None = None
        reply.add_reader(self._wake)

    def go_on(self, place: int, calls: int) -> None:
        """Tells from here on, for a while; at least one message."""
        self._place = min(place, self.reply.length)
        self._calls = min(calls, len(self.reply.tool_calls))
        self._owed = True
        if self._end_later is not None:
            self._end_later.cancel()
        self._end_later = asyncio.get_running_loop().call_later(TELL_SECONDS, self.end)
        self._wake()

    def end(self) -> None:
        """Tells no more."""
        self.reply.remove_reader(self._wake)
        if self._end_later is not None:
            self._end_later.cancel()
        self._ended()

    def _wake(self) -> None:
        if self._telling is None or self._telling.done():
            self._telling = self._sharing.spawn(self._tell(), SAYING)

    async def _tell(self) -> None:
        reply = self.reply
        try:
            while self._owed or self._place < reply.length or self._calls < len(reply.tool_calls):
                await self._send()
            if reply.result is not None:
                if not self._end_told:
                    await self._send()
                self.end()
        except SharedUnavailable:
            self.end()

    async def _send(self) -> None:
        reply, place, calls = self.reply, self._place, self._calls
        text = reply.text_from(place, MAX_FRAME_CHARS)
        called = reply.tool_calls[calls:]
        self._place, self._calls, self._owed = place + len(text), len(reply.tool_calls), False
        self._end_told = reply.result is not None and self._place == reply.length
        await self._sharing.send(
            self._process,
            "said",
            turn=reply.turn_id,
            run=reply.run,
            at=place,
            text=text,
            calls_at=calls,
            calls=[astuple(call) for call in called],
            end=self._end_told,
        )


@dataclass(slots=True)
class _Followed:
    """A turn that another process runs and somebody reads here."""

    reply: Reply
    chatbot_id: str
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    heard_at: float | None = None
    ended: bool = False

    def take(self, message: Message, now: float) -> None:
        """Adds what is new of a message; wakes who looks after it at the end and at a gap."""
        reply = self.reply
        place, calls = reply.length, len(reply.tool_calls)
        if message["at"] > place or message["calls_at"] > calls:
            self.heard.set()
            return
        self.heard_at = now
        reply.say(message["text"][place - message["at"] :])
        for call in message["calls"][calls - message["calls_at"] :]:
            reply.call(ToolCallDelta(*call))
        reply.is_known = True
        if message["end"]:
            self.ended = True
            self.heard.set()


class Following:
    """Reads turns that other processes run, for those who read them here."""

    def __init__(self, storage: Storage, sharing: Sharing) -> None:
        self._storage = storage
        self._sharing = sharing
        self._followed: dict[str, _Followed] = {}
        sharing.on("said", self._said)

    def reply(self, record: TurnRecord) -> Reply | None:
        """The reply of a turn that is followed already."""
        followed = self._followed.get(record.id)
        if followed is None or followed.reply.run != record.run:
            return None
        return followed.reply

    def begin(self, record: TurnRecord, chatbot_id: str) -> Reply:
        """The reply of a turn that `follow` will follow."""
        reply = Reply(record.id, record.session_id, record.run, is_known=False)
        self._followed[record.id] = _Followed(reply, chatbot_id)
        return reply

    async def follow(self, reply: Reply) -> None:
        """Follows a turn to its end, while anybody reads it."""
        followed = self._followed[reply.turn_id]
        try:
            record = await self._ended(followed)
        finally:
            if self._followed.get(reply.turn_id) is followed:
                del self._followed[reply.turn_id]
            self._sharing.tell("leave", turn=reply.turn_id)
        if record is not None:
            _end(reply, record)
        elif reply.is_read:
            reply.end(_lost(reply, NotFound("There is no turn with this id.")))

    async def _ended(self, followed: _Followed) -> TurnRecord | None:
        """The turn once it ended; None when nobody reads it any more, or it is gone."""
        reply = followed.reply
        while True:
            followed.heard.clear()
            self._ask(reply)
            was_heard = await self._wait(followed)
            if not was_heard or followed.ended:
                with contextlib.suppress(StorageUnavailable):
                    record = await self._storage.get_turn(reply.turn_id, followed.chatbot_id)
                    if record is None or record.status is not TurnStatus.RUNNING:
                        return record
                if not reply.is_read:
                    return None
            if followed.ended:
                # Its end is not stored yet.
                await asyncio.sleep(LOOK_SECONDS)

    def _ask(self, reply: Reply) -> None:
        """Asks whoever runs the turn to tell it from where it is known to."""
        place, calls = reply.length, len(reply.tool_calls)
        self._sharing.tell("read", turn=reply.turn_id, at=place, calls=calls)

    async def _wait(self, followed: _Followed) -> bool:
        """Waits until there is something to do; whether that was heard from the other process."""
        if followed.ended:
            return True
        seconds = ASK_AGAIN_SECONDS if self._is_told(followed) else LOOK_SECONDS
        try:
            async with asyncio.timeout(seconds):
                await followed.heard.wait()
        except TimeoutError:
            return False
        return True

    def _is_told(self, followed: _Followed) -> bool:
        now = asyncio.get_running_loop().time()
        lately = followed.heard_at is not None and now - followed.heard_at < TELL_SECONDS
        return lately and self._sharing.is_up

    def _said(self, message: Message) -> None:
        followed = self._followed.get(message["turn"])
        if followed is not None and followed.reply.run == message["run"]:
            followed.take(message, asyncio.get_running_loop().time())


def _end(reply: Reply, record: TurnRecord) -> None:
    """Ends a reply as storage has it; one that was run again meanwhile as one that broke off."""
    if record.run != reply.run and reply.length:
        reply.end(_lost(reply, ShuttingDown()))
    else:
        reply.end_as(record)


def _lost(reply: Reply, error: NotFound | ShuttingDown) -> TurnResult:
    """The end of a turn of which storage has none."""
    return TurnResult(
        turn_id=reply.turn_id,
        status=TurnStatus.INTERRUPTED,
        reply=reply.text,
        model=None,
        usage=Usage(),
        finish_reason=None,
        history_truncated=False,
        stored=False,
        error=error,
    )
