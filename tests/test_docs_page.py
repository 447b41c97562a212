"""The docs page, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Response, expect

from chatd.domain import canonical_id
from tests.support import ServerProcess, server_process


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """`chatd serve` in an empty folder."""
    with server_process(tmp_path) as process:
        assert process.url
        yield process


class Watched:
    """A page, and everything that it asked for or complained of."""

    def __init__(self, browser: Browser) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.asked: list[str] = []
        self.failed: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("requestfailed", lambda request: self.failed.append(request.url))
        self.page.on("response", self._note_response)
        self.page.on("console", lambda m: self._complain(m.text, m.type))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note_response(self, response: Response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")

    def _complain(self, text: str, kind: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def assert_clean(self, url: str) -> None:
        """Every request went to the server, and none failed; the console is empty."""
        elsewhere = [a for a in self.asked if a != "data:," and _origin(a) != _origin(url)]
        assert not elsewhere
        assert not self.failed
        assert not self.complaints


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """A new page that is watched."""
    watched = Watched(browser)
    yield watched
    watched.page.close()


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _first_chatbot(server: ServerProcess) -> tuple[str, str]:
    """The id and the key that the first start shows."""
    found = re.search(r"assistant_id (\S+)\s+api_key +(\S+)", server.stderr)
    assert found is not None, server.stderr
    return found[1], found[2]


def test_the_docs_page_loads_from_the_server_alone(server: ServerProcess, watched: Watched) -> None:
    watched.page.goto(f"{server.url}/docs")
    expect(watched.page.get_by_text("/api/chat/widget/session").first).to_be_visible()
    watched.page.wait_for_load_state("networkidle")
    paths = {urlsplit(asked).path for asked in watched.asked}
    assert {"/docs", "/openapi.json", "/docs/assets/swagger-ui-bundle.js"} <= paths
    watched.assert_clean(server.url)


def test_an_endpoint_called_from_the_docs_page_answers(
    server: ServerProcess, watched: Watched, tmp_path: Path
) -> None:
    chatbot_id, key = _first_chatbot(server)
    page = watched.page
    page.goto(f"{server.url}/docs")
    block = page.locator(".opblock", has=page.locator('[data-path="/api/chat/session"]'))
    block.locator(".opblock-summary-control").click()
    # The page may be set to open each endpoint ready to be tried.
    if (try_it_out := block.get_by_role("button", name="Try it out")).is_visible():
        try_it_out.click()
    block.locator("textarea").fill(json.dumps({"api_key": key, "assistant_id": chatbot_id}))
    block.get_by_role("button", name="Execute").click()

    answer = block.locator(".live-responses-table")
    expect(answer.locator(".response-col_status").last).to_contain_text("200")
    shown = answer.locator(".highlight-code").first.inner_text()
    page.screenshot(path=tmp_path / "docs.png", full_page=True)
    session = re.search(r'"session_id":\s*"([^"]+)"', shown)
    assert session is not None, shown
    assert canonical_id(session[1])
    watched.assert_clean(server.url)


def test_the_root_leads_to_the_docs_page(server: ServerProcess, watched: Watched) -> None:
    watched.page.goto(f"{server.url}/")
    assert urlsplit(watched.page.url).path == "/docs"
    expect(watched.page.get_by_text("/api/chat/widget/session").first).to_be_visible()
    watched.assert_clean(server.url)
