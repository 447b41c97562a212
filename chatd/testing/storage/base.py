"""What every part of the suite needs: a storage, a chatbot, a session, and turns in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import pytest
from tornado.ioloop import IOLoop

from chatd.domain import (
    Chatbot,
    Message,
    Session,
    StoredMessage,
    TurnStatus,
    hash_api_key,
    new_api_key,
    new_id,
)
from chatd.storage import (
    BeginTurn,
    BegunTurn,
    ExportedTurn,
    FinishTurn,
    SessionPart,
    Storage,
    TurnRecord,
)

Opener = Callable[[], Awaitable[Storage]]
SHORT_LEASE = 0.05
AFTER_SHORT_LEASE = 0.2


def a_chatbot(**more: Any) -> Chatbot:
    """A chatbot with a new id and key."""
    values: dict[str, Any] = {"id": new_id(), "name": "Bot", "model": "a/model"}
    return Chatbot(**{**values, "api_key_hash": hash_api_key(new_api_key()), **more})


def a_turn(session: Session, *said: str, **more: Any) -> BeginTurn:
    """A turn in which `said` is said, with a long lease and a large budget."""
    values: dict[str, Any] = {
        "turn_id": new_id(),
        "session_id": session.id,
        "chatbot_id": session.chatbot_id,
        "messages": [Message("user", text) for text in said or ("Hello",)],
        "history_chars": 100_000,
        "lease_seconds": 60,
    }
    return BeginTurn(**{**values, **more})


class StorageCase:
    """Opens the storage that is held to its contract, with a chatbot and a session in it."""

    @pytest.fixture
    def open_storage(self) -> Opener:
        """Override this: a coroutine function that opens the storage, empty at first.

        Called again within a test it must open the same data.
        """
        pytest.fail("override the fixture open_storage")

    @pytest.fixture
    def storage(self, io_loop: IOLoop, open_storage: Opener) -> Iterator[Storage]:
        storage = io_loop.run_sync(lambda: opened(open_storage))
        yield storage
        io_loop.run_sync(storage.close)

    @pytest.fixture
    def chatbot(self, io_loop: IOLoop, storage: Storage) -> Chatbot:
        chatbot = a_chatbot()
        io_loop.run_sync(lambda: storage.add_chatbot(chatbot))
        return chatbot

    @pytest.fixture
    def session(self, io_loop: IOLoop, storage: Storage, chatbot: Chatbot) -> Session:
        session = Session(new_id(), chatbot.id, "api", "visitor-1", {"plan": "gold"})
        io_loop.run_sync(lambda: storage.create_session(session))
        return session


async def opened(open_storage: Opener) -> Storage:
    return await open_storage()


async def returns(work: Awaitable[object]) -> bool:
    await work
    return True


async def begin(storage: Storage, request: BeginTurn) -> BegunTurn:
    """Begins a turn that is expected to run."""
    begun = await storage.begin_turn(request)
    assert isinstance(begun, BegunTurn), begun
    return begun


def keyed(session: Session, **more: Any) -> BeginTurn:
    """A turn with an idempotency key, each time with a new id, as a client's retry is."""
    return a_turn(session, **{"idempotency_key": "key-1", "request_hash": b"body", **more})


async def complete(
    storage: Storage, session: Session, said: str, reply: str, *more_said: str
) -> str:
    """A whole turn; returns its id."""
    begun = await begin(storage, a_turn(session, said, *more_said))
    assert await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, reply))
    return begun.turn_id


async def transcript(storage: Storage, session: Session) -> Sequence[tuple[str, str]]:
    page = await storage.list_messages(session.id, session.chatbot_id, limit=1000)
    return [(message.role, message.content) for message in page.data]


async def past(storage: Storage, chatbot: Chatbot, time: datetime) -> Session:
    """A session with a turn that began at this time."""
    session, id = Session(new_id(), chatbot.id, created_at=time), new_id()
    completed = TurnStatus.COMPLETED
    turn = TurnRecord(id, session.id, chatbot.id, completed, started_at=time, finished_at=time)
    said = [StoredMessage(1, "user", "Hello", time, id)]
    await storage.import_session(SessionPart(session, 0, said, [ExportedTurn(turn, 1)], False))
    return session
