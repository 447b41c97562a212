"""Everything that a chatbot's sessions hold, as records, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from chatd.domain import Chatbot, Session, StoredMessage
from chatd.storage import ExportedTurn, SessionPart, Storage

PAGE = 256
"""Sessions that are listed at once."""

AT_ONCE = 8
"""Sessions that are read at once; each holds about `PART_CHARS` of text in memory at most."""

Record = dict[str, Any]


async def records(
    storage: Storage, chatbot: Chatbot, progress: Callable[[int], None] | None = None
) -> AsyncIterator[Record]:
    """Each session of the chatbot, followed by its turns and messages, as `export_line.json` says.

    Memory is bounded, however much there is. What is said meanwhile may be there or not; a
    session that is erased meanwhile is left out, or ends early. Raises `StorageUnavailable`.

    :param progress: called with how many sessions are done.
    """
    done = 0
    async for sessions in _pages(storage, chatbot):
        for start in range(0, len(sessions), AT_ONCE):
            group = sessions[start : start + AT_ONCE]
            for part in await asyncio.gather(*(storage.export_session(s.id) for s in group)):
                if part is not None:
                    async for record in _session(storage, part):
                        yield record
                done += 1
                if progress:
                    progress(done)


async def count(storage: Storage, chatbot: Chatbot) -> int:
    """How many sessions the chatbot has."""
    return sum([len(sessions) async for sessions in _pages(storage, chatbot)])


async def _pages(storage: Storage, chatbot: Chatbot) -> AsyncIterator[Sequence[Session]]:
    after: str | None = None
    while sessions := await storage.list_sessions(limit=PAGE, after=after, chatbot_id=chatbot.id):
        after = sessions[-1].id
        yield sessions


async def _session(storage: Storage, first: SessionPart) -> AsyncIterator[Record]:
    """A session and what it holds, from its first part on."""
    part: SessionPart | None = first
    yield _of_session(first.session)
    last: str | None = None
    while part is not None:
        for turn in part.turns:
            # A turn that is split over two parts is in both, last in one and first in the next.
            if turn.turn.id != last:
                yield _of_turn(turn)
            last = turn.turn.id
        for message in part.messages:
            yield _of_message(message, part.session.id)
        if not part.more:
            return
        place = part.place + len(part.messages)
        part = await storage.export_session(part.session.id, place=place)


def _of_session(session: Session) -> Record:
    return {
        "type": "session",
        "id": session.id,
        "chatbot_id": session.chatbot_id,
        "channel": session.channel,
        "user_id": session.user_id,
        "metadata": dict(session.metadata),
        "created_at": _time(session.created_at),
    }


def _of_turn(exported: ExportedTurn) -> Record:
    turn = exported.turn
    return {
        "type": "turn",
        "id": turn.id,
        "session_id": turn.session_id,
        "seq": exported.seq,
        "status": str(turn.status),
        "label": turn.label,
        "idempotency_key": exported.idempotency_key,
        "reply_id": exported.reply_id,
        "model": turn.model,
        "provider": turn.provider,
        "side": turn.side,
        "finish_reason": turn.finish_reason,
        "error_code": turn.error_code,
        "usage": asdict(turn.usage),
        "attempts": [dict(attempt) for attempt in turn.attempts],
        "rating": turn.rating,
        "comment": turn.comment,
        "history_truncated": turn.history_truncated,
        "started_at": _time(turn.started_at),
        "finished_at": _time(turn.finished_at),
    }


def _of_message(message: StoredMessage, session_id: str) -> Record:
    return {
        "type": "message",
        "id": message.id,
        "session_id": session_id,
        "turn_id": message.turn_id,
        "role": message.role,
        "content": message.content,
        "timestamp": _time(message.timestamp),
    }


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
