"""The whole matrix of what services do wrong, on each of the bundled wire formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatd.testing import AnthropicWire, FaultConformance, OpenAIWire


class TestOpenAICompatible(FaultConformance):
    use = "openai_compatible"
    wire = OpenAIWire()

    def settings(self, url: str) -> Mapping[str, Any]:
        return {"base_url": f"{url}/v1", "api_key": self.key}


class TestOpenRouter(FaultConformance):
    use = "openrouter"
    wire = OpenAIWire()

    def settings(self, url: str) -> Mapping[str, Any]:
        return {"base_url": f"{url}/api/v1", "api_key": self.key}


class TestAnthropic(FaultConformance):
    use = "anthropic"
    wire = AnthropicWire()

    def settings(self, url: str) -> Mapping[str, Any]:
        return {"base_url": url, "api_key": self.key}
