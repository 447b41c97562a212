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

from chatd.testing.storage.base import (
    AFTER_SHORT_LEASE,
    SHORT_LEASE,
    Opener,
    a_chatbot,
    a_turn,
)
from chatd.testing.storage.beginning import BeginningConformance
from chatd.testing.storage.chatbots import ChatbotConformance
from chatd.testing.storage.ending import EndingConformance
from chatd.testing.storage.erasing import ErasingConformance
from chatd.testing.storage.idempotency import IdempotencyConformance
from chatd.testing.storage.kept import KeptConformance
from chatd.testing.storage.leases import LeaseConformance
from chatd.testing.storage.moving import MovingConformance
from chatd.testing.storage.sessions import SessionConformance
from chatd.testing.storage.usage import UsageConformance

__all__ = [
    "AFTER_SHORT_LEASE",
    "SHORT_LEASE",
    "Opener",
    "StorageConformance",
    "a_chatbot",
    "a_turn",
]


class StorageConformance(
    ChatbotConformance,
    SessionConformance,
    BeginningConformance,
    LeaseConformance,
    IdempotencyConformance,
    EndingConformance,
    UsageConformance,
    ErasingConformance,
    KeptConformance,
    MovingConformance,
):
    """Every test is one promise of `chatd.Storage`."""
