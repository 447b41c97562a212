"""Copies everything from one storage to another: in parts, resumable, counted on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields

from chatd.domain import Chatbot, Session
from chatd.errors import ChatdError, ConflictError, NotFound
from chatd.storage import PART_CHARS, PART_MESSAGE_CHARS, Storage, Tally

PAGE = 256
"""Sessions that are listed at once."""

AT_ONCE = 32
"""Sessions that are looked at at once."""

IN_FLIGHT_CHARS = 2 * PART_CHARS
"""How much is under way at once, so that neither memory nor a request's body grows with it."""

Progress = Callable[[int, int], None]


class CopyError(ChatdError):
    """What was asked for cannot be copied; the text says why."""


@dataclass
class Count:
    """What one side holds of what is copied."""

    chatbots: int = 0
    sessions: int = 0
    messages: int = 0
    turns: int = 0

    def add(self, tally: Tally) -> None:
        """Counts a session."""
        self.sessions += 1
        self.messages += tally.messages
        self.turns += tally.turns


@dataclass
class Report:
    """What came of a copy.

    `changed` are sentences about chatbots that the target had otherwise. `different` are the ids
    of sessions that the target does not hold as the source does, and `conflicts` says why, by id,
    of those that cannot be copied.
    """

    source: Count = field(default_factory=Count)
    target: Count = field(default_factory=Count)
    changed: list[str] = field(default_factory=list)
    conflicts: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)


async def copy(source: Storage, target: Storage, progress: Progress) -> Report:
    """Brings the target to hold all that the source holds, and counts both.

    What is there already is passed over, so a copy that was broken off goes on when it is
    repeated. Nothing is removed from the target.

    :param progress: called with how many sessions and messages the target has of them so far.
    """
    await source.sweep()
    chatbots = await source.list_chatbots()
    await _require_own_keys(chatbots, target)
    changed = [told for chatbot in chatbots if (told := await _copy_chatbot(chatbot, target))]
    copier = _Copier(source, target, progress)
    report = await copier.run(copying=True)
    if copier.wrote:
        # What was said at the source meanwhile counts too.
        conflicts = report.conflicts
        report = await copier.run(copying=False)
        report.conflicts = conflicts
    report.changed = changed
    ids = {chatbot.id for chatbot in chatbots}
    report.source.chatbots = len(ids)
    report.target.chatbots = len(ids & {chatbot.id for chatbot in await target.list_chatbots()})
    return report


async def _require_own_keys(chatbots: Sequence[Chatbot], target: Storage) -> None:
    """Raises `CopyError` when the target gives a chatbot's key to another one."""
    for chatbot in chatbots:
        other = await target.get_chatbot_by_key(chatbot.api_key_hash)
        if other is not None and other.id != chatbot.id:
            raise CopyError(
                f'the API key of "{chatbot.name}" ({chatbot.id}) is that of "{other.name}" '
                f"({other.id}) in the target: give one of them a new key "
                "(`chatd bots rotate-key`), then run this again"
            )


async def _copy_chatbot(chatbot: Chatbot, target: Storage) -> str | None:
    """Makes the target's chatbot equal; says what was not, if it was there."""
    found = await target.get_chatbot(chatbot.id)
    if found is None:
        await target.add_chatbot(chatbot)
        return None
    names = [name for name in ("name", "model") if getattr(found, name) != getattr(chatbot, name)]
    names += [
        setting.name
        for setting in fields(chatbot.settings)
        if getattr(found.settings, setting.name) != getattr(chatbot.settings, setting.name)
    ]
    if names:
        await target.update_chatbot(chatbot)
    if found.api_key_hash != chatbot.api_key_hash:
        await target.set_api_key(chatbot.id, chatbot.api_key_hash)
        names.append("API key")
    if not names:
        return None
    return f'"{chatbot.name}" ({chatbot.id}) has the source\'s {", ".join(names)} now'


class _Copier:
    """Goes over all sessions of the source."""

    def __init__(self, source: Storage, target: Storage, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._budget = _Budget(IN_FLIGHT_CHARS)
        self._report = Report()
        self.wrote = False

    async def run(self, *, copying: bool) -> Report:
        """What both sides hold, after what differs was copied if `copying`."""
        self._report = Report()
        at_once = asyncio.Semaphore(AT_ONCE)
        after: str | None = None
        while page := await self._source.list_sessions(limit=PAGE, after=after):
            after = page[-1].id
            tasks = [asyncio.create_task(self._one(s, at_once, copying)) for s in page]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        self._report.different.sort()
        return self._report

    async def _one(self, session: Session, at_once: asyncio.Semaphore, copying: bool) -> None:
        async with at_once:
            there, here = await asyncio.gather(
                self._source.tally_session(session.id), self._target.tally_session(session.id)
            )
            if there is None:
                return  # erased meanwhile
            if there != here and copying:
                try:
                    here = await self._copy(session, there, here)
                except ConflictError as error:
                    self._report.conflicts[session.id] = str(error)
                except NotFound:
                    pass  # its chatbot was made meanwhile, and comes with the next copy
            report = self._report
            report.source.add(there)
            if here is not None:
                report.target.add(here)
            if here != there:
                report.different.append(session.id)
            self._progress(report.target.sessions, report.target.messages)

    async def _copy(self, session: Session, there: Tally, here: Tally | None) -> Tally | None:
        """Copies what the target lacks of a session, and counts it again."""
        held = here.messages if here else 0
        if here and (held > there.messages or here.turns > there.turns):
            raise ConflictError(f"session {session.id}: it went on by itself")
        # New messages first. A turn may have changed without any, and then all is looked at.
        for start in dict.fromkeys((held if held < there.messages else 0, 0)):
            await self._move(session.id, start, there)
            here = await self._target.tally_session(session.id)
            if here == there:
                break
        return here

    async def _move(self, session_id: str, place: int, size: Tally) -> None:
        weight = min(size.chars + size.messages * PART_MESSAGE_CHARS, PART_CHARS)
        more = True
        while more:
            async with self._budget.hold(weight):
                part = await self._source.export_session(session_id, place=place)
                if part is None:
                    return
                self.wrote = True
                await self._target.import_session(part)
            place += len(part.messages)
            more = part.more


class _Budget:
    """Lets pass as much at once as there is room for."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, weight: int) -> AsyncIterator[None]:
        """Takes room, which must be there as a whole at some time, and gives it back."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._room >= weight)
            self._room -= weight
        try:
            yield
        finally:
            async with self._changed:
                self._room += weight
                self._changed.notify_all()
