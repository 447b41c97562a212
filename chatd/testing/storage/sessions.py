"""Sessions and their messages."""

from __future__ import annotations

import pytest

from chatd.domain import (
    Session,
    new_id,
)
from chatd.errors import NotFound
from chatd.storage import (
    Storage,
)
from chatd.testing.storage.base import (
    StorageCase,
    a_chatbot,
    a_turn,
    complete,
    transcript,
)


class SessionConformance(StorageCase):
    """Sessions and their messages, sentence by sentence."""

    async def test_a_session_is_read_back_as_it_was_created(
        self, storage: Storage, session: Session
    ) -> None:
        found = await storage.get_session(session.id)
        assert found is not None
        assert (found.chatbot_id, found.channel) == (session.chatbot_id, "api")
        assert (found.user_id, found.metadata) == ("visitor-1", {"plan": "gold"})

    async def test_a_session_of_an_unknown_chatbot_is_not_found(self, storage: Storage) -> None:
        session = Session(new_id(), new_id())
        with pytest.raises(NotFound):
            await storage.create_session(session)
        assert await storage.get_session(session.id) is None

    async def test_creating_a_session_again_changes_nothing(
        self, storage: Storage, session: Session
    ) -> None:
        await complete(storage, session, "a", "b")
        await storage.create_session(session)
        assert len(await transcript(storage, session)) == 2

    async def test_deleting_a_session_erases_what_was_said_in_it_and_nothing_else(
        self, storage: Storage, session: Session
    ) -> None:
        kept = Session(new_id(), session.chatbot_id)
        await storage.create_session(kept)
        await complete(storage, kept, "keep me", "kept")
        turn = await complete(storage, session, "erase me", "erased")
        assert await storage.delete_session(session.id, session.chatbot_id) is True
        assert await storage.get_session(session.id) is None
        assert await storage.get_turn(turn, session.chatbot_id) is None
        with pytest.raises(NotFound):
            await storage.list_messages(session.id, session.chatbot_id, limit=10)
        assert len(await transcript(storage, kept)) == 2
        assert await storage.delete_session(session.id, session.chatbot_id) is False

    async def test_another_chatbots_session_is_as_unknown_as_none(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        turn = await complete(storage, session, "a", "b")
        for chatbot_id, session_id in [(other.id, session.id), (session.chatbot_id, new_id())]:
            foreign = Session(session_id, chatbot_id)
            with pytest.raises(NotFound):
                await storage.begin_turn(a_turn(foreign))
            with pytest.raises(NotFound):
                await storage.list_messages(session_id, chatbot_id, limit=10)
            assert await storage.delete_session(session_id, chatbot_id) is False
        assert await storage.get_turn(turn, other.id) is None
        assert await storage.rate_turn(turn, new_id(), "up", None) is False
        assert len(await transcript(storage, session)) == 2

    async def test_messages_come_in_pages_newest_page_first(
        self, storage: Storage, session: Session
    ) -> None:
        for i in range(5):
            await complete(storage, session, f"q{i}", f"a{i}")
        seen: list[str] = []
        before: int | None = None
        while True:
            page = await storage.list_messages(
                session.id, session.chatbot_id, limit=3, before=before
            )
            assert len(page.data) <= 3
            assert [m.id for m in page.data] == sorted(m.id for m in page.data)
            seen[:0] = [m.content for m in page.data]
            if not page.has_more:
                break
            before = page.data[0].id
        assert seen == [text for i in range(5) for text in (f"q{i}", f"a{i}")]
