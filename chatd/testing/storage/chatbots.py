"""Chatbots."""

from __future__ import annotations

import asyncio

import pytest

from chatd.domain import (
    Chatbot,
    ChatbotSettings,
    Session,
    hash_api_key,
    new_api_key,
    new_id,
)
from chatd.errors import ConflictError
from chatd.storage import (
    Storage,
)
from chatd.testing.storage.base import (
    StorageCase,
    a_chatbot,
    complete,
    transcript,
)


class ChatbotConformance(StorageCase):
    """Chatbots, sentence by sentence."""

    async def test_a_chatbot_is_read_back_as_it_was_added(self, storage: Storage) -> None:
        settings = ChatbotSettings(
            "Be kind. 💬",
            4000,
            300,
            0.5,
            allowed_origins=("https://a.example", "https://*.b.example"),
            suggestions=("Why?", "¿Cómo?"),
            identity_secrets=("a secret of the site",),
            limits={"turns_per_ip": "5/minute, 50/hour"},
            daily_budget_usd=2.5,
            retention_days=90,
        )
        chatbot = a_chatbot(name="Zoë", settings=settings)
        await storage.add_chatbot(chatbot)
        found = await storage.get_chatbot(chatbot.id)
        assert found is not None
        assert (found.name, found.model, found.settings) == ("Zoë", "a/model", settings)
        assert found.api_key_hash == chatbot.api_key_hash
        assert found.created_at is not None
        assert found.created_at.tzinfo is not None

    async def test_an_unknown_chatbot_is_none(self, storage: Storage, chatbot: Chatbot) -> None:
        assert await storage.get_chatbot(new_id()) is None
        assert await storage.get_chatbot_by_key(hash_api_key("unknown")) is None

    async def test_a_chatbot_is_found_by_the_hash_of_its_key(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        found = await storage.get_chatbot_by_key(chatbot.api_key_hash)
        assert found is not None
        assert found.id == chatbot.id

    async def test_a_taken_id_is_a_conflict(self, storage: Storage, chatbot: Chatbot) -> None:
        with pytest.raises(ConflictError):
            await storage.add_chatbot(a_chatbot(id=chatbot.id))

    async def test_a_taken_key_is_a_conflict(self, storage: Storage, chatbot: Chatbot) -> None:
        with pytest.raises(ConflictError):
            await storage.add_chatbot(a_chatbot(api_key_hash=chatbot.api_key_hash))
        other = a_chatbot()
        await storage.add_chatbot(other)
        with pytest.raises(ConflictError):
            await storage.set_api_key(other.id, chatbot.api_key_hash)

    async def test_chatbots_are_listed_oldest_first(self, storage: Storage) -> None:
        chatbots = [a_chatbot(name=f"Bot {i}") for i in range(3)]
        for chatbot in chatbots:
            await storage.add_chatbot(chatbot)
            await asyncio.sleep(0.005)
        assert [c.id for c in await storage.list_chatbots()] == [c.id for c in chatbots]

    async def test_a_new_key_replaces_the_old_one(self, storage: Storage, chatbot: Chatbot) -> None:
        key = hash_api_key(new_api_key())
        assert await storage.set_api_key(chatbot.id, key) is True
        found = await storage.get_chatbot_by_key(key)
        assert found is not None
        assert found.id == chatbot.id
        assert await storage.get_chatbot_by_key(chatbot.api_key_hash) is None
        assert await storage.set_api_key(new_id(), hash_api_key(new_api_key())) is False

    async def test_an_update_replaces_name_model_and_settings_and_not_the_key(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        changed = a_chatbot(
            id=chatbot.id, name="New", model="b/model", settings=ChatbotSettings("You are new.")
        )
        assert await storage.update_chatbot(changed) is True
        found = await storage.get_chatbot(chatbot.id)
        assert found is not None
        assert (found.name, found.model) == ("New", "b/model")
        assert found.settings.system_prompt == "You are new."
        assert found.api_key_hash == chatbot.api_key_hash

    async def test_an_update_of_an_unknown_chatbot_is_false(self, storage: Storage) -> None:
        assert await storage.update_chatbot(a_chatbot()) is False
        assert await storage.list_chatbots() == []

    async def test_removing_a_chatbot_erases_all_that_is_its_own_and_nothing_else(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        kept = Session(new_id(), other.id)
        await storage.create_session(kept)
        await complete(storage, kept, "keep me", "kept")
        turn = await complete(storage, session, "erase me", "erased")
        assert await storage.remove_chatbot(session.chatbot_id) is True
        assert await storage.get_chatbot(session.chatbot_id) is None
        assert await storage.get_session(session.id) is None
        assert await storage.get_turn(turn, session.chatbot_id) is None
        assert await transcript(storage, kept) == [("user", "keep me"), ("assistant", "kept")]
        assert await storage.remove_chatbot(session.chatbot_id) is False

    async def test_allowed_origins_are_those_of_all_chatbots(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        assert await storage.allowed_origins() == frozenset()
        for origins in [("https://a.example", "https://b.example"), ("https://b.example",), ()]:
            await storage.add_chatbot(a_chatbot(settings=ChatbotSettings(allowed_origins=origins)))
        assert await storage.allowed_origins() == {"https://a.example", "https://b.example"}
