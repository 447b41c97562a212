"""The contract of a storage, sentence by sentence, as tests that any implementation can run.

Needs pytest and pytest-tornasync. Subclass `StorageConformance`, override `open_storage`, run
pytest::

    class TestMyStorage(StorageConformance):
        @pytest.fixture
        def open_storage(self, tmp_path):
            async def open():
                return await open_my_storage({"path": str(tmp_path / "data")})

            return open
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from tornado.ioloop import IOLoop

from chatd.domain import (
    Chatbot,
    ChatbotSettings,
    Message,
    Session,
    StoredMessage,
    TurnStatus,
    Usage,
    hash_api_key,
    new_api_key,
    new_id,
)
from chatd.errors import ConflictError, IdempotencyKeyReused, NotFound, TurnInProgress
from chatd.storage import (
    PART_CHARS,
    PART_MESSAGE_CHARS,
    BeginTurn,
    BegunTurn,
    ExistingTurn,
    ExportedTurn,
    FinishTurn,
    Renewed,
    SessionPart,
    Storage,
    Tally,
    TurnRecord,
    UsageBy,
    UsageTotal,
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


class StorageConformance:
    """Every test is one promise of `chatd.Storage`."""

    @pytest.fixture
    def open_storage(self) -> Opener:
        """Override this: a coroutine function that opens the storage, empty at first.

        Called again within a test it must open the same data.
        """
        pytest.fail("override the fixture open_storage")

    @pytest.fixture
    def storage(self, io_loop: IOLoop, open_storage: Opener) -> Iterator[Storage]:
        storage = io_loop.run_sync(lambda: _opened(open_storage))
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

    async def test_check_returns_on_a_storage_that_is_there(self, storage: Storage) -> None:
        assert await _returns(storage.check())

    # Chatbots

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
        await _complete(storage, kept, "keep me", "kept")
        turn = await _complete(storage, session, "erase me", "erased")
        assert await storage.remove_chatbot(session.chatbot_id) is True
        assert await storage.get_chatbot(session.chatbot_id) is None
        assert await storage.get_session(session.id) is None
        assert await storage.get_turn(turn, session.chatbot_id) is None
        assert await _transcript(storage, kept) == [("user", "keep me"), ("assistant", "kept")]
        assert await storage.remove_chatbot(session.chatbot_id) is False

    async def test_allowed_origins_are_those_of_all_chatbots(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        assert await storage.allowed_origins() == frozenset()
        for origins in [("https://a.example", "https://b.example"), ("https://b.example",), ()]:
            await storage.add_chatbot(a_chatbot(settings=ChatbotSettings(allowed_origins=origins)))
        assert await storage.allowed_origins() == {"https://a.example", "https://b.example"}

    # Sessions

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
        await _complete(storage, session, "a", "b")
        await storage.create_session(session)
        assert len(await _transcript(storage, session)) == 2

    async def test_deleting_a_session_erases_what_was_said_in_it_and_nothing_else(
        self, storage: Storage, session: Session
    ) -> None:
        kept = Session(new_id(), session.chatbot_id)
        await storage.create_session(kept)
        await _complete(storage, kept, "keep me", "kept")
        turn = await _complete(storage, session, "erase me", "erased")
        assert await storage.delete_session(session.id, session.chatbot_id) is True
        assert await storage.get_session(session.id) is None
        assert await storage.get_turn(turn, session.chatbot_id) is None
        with pytest.raises(NotFound):
            await storage.list_messages(session.id, session.chatbot_id, limit=10)
        assert len(await _transcript(storage, kept)) == 2
        assert await storage.delete_session(session.id, session.chatbot_id) is False

    async def test_another_chatbots_session_is_as_unknown_as_none(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        turn = await _complete(storage, session, "a", "b")
        for chatbot_id, session_id in [(other.id, session.id), (session.chatbot_id, new_id())]:
            foreign = Session(session_id, chatbot_id)
            with pytest.raises(NotFound):
                await storage.begin_turn(a_turn(foreign))
            with pytest.raises(NotFound):
                await storage.list_messages(session_id, chatbot_id, limit=10)
            assert await storage.delete_session(session_id, chatbot_id) is False
        assert await storage.get_turn(turn, other.id) is None
        assert await storage.rate_turn(turn, new_id(), "up", None) is False
        assert len(await _transcript(storage, session)) == 2

    async def test_messages_come_in_pages_newest_page_first(
        self, storage: Storage, session: Session
    ) -> None:
        for i in range(5):
            await _complete(storage, session, f"q{i}", f"a{i}")
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

    # Beginning a turn

    async def test_the_first_turn_has_no_history(self, storage: Storage, session: Session) -> None:
        request = a_turn(session, "Hi")
        begun = await _begin(storage, request)
        assert (begun.turn_id, begun.history, begun.history_truncated) == (
            request.turn_id,
            [],
            False,
        )
        assert begun.user_id == "visitor-1"
        assert await _transcript(storage, session) == [("user", "Hi")]

    async def test_history_is_what_was_said_before_oldest_first(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q1", "a1")
        await _complete(storage, session, "q2", "a2")
        begun = await _begin(storage, a_turn(session, "q3"))
        assert [(m.role, m.content) for m in begun.history] == [
            ("user", "q1"),
            ("assistant", "a1"),
            ("user", "q2"),
            ("assistant", "a2"),
        ]

    async def test_several_messages_of_a_turn_keep_their_order(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "one", "reply", "two", "three")
        begun = await _begin(storage, a_turn(session))
        assert [m.content for m in begun.history] == ["one", "two", "three", "reply"]

    async def test_history_keeps_to_its_budget_and_leaves_out_whole_turns_oldest_first(
        self, storage: Storage, session: Session
    ) -> None:
        for i in range(4):
            await _complete(storage, session, f"q{i}" * 50, f"a{i}" * 50)
        full = await _begin(storage, a_turn(session))
        await storage.finish_turn(FinishTurn(full.turn_id, TurnStatus.FAILED))
        two_turns = sum(m.cost_chars for m in full.history[4:])
        for budget, expected in [
            (two_turns, full.history[4:]),
            (two_turns - 1, full.history[6:]),
            (two_turns + 1, full.history[4:]),
            (0, []),
        ]:
            begun = await _begin(storage, a_turn(session, history_chars=budget))
            assert begun.history == expected, budget
            assert begun.history_truncated is True
            await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED))
        enough = sum(m.cost_chars for m in full.history)
        begun = await _begin(storage, a_turn(session, history_chars=enough))
        assert (begun.history, begun.history_truncated) == (full.history, False)

    async def test_a_budget_of_nothing_is_not_called_truncated_when_there_is_no_history(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, history_chars=0))
        assert begun.history_truncated is False

    async def test_a_failed_turns_question_is_in_the_transcript_and_not_in_history(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, "poison"))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, error_code="x"))
        begun = await _begin(storage, a_turn(session, "next"))
        assert begun.history == []
        assert await _transcript(storage, session) == [("user", "poison"), ("user", "next")]

    @pytest.mark.parametrize("status", [TurnStatus.STOPPED, TurnStatus.INTERRUPTED])
    async def test_a_turn_that_was_cut_short_is_in_history(
        self, storage: Storage, session: Session, status: TurnStatus
    ) -> None:
        begun = await _begin(storage, a_turn(session, "long story"))
        await storage.finish_turn(FinishTurn(begun.turn_id, status, reply="Once upon"))
        begun = await _begin(storage, a_turn(session))
        assert [m.content for m in begun.history] == ["long story", "Once upon"]

    async def test_one_turn_runs_at_a_time_in_a_session(
        self, storage: Storage, session: Session
    ) -> None:
        running = await _begin(storage, a_turn(session, "first"))
        with pytest.raises(TurnInProgress) as caught:
            await storage.begin_turn(a_turn(session, "second"))
        assert caught.value.turn_id == running.turn_id
        assert await _transcript(storage, session) == [("user", "first")]
        other = Session(new_id(), session.chatbot_id)
        await storage.create_session(other)
        await _begin(storage, a_turn(other, "elsewhere"))

    async def test_of_many_turns_at_once_one_runs(self, storage: Storage, session: Session) -> None:
        outcomes = await asyncio.gather(
            *(storage.begin_turn(a_turn(session, f"{i}")) for i in range(20)),
            return_exceptions=True,
        )
        assert sum(isinstance(o, BegunTurn) for o in outcomes) == 1
        assert sum(isinstance(o, TurnInProgress) for o in outcomes) == 19
        assert len(await _transcript(storage, session)) == 1

    async def test_one_turns_failure_to_begin_does_not_touch_those_beside_it(
        self, storage: Storage, session: Session
    ) -> None:
        sessions = [Session(new_id(), session.chatbot_id) for _ in range(10)]
        for each in sessions:
            await storage.create_session(each)
        unknown = Session(new_id(), session.chatbot_id)
        mixed = [s for each in sessions for s in (each, unknown)]
        outcomes = await asyncio.gather(
            *(storage.begin_turn(a_turn(s)) for s in mixed), return_exceptions=True
        )
        assert [isinstance(o, BegunTurn) for o in outcomes[::2]] == [True] * 10
        assert [isinstance(o, NotFound) for o in outcomes[1::2]] == [True] * 10
        for each in sessions:
            assert len(await _transcript(storage, each)) == 1

    async def test_beginning_the_same_turn_again_stores_nothing_twice(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q", "a")
        request = a_turn(session, "Hi")
        first = await storage.begin_turn(request)
        assert await storage.begin_turn(request) == first
        assert len(await _transcript(storage, session)) == 3

    async def test_beginning_a_turn_again_after_its_end_leads_to_its_result(
        self, storage: Storage, session: Session
    ) -> None:
        request = a_turn(session, "Hi", lease_seconds=SHORT_LEASE)
        await _begin(storage, request)
        await storage.finish_turn(FinishTurn(request.turn_id, TurnStatus.COMPLETED, "Hello!"))
        again = await storage.begin_turn(request)
        assert isinstance(again, ExistingTurn)
        assert again.turn.reply == "Hello!"
        lost = a_turn(session, "Hi", lease_seconds=SHORT_LEASE)
        await _begin(storage, lost)
        await asyncio.sleep(AFTER_SHORT_LEASE)
        again = await storage.begin_turn(lost)
        assert isinstance(again, ExistingTurn)
        assert again.turn.status is TurnStatus.INTERRUPTED
        assert len(await _transcript(storage, session)) == 3

    # Leases

    async def test_a_turn_whose_lease_ran_out_gives_way(
        self, storage: Storage, session: Session
    ) -> None:
        lost = await _begin(storage, a_turn(session, "lost", lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        begun = await _begin(storage, a_turn(session, "next"))
        assert [m.content for m in begun.history] == ["lost"]
        record = await storage.get_turn(lost.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.error_code) == (TurnStatus.INTERRUPTED, "process_lost")

    async def test_a_renewed_turn_keeps_running(self, storage: Storage, session: Session) -> None:
        begun = await _begin(storage, a_turn(session, lease_seconds=SHORT_LEASE))
        unknown = new_id()
        renewed = await storage.renew_turns([(begun.turn_id, begun.run), (unknown, 1)], 60)
        assert renewed == Renewed(lost=frozenset({unknown}))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        await storage.sweep()
        with pytest.raises(TurnInProgress):
            await storage.begin_turn(a_turn(session))

    async def test_who_runs_a_turn_is_told_to_stop_it(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session))
        turns = [(begun.turn_id, begun.run)]
        assert await storage.renew_turns(turns, 60) == Renewed()
        assert await storage.stop_turn(begun.turn_id, session.chatbot_id) is True
        assert await storage.renew_turns(turns, 60) == Renewed(stopping=frozenset({begun.turn_id}))
        stopped = FinishTurn(begun.turn_id, TurnStatus.STOPPED, "Half")
        assert await storage.finish_turn(stopped) is True
        assert await storage.stop_turn(begun.turn_id, session.chatbot_id) is False

    async def test_another_chatbot_cannot_stop_a_turn(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session))
        other = a_chatbot()
        await storage.add_chatbot(other)
        assert await storage.stop_turn(begun.turn_id, other.id) is False
        assert await storage.stop_turn(new_id(), session.chatbot_id) is False
        assert await storage.renew_turns([(begun.turn_id, begun.run)], 60) == Renewed()

    async def test_the_turn_that_runs_in_a_session_is_found(
        self, storage: Storage, session: Session
    ) -> None:
        assert await storage.running_turn(session.id, session.chatbot_id) is None
        begun = await _begin(storage, a_turn(session))
        running = await storage.running_turn(session.id, session.chatbot_id)
        assert running is not None
        assert (running.id, running.status, running.run) == (begun.turn_id, "running", begun.run)
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a"))
        assert await storage.running_turn(session.id, session.chatbot_id) is None
        for id, chatbot_id in [(new_id(), session.chatbot_id), (session.id, new_id())]:
            with pytest.raises(NotFound):
                await storage.running_turn(id, chatbot_id)

    async def test_a_turn_keeps_that_its_history_was_cut(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session))
        done = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a", history_truncated=True)
        await storage.finish_turn(done)
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert record.history_truncated is True

    async def test_a_turn_that_ended_cannot_be_renewed(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await _complete(storage, session, "q", "a")
        assert await storage.renew_turns([(turn, 1)], 60) == Renewed(lost=frozenset({turn}))
        assert await storage.renew_turns([], 60) == Renewed()
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.status is TurnStatus.COMPLETED

    async def test_a_sweep_ends_turns_whose_lease_ran_out_and_no_others(
        self, storage: Storage, session: Session
    ) -> None:
        await storage.sweep()
        alive = Session(new_id(), session.chatbot_id)
        await storage.create_session(alive)
        lost = await _begin(storage, a_turn(session, lease_seconds=SHORT_LEASE))
        kept = await _begin(storage, a_turn(alive))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        assert await storage.sweep() == 1
        assert await storage.sweep() == 0
        for turn, status in [
            (lost, TurnStatus.INTERRUPTED),
            (kept, TurnStatus.RUNNING),
        ]:
            record = await storage.get_turn(turn.turn_id, session.chatbot_id)
            assert record is not None
            assert record.status is status

    # Idempotency

    async def test_a_key_that_runs_leads_to_the_running_turn(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session))
        again = await storage.begin_turn(_keyed(session))
        assert isinstance(again, ExistingTurn)
        assert (again.turn.id, again.turn.status) == (begun.turn_id, TurnStatus.RUNNING)
        assert len(await _transcript(storage, session)) == 1

    async def test_a_key_that_ended_leads_to_its_result(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(
            FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "Hi!", "m", usage=Usage(3, 4))
        )
        again = await storage.begin_turn(_keyed(session))
        assert isinstance(again, ExistingTurn)
        assert (again.turn.reply, again.turn.model) == ("Hi!", "m")
        assert again.turn.usage == Usage(3, 4)
        assert len(await _transcript(storage, session)) == 2

    async def test_a_key_with_another_body_is_refused(
        self, storage: Storage, session: Session
    ) -> None:
        await _begin(storage, _keyed(session))
        with pytest.raises(IdempotencyKeyReused):
            await storage.begin_turn(_keyed(session, request_hash=b"other"))

    async def test_a_key_counts_within_its_session(
        self, storage: Storage, session: Session
    ) -> None:
        other = Session(new_id(), session.chatbot_id)
        await storage.create_session(other)
        first = await _begin(storage, _keyed(session))
        second = await _begin(storage, _keyed(other))
        assert first.turn_id != second.turn_id

    async def test_a_remembered_failure_is_replayed(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, error_code="x"))
        again = await storage.begin_turn(_keyed(session))
        assert isinstance(again, ExistingTurn)
        assert (again.turn.status, again.turn.error_code) == (TurnStatus.FAILED, "x")

    async def test_a_turn_that_reached_no_model_runs_again_with_its_messages_stored_once(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q", "a")
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        again = await _begin(storage, _keyed(session))
        assert again.turn_id == begun.turn_id
        assert [m.content for m in again.history] == ["q", "a"]
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "Hi!", run=again.run)
        assert await storage.finish_turn(done)
        assert await _transcript(storage, session) == [
            ("user", "q"),
            ("assistant", "a"),
            ("user", "Hello"),
            ("assistant", "Hi!"),
        ]

    async def test_a_turn_lost_with_its_process_runs_again_by_its_key(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session, lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        again = await _begin(storage, _keyed(session))
        assert again.turn_id == begun.turn_id
        assert await _transcript(storage, session) == [("user", "Hello")]
        with pytest.raises(TurnInProgress):
            await storage.begin_turn(a_turn(session))

    async def test_who_ran_a_turn_before_it_ran_again_is_fenced_off(
        self, storage: Storage, session: Session
    ) -> None:
        first = await _begin(storage, _keyed(session, lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        second = await _begin(storage, _keyed(session))
        assert second.run > first.run
        late = FinishTurn(first.turn_id, TurnStatus.COMPLETED, "late", run=first.run)
        assert await storage.finish_turn(late) is False
        renewed = await storage.renew_turns([(first.turn_id, first.run)], 60)
        assert renewed.lost == {first.turn_id}
        done = FinishTurn(second.turn_id, TurnStatus.COMPLETED, "right", run=second.run)
        assert await storage.finish_turn(done) is True
        assert await storage.finish_turn(late) is False
        assert await _transcript(storage, session) == [("user", "Hello"), ("assistant", "right")]

    async def test_part_of_a_reply_is_replayed_not_run_again(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.INTERRUPTED, "Once"))
        again = await storage.begin_turn(_keyed(session))
        assert isinstance(again, ExistingTurn)
        assert again.turn.reply == "Once"

    async def test_a_turn_that_others_followed_is_not_run_again(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        await _complete(storage, session, "q", "a")
        again = await _begin(storage, _keyed(session))
        assert again.turn_id != begun.turn_id
        assert [m.content for m in again.history] == ["q", "a"]

    async def test_a_key_whose_turn_reached_no_model_takes_another_body(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        again = await _begin(storage, _keyed(session, request_hash=b"other"))
        assert again.turn_id != begun.turn_id

    # Ending a turn

    async def test_a_finished_turn_is_read_back_as_it_ended(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, label="custom_code"))
        attempts = [{"provider": "p", "model": "m", "error": None, "ms": 12}]
        stored = await storage.finish_turn(
            FinishTurn(
                begun.turn_id,
                TurnStatus.COMPLETED,
                reply="Hi! 👋",
                model="m-2",
                provider="p",
                finish_reason="stop",
                usage=Usage(10, 20, 5, 3, 0.00012),
                attempts=attempts,
                side="main/openai/gpt-5",
            )
        )
        assert stored is True
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.session_id, record.chatbot_id) == (session.id, session.chatbot_id)
        assert (record.status, record.label) == (TurnStatus.COMPLETED, "custom_code")
        assert (record.reply, record.model, record.provider) == ("Hi! 👋", "m-2", "p")
        assert (record.finish_reason, record.error_code) == ("stop", None)
        assert record.usage == Usage(10, 20, 5, 3, 0.00012)
        assert list(record.attempts) == attempts
        assert record.side == "main/openai/gpt-5"
        assert record.started_at is not None
        assert record.finished_at is not None
        assert record.started_at <= record.finished_at

    async def test_unknown_usage_stays_unknown(self, storage: Storage, session: Session) -> None:
        turn = await _complete(storage, session, "q", "a")
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.usage == Usage()

    async def test_a_turn_of_which_nothing_was_split_has_no_side(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await _complete(storage, session, "q", "a")
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.side is None

    @pytest.mark.parametrize(
        "status", [TurnStatus.COMPLETED, TurnStatus.STOPPED, TurnStatus.INTERRUPTED]
    )
    async def test_finishing_again_changes_nothing(
        self, storage: Storage, session: Session, status: TurnStatus
    ) -> None:
        begun = await _begin(storage, a_turn(session, "q"))
        finish = FinishTurn(begun.turn_id, status, reply="a")
        assert await storage.finish_turn(finish) is True
        assert await storage.finish_turn(finish) is True
        assert await _transcript(storage, session) == [("user", "q"), ("assistant", "a")]

    async def test_a_turn_without_a_reply_stores_no_message(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, "q"))
        assert await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, reply=""))
        assert await _transcript(storage, session) == [("user", "q")]

    async def test_a_late_finish_counts_while_nothing_followed(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, "q", lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        await storage.sweep()
        assert await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a"))
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.error_code) == (TurnStatus.COMPLETED, None)
        assert await _transcript(storage, session) == [("user", "q"), ("assistant", "a")]

    async def test_a_late_finish_after_a_newer_turn_is_not_stored(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, "q", lease_seconds=SHORT_LEASE))
        await asyncio.sleep(AFTER_SHORT_LEASE)
        await _complete(storage, session, "newer", "reply")
        late = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "late")
        assert await storage.finish_turn(late) is False
        assert [text for _, text in await _transcript(storage, session)] == ["q", "newer", "reply"]

    async def test_finishing_a_turn_of_a_deleted_session_is_false(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session))
        await storage.delete_session(session.id, session.chatbot_id)
        finish = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a")
        assert await storage.finish_turn(finish) is False

    async def test_a_rating_is_kept_and_can_be_taken_back(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await _complete(storage, session, "q", "a")
        assert await storage.rate_turn(turn, session.id, "down", "Too long.") is True
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert (record.rating, record.comment) == ("down", "Too long.")
        assert await storage.rate_turn(turn, session.id, None, None) is True
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert (record.rating, record.comment) == (None, None)

    # What turns took

    @pytest.mark.parametrize(
        "status",
        [TurnStatus.COMPLETED, TurnStatus.FAILED, TurnStatus.STOPPED, TurnStatus.INTERRUPTED],
    )
    async def test_what_a_turn_took_is_settled_after_its_end_and_nothing_else_changes(
        self, storage: Storage, session: Session, status: TurnStatus
    ) -> None:
        kept = await _complete(storage, session, "keep me", "kept")
        begun = await _begin(storage, a_turn(session))
        half = FinishTurn(begun.turn_id, status, "Half", "m", "p", usage=Usage(9), side="main/m")
        await storage.finish_turn(half)
        await storage.rate_turn(begun.turn_id, session.id, "up", "More!")
        before = [await storage.get_turn(id, session.chatbot_id) for id in (kept, begun.turn_id)]
        usage = Usage(10, 20, None, 3, 0.1 + 0.2)
        for _ in range(2):
            assert await storage.settle_turn(begun.turn_id, begun.run, usage) is True
        after = [await storage.get_turn(id, session.chatbot_id) for id in (kept, begun.turn_id)]
        assert before[1] is not None
        assert after == [before[0], dataclasses.replace(before[1], usage=usage)]

    async def test_a_turn_that_runs_or_ran_again_or_is_unknown_cannot_be_settled(
        self, storage: Storage, session: Session
    ) -> None:
        first = await _begin(storage, _keyed(session))
        usage = Usage(1, 2, cost_usd=0.5)
        assert await storage.settle_turn(first.turn_id, first.run, usage) is False
        await storage.finish_turn(FinishTurn(first.turn_id, TurnStatus.FAILED, rerunnable=True))
        again = await _begin(storage, _keyed(session))
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "Hi!", run=again.run)
        await storage.finish_turn(done)
        assert await storage.settle_turn(first.turn_id, first.run, usage) is False
        assert await storage.settle_turn(new_id(), 1, usage) is False
        record = await storage.get_turn(first.turn_id, session.chatbot_id)
        assert record is not None
        assert record.usage == Usage()

    async def test_a_turn_of_an_erased_session_cannot_be_settled(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await _complete(storage, session, "q", "a")
        await storage.delete_session(session.id, session.chatbot_id)
        assert await storage.settle_turn(turn, 1, Usage(1, 2, cost_usd=0.5)) is False

    async def test_usage_is_totalled_by_day_model_and_side(
        self, storage: Storage, session: Session
    ) -> None:
        await _take(storage, session, Usage(1, 10, 100, 1000, 0.25), model="m-1", side="main/m-1")
        await _take(storage, session, Usage(2, 20, 200, 2000, 0.5), model="m-1", side="b/m-1")
        await _take(storage, session, Usage(4, 40, cost_usd=1), model="m-2", side="b/m-1")
        await _take(storage, session, Usage())
        bot, day = session.chatbot_id, datetime.now(UTC).date().isoformat()
        nothing = UsageTotal(bot, None, turns=1, completed=1, unknown_cost=1)
        assert await _totals(storage, "day") == [
            UsageTotal(bot, day, 4, 4, 0, 0, 0, 7, 70, 300, 3000, 1.75, 1)
        ]
        assert await _totals(storage, "model") == [
            UsageTotal(bot, "m-1", 2, 2, 0, 0, 0, 3, 30, 300, 3000, 0.75),
            UsageTotal(bot, "m-2", 1, 1, 0, 0, 0, 4, 40, None, None, 1),
            nothing,
        ]
        assert await _totals(storage, "side") == [
            UsageTotal(bot, "b/m-1", 2, 2, 0, 0, 0, 6, 60, 200, 2000, 1.5),
            UsageTotal(bot, "main/m-1", 1, 1, 0, 0, 0, 1, 10, 100, 1000, 0.25),
            nothing,
        ]

    async def test_usage_counts_turns_by_how_they_ended_and_how_they_were_rated(
        self, storage: Storage, session: Session
    ) -> None:
        rated = [await _take(storage, session, Usage(cost_usd=0)) for _ in range(3)]
        for turn, rating in zip(rated, ("up", "down", "down"), strict=True):
            await storage.rate_turn(turn, session.id, rating, None)  # type: ignore[arg-type]
        for status in (TurnStatus.FAILED, TurnStatus.STOPPED, TurnStatus.INTERRUPTED):
            await _take(storage, session, Usage(cost_usd=0), status=status)
        (total,) = await _totals(storage, "side")
        assert total == UsageTotal(
            session.chatbot_id, None, 6, 3, 1, 1, 1, cost_usd=0, rated_up=1, rated_down=2
        )

    async def test_a_turn_that_runs_is_not_in_the_totals(
        self, storage: Storage, session: Session
    ) -> None:
        assert await _totals(storage, "day") == []
        begun = await _begin(storage, a_turn(session))
        assert await _totals(storage, "day") == []
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a"))
        assert [total.turns for total in await _totals(storage, "day")] == [1]

    async def test_a_turn_that_reached_no_model_has_no_unknown_cost(
        self, storage: Storage, session: Session
    ) -> None:
        await _take(storage, session, Usage(), status=TurnStatus.FAILED, rerunnable=True)
        (total,) = await _totals(storage, "side")
        assert (total.failed, total.unknown_cost, total.cost_usd) == (1, 0, None)
        await _take(storage, session, Usage(), status=TurnStatus.FAILED)
        (total,) = await _totals(storage, "side")
        assert (total.failed, total.unknown_cost, total.cost_usd) == (2, 1, None)

    async def test_a_cost_that_is_settled_is_in_the_totals(
        self, storage: Storage, session: Session
    ) -> None:
        turn = await _take(storage, session, Usage(), status=TurnStatus.STOPPED)
        await storage.settle_turn(turn, 1, Usage(5, 6, cost_usd=0.5))
        (total,) = await _totals(storage, "side")
        assert (total.input_tokens, total.cost_usd, total.unknown_cost) == (5, 0.5, 0)

    async def test_usage_is_told_of_one_chatbot_or_of_all_in_their_order(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        theirs = Session(new_id(), other.id)
        await storage.create_session(theirs)
        for each in (session, theirs):
            await _take(storage, each, Usage(1), model="m")
            await _take(storage, each, Usage(1), model="M")
            await storage.delete_session(each.id, each.chatbot_id)
            await storage.create_session(each)
            await _take(storage, each, Usage(1))
        every = [(bot, key) for bot in sorted((session.chatbot_id, other.id))
                 for key in ("M", "m", None)]  # fmt: skip
        assert [(t.chatbot_id, t.key) for t in await _totals(storage, "model")] == every
        found = await storage.usage_totals(by="model", chatbot_id=other.id)
        assert [(t.chatbot_id, t.key) for t in found] == [e for e in every if e[0] == other.id]
        assert await storage.usage_totals(by="model", chatbot_id=new_id()) == []

    async def test_a_day_is_utcs_and_a_time_holds_its_start_and_not_its_end(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        midnight = datetime(2024, 3, 1, tzinfo=UTC)
        step = timedelta(microseconds=100)
        sessions = [
            await _past(storage, chatbot, time)
            for time in (midnight - step, midnight, midnight + timedelta(days=1) - step)
        ]
        sessions.append(await _past(storage, chatbot, midnight + timedelta(days=1)))
        days = [("2024-02-29", 1), ("2024-03-01", 2), ("2024-03-02", 1)]

        async def told(since: datetime | None, until: datetime | None) -> list[tuple[Any, int]]:
            found = [
                await storage.usage_totals(by="day", chatbot_id=id, since=since, until=until)
                for id in (None, chatbot.id)
            ]
            assert found[0] == found[1]
            return [(total.key, total.turns) for total in found[0]]

        for _ in ("stored", "erased"):
            assert await told(None, None) == days
            assert await told(midnight, None) == days[1:]
            assert await told(None, midnight) == days[:1]
            assert await told(midnight, midnight + timedelta(days=1)) == days[1:2]
            for session in sessions:
                await storage.delete_session(session.id, chatbot.id)

    async def test_erasing_sessions_leaves_what_their_turns_took_in_the_totals(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        sessions = [Session(new_id(), chatbot.id, "api", f"v{i}") for i in range(4)]
        for session in sessions:
            await storage.create_session(session)
            first = await _take(storage, session, Usage(1, 10, None, 3, 0.25), model="m", side="s")
            await storage.rate_turn(first, session.id, "up", "Great!")
            await _take(storage, session, Usage(2), model="m", status=TurnStatus.STOPPED)
            await _take(storage, session, Usage(), status=TurnStatus.FAILED, rerunnable=True)
            last = await _take(storage, session, Usage(4, cost_usd=1), side="t")
            await storage.rate_turn(last, session.id, "down", None)
        await _past(storage, chatbot, datetime(2024, 2, 29, tzinfo=UTC))
        before = {by: await _totals(storage, by) for by in get_args(UsageBy)}
        assert sum(total.turns for total in before["day"]) == 17
        for session in sessions:
            assert await storage.delete_session(session.id, chatbot.id) is True
            assert await storage.delete_session(session.id, chatbot.id) is False
            assert {by: await _totals(storage, by) for by in get_args(UsageBy)} == before

    async def test_sessions_that_are_erased_at_once_are_all_in_the_totals(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        sessions = [Session(new_id(), chatbot.id) for _ in range(20)]
        for session in sessions:
            await storage.create_session(session)
            for model in ("b", "a", None):
                await _take(storage, session, Usage(1, cost_usd=0.5), model=model)
        before = await _totals(storage, "model")
        await asyncio.gather(*(storage.delete_session(s.id, chatbot.id) for s in sessions))
        assert await _totals(storage, "model") == before
        assert [(total.turns, total.cost_usd) for total in before] == [(20, 10)] * 3

    async def test_a_turn_that_runs_in_an_erased_session_counts_as_interrupted_at_unknown_cost(
        self, storage: Storage, session: Session
    ) -> None:
        await _begin(storage, a_turn(session))
        await storage.delete_session(session.id, session.chatbot_id)
        (total,) = await _totals(storage, "side")
        assert (total.turns, total.interrupted, total.unknown_cost) == (1, 1, 1)

    async def test_another_chatbot_erases_nothing_and_adds_nothing_to_the_totals(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        await _take(storage, session, Usage(1))
        before = await _totals(storage, "day")
        assert await storage.delete_session(session.id, other.id) is False
        assert await _totals(storage, "day") == before

    async def test_of_a_removed_chatbot_nothing_is_in_the_totals_and_of_others_all(
        self, storage: Storage, session: Session
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        kept = Session(new_id(), other.id)
        await storage.create_session(kept)
        for each in (session, kept):
            await _take(storage, each, Usage(1))
            await storage.delete_session(each.id, each.chatbot_id)
            await storage.create_session(each)
            await _take(storage, each, Usage(2))
        assert await storage.remove_chatbot(session.chatbot_id) is True
        (total,) = await _totals(storage, "day")
        assert (total.chatbot_id, total.turns, total.input_tokens) == (other.id, 2, 3)
        await storage.add_chatbot(a_chatbot(id=session.chatbot_id))
        assert await _totals(storage, "day") == [total]

    # What is kept

    async def test_text_of_every_kind_comes_back_as_it_was(
        self, storage: Storage, session: Session
    ) -> None:
        text = "naïve 漢字 🏳️‍🌈 \u202eRTL\u202c 'quotes\" \\ \x01\t\r\n%s ? :x $1"
        await _complete(storage, session, text, text * 2)
        assert await _transcript(storage, session) == [("user", text), ("assistant", text * 2)]

    async def test_a_reply_of_a_megabyte_is_kept_whole(
        self, storage: Storage, session: Session
    ) -> None:
        reply = "0123456789abcdef" * 65536
        turn = await _complete(storage, session, "q", reply)
        record = await storage.get_turn(turn, session.chatbot_id)
        assert record is not None
        assert record.reply == reply

    async def test_what_is_stored_is_there_when_storage_is_opened_again(
        self, storage: Storage, session: Session, open_storage: Opener
    ) -> None:
        await _complete(storage, session, "q", "a")
        again = await open_storage()
        try:
            assert await _transcript(again, session) == [("user", "q"), ("assistant", "a")]
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

    # Moving

    async def test_a_healthy_storage_has_nothing_wrong_with_it(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q", "a")
        assert list(await storage.diagnose()) == []

    async def test_a_chatbot_keeps_the_times_it_is_added_with(self, storage: Storage) -> None:
        made, changed = datetime(2024, 2, 29, 12, 30, tzinfo=UTC), datetime(2025, 1, 2, tzinfo=UTC)
        chatbot = a_chatbot(created_at=made, updated_at=changed)
        await storage.add_chatbot(chatbot)
        found = await storage.get_chatbot(chatbot.id)
        assert found is not None
        assert (found.created_at, found.updated_at) == (made, changed)

    async def test_all_sessions_are_listed_in_pages_in_the_order_of_their_ids(
        self, storage: Storage, chatbot: Chatbot
    ) -> None:
        other = a_chatbot()
        await storage.add_chatbot(other)
        made = [Session(new_id(), owner.id, "api", "v") for owner in [chatbot, other] * 4]
        for session in made:
            await storage.create_session(session)
        seen: list[Session] = []
        while page := await storage.list_sessions(limit=3, after=seen[-1].id if seen else None):
            assert len(page) <= 3
            seen += page
        assert [s.id for s in seen] == sorted(s.id for s in made)
        assert {(s.id, s.chatbot_id) for s in seen} == {(s.id, s.chatbot_id) for s in made}
        assert all(s.created_at is not None and s.user_id == "v" for s in seen)
        assert list(await storage.list_sessions(limit=3, after=seen[-1].id)) == []

    async def test_a_session_is_tallied(self, storage: Storage, session: Session) -> None:
        assert await storage.tally_session(new_id()) is None
        assert await storage.tally_session(session.id) == Tally()
        first = await _complete(storage, session, "naïve 💬", "ok")
        second = await _complete(storage, session, "漢", "fine")
        await storage.rate_turn(first, session.id, "up", "👍!")
        await storage.rate_turn(second, session.id, "down", None)
        await _begin(storage, a_turn(session, "run"))
        chars = sum(map(len, ("naïve 💬", "ok", "漢", "fine", "👍!", "run")))
        assert await storage.tally_session(session.id) == Tally(5, chars, 3, 2, 1, 1)
        await storage.settle_turn(first, 1, Usage(cost_usd=0.0))
        assert await storage.tally_session(session.id) == Tally(5, chars, 3, 2, 1, 1, 1)

    async def test_an_unknown_session_is_not_exported(self, storage: Storage) -> None:
        assert await storage.export_session(new_id()) is None

    async def test_a_session_that_is_moved_is_the_same_but_for_the_ids_of_its_messages(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session, label="custom_code"))
        attempts = [{"provider": "p", "ms": 12, "error": None}]
        usage = Usage(10, 20, 5, 3, 0.1 + 0.2)
        done = FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "Hi! 👋", "m", "p", "stop", None)
        done = dataclasses.replace(done, usage=usage, attempts=attempts, side="main/m")
        await storage.finish_turn(done)
        await storage.rate_turn(begun.turn_id, session.id, "down", "Too short.")
        failed = await _begin(storage, a_turn(session, "again"))
        await storage.finish_turn(FinishTurn(failed.turn_id, TurnStatus.FAILED, error_code="x"))
        before = await _moved(storage, session)
        turns = [await storage.get_turn(b.turn_id, session.chatbot_id) for b in (begun, failed)]
        (part,) = await _parts(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        assert await _moved(storage, session) == before
        assert turns == [
            await storage.get_turn(b.turn_id, session.chatbot_id) for b in (begun, failed)
        ]
        again = await storage.begin_turn(_keyed(session))
        assert isinstance(again, ExistingTurn)
        assert again.turn.reply == "Hi! 👋"
        with pytest.raises(IdempotencyKeyReused):
            await storage.begin_turn(_keyed(session, request_hash=b"other"))

    async def test_a_moved_session_goes_on(self, storage: Storage, session: Session) -> None:
        await _complete(storage, session, "q1", "a1")
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        (part,) = await _parts(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        again = await _begin(storage, _keyed(session))
        assert (again.turn_id, again.run) == (begun.turn_id, begun.run + 1)
        assert [m.content for m in again.history] == ["q1", "a1"]
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "a2", run=again.run)
        assert await storage.finish_turn(done)
        await _complete(storage, session, "q3", "a3")
        said = [text for _, text in await _transcript(storage, session)]
        assert said == ["q1", "a1", "Hello", "a2", "q3", "a3"]

    async def test_a_part_that_is_imported_again_changes_nothing(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q", "a", "q2")
        await _begin(storage, a_turn(session, "still running"))
        (part,) = await _parts(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        page = await storage.list_messages(session.id, session.chatbot_id, limit=10)
        once = await _moved(storage, session)
        await asyncio.gather(*(storage.import_session(part) for _ in range(5)))
        assert await storage.list_messages(session.id, session.chatbot_id, limit=10) == page
        assert await _moved(storage, session) == once

    async def test_a_turn_that_runs_where_it_was_exported_is_interrupted_where_it_is_imported(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, "q"))
        (part,) = await _parts(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(part)
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.error_code) == (TurnStatus.INTERRUPTED, "process_lost")
        assert await _transcript(storage, session) == [("user", "q")]
        await _complete(storage, session, "next", "reply")

    async def test_what_is_said_after_a_part_was_imported_is_appended_by_the_next(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, a_turn(session, "q1"))
        (early,) = await _parts(storage, session)
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, "a1"))
        await _complete(storage, session, "q2", "a2")
        whole = await _moved(storage, session)
        late = await storage.export_session(session.id, place=1)
        assert late is not None
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(early)
        await storage.import_session(late)
        await storage.import_session(late)
        assert await _moved(storage, session) == whole

    async def test_a_large_session_moves_in_parts_that_are_bounded(
        self, storage: Storage, session: Session
    ) -> None:
        large = "0123456789abcdef" * 32768
        for i in range(5):
            await _complete(storage, session, f"{i}" + large, large)
        await _complete(storage, session, "small", large * 5)
        parts = await _parts(storage, session)
        assert len(parts) > 2
        for part in parts:
            size = sum(len(m.content) + PART_MESSAGE_CHARS for m in part.messages)
            assert size <= PART_CHARS or len(part.messages) == 1
        before = await _moved(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        for part in parts:
            await storage.import_session(part)
            await storage.import_session(part)
        assert await _moved(storage, session) == before
        await storage.delete_session(session.id, session.chatbot_id)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(parts[1])
        assert await storage.get_session(session.id) is None

    async def test_a_part_of_an_unknown_chatbot_is_not_found(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q", "a")
        (part,) = await _parts(storage, session)
        await storage.remove_chatbot(session.chatbot_id)
        with pytest.raises(NotFound):
            await storage.import_session(part)
        assert await storage.get_session(session.id) is None

    async def test_another_chatbots_session_is_a_conflict_and_stays_as_it_is(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q", "a")
        (part,) = await _parts(storage, session)
        other = a_chatbot()
        await storage.add_chatbot(other)
        stolen = dataclasses.replace(part.session, chatbot_id=other.id)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(dataclasses.replace(part, session=stolen))
        assert await _parts(storage, session) == [part]

    async def test_a_session_that_went_on_by_itself_is_a_conflict(
        self, storage: Storage, session: Session
    ) -> None:
        await _complete(storage, session, "q", "a")
        (common,) = await _parts(storage, session)
        await _complete(storage, session, "said there", "answered there")
        (there,) = await _parts(storage, session)
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(common)
        await _complete(storage, session, "said here", "answered here")
        before = await _moved(storage, session)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(there)
        assert await _moved(storage, session) == before

    async def test_a_turn_that_ran_again_is_not_undone(
        self, storage: Storage, session: Session
    ) -> None:
        begun = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.FAILED, rerunnable=True))
        (failed,) = await _parts(storage, session)
        again = await _begin(storage, _keyed(session))
        done = FinishTurn(again.turn_id, TurnStatus.COMPLETED, "Hi!", run=again.run)
        assert await storage.finish_turn(done)
        with pytest.raises(ConflictError, match=session.id):
            await storage.import_session(failed)
        record = await storage.get_turn(begun.turn_id, session.chatbot_id)
        assert record is not None
        assert (record.status, record.reply) == (TurnStatus.COMPLETED, "Hi!")

    async def test_a_key_that_passed_to_a_newer_turn_passes_where_it_is_imported(
        self, storage: Storage, session: Session
    ) -> None:
        old = await _begin(storage, _keyed(session))
        await storage.finish_turn(FinishTurn(old.turn_id, TurnStatus.FAILED, rerunnable=True))
        (early,) = await _parts(storage, session)
        new = await _begin(storage, _keyed(session, request_hash=b"other"))
        await storage.finish_turn(FinishTurn(new.turn_id, TurnStatus.COMPLETED, "Hi!"))
        late = await storage.export_session(session.id, place=1)
        assert late is not None
        await storage.delete_session(session.id, session.chatbot_id)
        await storage.import_session(early)
        await storage.import_session(late)
        again = await storage.begin_turn(_keyed(session, request_hash=b"other"))
        assert isinstance(again, ExistingTurn)
        assert again.turn.id == new.turn_id


async def _take(
    storage: Storage,
    session: Session,
    usage: Usage,
    *,
    status: TurnStatus = TurnStatus.COMPLETED,
    **more: Any,
) -> str:
    """A turn that took this and ended; returns its id."""
    begun = await _begin(storage, a_turn(session))
    assert await storage.finish_turn(FinishTurn(begun.turn_id, status, usage=usage, **more))
    return begun.turn_id


async def _past(storage: Storage, chatbot: Chatbot, time: datetime) -> Session:
    """A session with a turn that began at this time."""
    session, id = Session(new_id(), chatbot.id, created_at=time), new_id()
    completed = TurnStatus.COMPLETED
    turn = TurnRecord(id, session.id, chatbot.id, completed, started_at=time, finished_at=time)
    said = [StoredMessage(1, "user", "Hello", time, id)]
    await storage.import_session(SessionPart(session, 0, said, [ExportedTurn(turn, 1)], False))
    return session


async def _totals(storage: Storage, by: UsageBy) -> list[UsageTotal]:
    return list(await storage.usage_totals(by=by))


async def _parts(storage: Storage, session: Session) -> list[SessionPart]:
    """A whole session, exported."""
    parts: list[SessionPart] = []
    while not parts or parts[-1].more:
        place = parts[-1].place + len(parts[-1].messages) if parts else 0
        part = await storage.export_session(session.id, place=place)
        assert part is not None
        parts.append(part)
    return parts


async def _moved(storage: Storage, session: Session) -> list[Any]:
    """What is the same of a session wherever it is: all but the ids of messages."""
    parts = await _parts(storage, session)
    messages = [message for part in parts for message in part.messages]
    places = {message.id: place for place, message in enumerate(messages)}
    turns = {exported.turn.id: exported for part in parts for exported in part.turns}
    return [
        parts[0].session,
        await storage.tally_session(session.id),
        [dataclasses.replace(message, id=0) for message in messages],
        [
            dataclasses.replace(turn, reply_id=turn.reply_id and places[turn.reply_id])
            for turn in turns.values()
        ],
    ]


async def _opened(open_storage: Opener) -> Storage:
    return await open_storage()


async def _returns(work: Awaitable[object]) -> bool:
    await work
    return True


async def _begin(storage: Storage, request: BeginTurn) -> BegunTurn:
    """Begins a turn that is expected to run."""
    begun = await storage.begin_turn(request)
    assert isinstance(begun, BegunTurn), begun
    return begun


def _keyed(session: Session, **more: Any) -> BeginTurn:
    """A turn with an idempotency key, each time with a new id, as a client's retry is."""
    return a_turn(session, **{"idempotency_key": "key-1", "request_hash": b"body", **more})


async def _complete(
    storage: Storage, session: Session, said: str, reply: str, *more_said: str
) -> str:
    """A whole turn; returns its id."""
    begun = await _begin(storage, a_turn(session, said, *more_said))
    assert await storage.finish_turn(FinishTurn(begun.turn_id, TurnStatus.COMPLETED, reply))
    return begun.turn_id


async def _transcript(storage: Storage, session: Session) -> Sequence[tuple[str, str]]:
    page = await storage.list_messages(session.id, session.chatbot_id, limit=1000)
    return [(message.role, message.content) for message in page.data]
