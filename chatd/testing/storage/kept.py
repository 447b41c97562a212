"""What is kept, whatever it is and whoever opens the storage."""

from __future__ import annotations

import asyncio

from chatd.domain import (
    Session,
)
from chatd.errors import TurnInProgress
from chatd.storage import (
    BegunTurn,
    Storage,
)
from chatd.testing.storage.base import (
    Opener,
    StorageCase,
    a_turn,
    complete,
    returns,
    transcript,
)


class KeptConformance(StorageCase):
    """What is kept, whatever it is and whoever opens the storage, sentence by sentence."""

    async def test_text_of_every_kind_comes_back_as_it_was(
        self, storage: Storage, session: Session
    ) -> None:
        text = "naïve 漢字 🏳️‍🌈 \u202eRTL\u202c 'quotes\" \\ \x01\t\r\n%s ? :x $1"
        await complete(storage, session, text, text * 2)
        assert await transcript(storage, session) == [("user", text), ("assistant", text * 2)]

    async def test_a_reply_of_a_megabyte_is_kept_whole(
        self, storage: Storage, session: Session
    ) -> None:
        reply = "0123456789abcdef" * 65536
        turn = await complete(storage, session, "q", reply)
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.reply == reply

    async def test_what_is_stored_is_there_when_storage_is_opened_again(
        self, storage: Storage, session: Session, open_storage: Opener
    ) -> None:
        await complete(storage, session, "q", "a")
        again = await open_storage()
        try:
            assert await transcript(again, session) == [("user", "q"), ("assistant", "a")]
            assert [c.id for c in await again.list_chatbots()] == [session.chatbot_id]
        finally:
            await again.close()

    async def test_two_open_storages_see_one_running_turn(
        self, storage: Storage, session: Session, open_storage: Opener
    ) -> None:
        other = await open_storage()
        try:
            outcomes = await asyncio.gather(
                *(s.begin_turn(a_turn(session)) for s in [storage, other] * 10),
                return_exceptions=True,
            )
            assert sum(isinstance(o, BegunTurn) for o in outcomes) == 1
            assert sum(isinstance(o, TurnInProgress) for o in outcomes) == 19
        finally:
            await other.close()

    async def test_check_returns_on_a_storage_that_is_there(self, storage: Storage) -> None:
        assert await returns(storage.check())
