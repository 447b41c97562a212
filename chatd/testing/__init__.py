"""For those who write plugins: the contracts as tests, and a server that misbehaves on demand.

Needs pytest and pytest-tornasync, which chatd itself does not install.
"""

import pytest

# So that a test that fails shows its values; pytest does that unasked for test files alone.
pytest.register_assert_rewrite(
    "chatd.testing.faults",
    "chatd.testing.provider",
    "chatd.testing.shared",
    "chatd.testing.storage",
)

from chatd.testing.fake_provider import FakeProvider  # noqa: E402
from chatd.testing.faults import FaultConformance  # noqa: E402
from chatd.testing.provider import (  # noqa: E402
    HttpProviderConformance,
    ProviderCase,
    ProviderConformance,
)
from chatd.testing.shared import SharedConformance  # noqa: E402
from chatd.testing.storage import StorageConformance  # noqa: E402
from chatd.testing.wire import AnthropicWire, OpenAIWire, WireFormat  # noqa: E402

__all__ = [
    "AnthropicWire",
    "FakeProvider",
    "FaultConformance",
    "HttpProviderConformance",
    "OpenAIWire",
    "ProviderCase",
    "ProviderConformance",
    "SharedConformance",
    "StorageConformance",
    "WireFormat",
]
