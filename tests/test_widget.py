"""The widget in a real Chromium, on pages of another origin, over real connections."""

from __future__ import annotations

import base64
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from chatd.handlers.widget import script_integrity, script_path
from tests.pages import Site, Watched, Wire, watching
from tests.support import ServerProcess, chatd_command, server_process

ROOT = Path(__file__).parent.parent
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"

CONFIG = """
server:
  allowed_origins: ["*"]
limits:
  turns_per_ip: none
  turns_per_session: none
  turns_per_chatbot: none
  sessions_per_ip: none
  sessions_per_chatbot: none
storage: {use: sqlite, path: chatd.db}
providers:
  fast: {use: echo, reply: "{message}"}
  slow: {use: echo, reply: "{message}", word_seconds: 0.12}
  gone: {use: openai_compatible, base_url: "http://127.0.0.1:9/v1", retries: {attempts: 1}}
models:
  - {match: "slow", ask: [slow]}
  - {match: "gone", ask: [gone]}
  - {match: "*", ask: [fast]}
"""
WORDS = " ".join(f"word{i}" for i in range(40))
STRICT = (
    "require-trusted-types-for 'script'; trusted-types 'none'; default-src 'none'; base-uri 'none'"
)
HOSTILE = """
* { all: unset !important; direction: rtl !important; color: red !important; font: 3px serif !important;
    animation: spin 1s infinite !important; }
chatd-widget { display: none !important; opacity: 0 !important; filter: blur(9px) !important;
    transform: scale(4) !important; pointer-events: none !important; visibility: hidden !important; }
body > * { position: absolute !important; inset: 50% !important; z-index: -9 !important; }
"""
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 780},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


@dataclass
class Bots:
    """A server, and a chatbot for each way to answer."""

    server: ServerProcess
    fast: str
    slow: str
    gone: str

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture(scope="module")
def bots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bots]:
    """`chatd serve` with chatbots that say what they are told, at once or slowly, or fail."""
    folder = tmp_path_factory.mktemp("widget")
    (folder / "chatd.yaml").write_text(CONFIG)
    with server_process(folder, "--config", "chatd.yaml") as process:
        assert process.url

        def add(model: str) -> str:
            made = chatd_command(
                *("bots", "add", "--config", "chatd.yaml", "--name", "Ada", "--model", model),
                cwd=folder,
            )
            found = re.search(r"id +(\S+)", made.stdout)
            assert found is not None, made.stdout + made.stderr
            return found[1]

        yield Bots(process, add("fast"), add("slow"), add("gone"))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The site whose pages have the chat."""
    site = Site()
    yield site
    site.close()


@pytest.fixture
def wire(bots: Bots) -> Iterator[Wire]:
    """The way from the browser to chatd."""
    wire = Wire(bots.url)
    yield wire
    wire.close()


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    with watching(browser) as watched:
        yield watched


def page_with(server: str, bot: str, attributes: str = "", head: str = "", body: str = "") -> str:
    """A page with the widget's line at its end."""
    line = f'<script async src="{server}/widget.js" data-chatbot-id="{bot}" {attributes}></script>'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Shop</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,">{head}</head>'
        f"<body><main><h1>A shop</h1>{body}</main>{line}</body></html>"
    )


class Chat:
    """The widget on a page, as a visitor sees it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.host = page.locator("chatd-widget")
        self.launcher = self.host.locator(".launcher")
        self.panel = self.host.locator(".panel")
        self.input = self.host.locator("textarea")
        self.go = self.host.locator(".go")
        self.mine = self.host.locator(".mine .text")
        self.theirs = self.host.locator(".theirs .text")
        self.notice = self.host.locator(".notice")
        self.status = self.host.get_by_role("status")

    def open(self) -> None:
        self.launcher.click()
        expect(self.panel).to_be_visible()

    def say(self, text: str) -> None:
        self.input.fill(text)
        self.input.press("Enter")

    def is_idle(self) -> None:
        """Waits until the last answer is there to its end."""
        expect(self.go).to_have_attribute("aria-label", "Send")

    def named(self, name: str) -> Locator:
        return self.host.get_by_role("button", name=name, exact=True)


def opened(page: Page, url: str) -> Chat:
    """The widget of a page, opened."""
    page.goto(url)
    chat = Chat(page)
    chat.open()
    return chat


def described(page: Page, **about: Any) -> None:
    """Lets the chatbot be described like this."""

    def answer(route: Route) -> None:
        route.fulfill(json={"name": "Ada", **about}, headers={"Access-Control-Allow-Origin": "*"})

    page.route("**/api/chat/widget/bot/*", answer)


def kept(page: Page) -> dict[str, Any]:
    """What the widget keeps in the browser, by its key."""
    entries = page.evaluate("Object.entries(localStorage)")
    return {key: json.loads(value) for key, value in entries if key.startswith("chatd ")}


def transcript(page: Page, url: str) -> list[tuple[str, str]]:
    """What chatd has stored of the page's conversation."""
    (entry,) = kept(page).values()
    request = urllib.request.Request(
        f"{url}/api/chat/widget/messages?limit=200",
        headers={"Authorization": f"Bearer {entry['session']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [(m["role"], m["content"]) for m in json.load(answer)["data"]]


# From the first word to the last


def test_a_visitor_chats_with_the_keyboard_alone(bots: Bots, site: Site, watched: Watched) -> None:
    page = watched.page
    page.goto(site.put("/keyboard", page_with(bots.url, bots.slow)))
    chat = Chat(page)
    expect(chat.launcher).to_be_visible()
    page.keyboard.press("Tab")
    expect(chat.launcher).to_be_focused()
    assert chat.launcher.get_attribute("aria-expanded") == "false"
    page.keyboard.press("Enter")
    expect(chat.input).to_be_focused()
    page.keyboard.type("first second third fourth fifth sixth seventh eighth ninth tenth")
    page.keyboard.press("Enter")
    expect(chat.theirs.last).to_contain_text("first second")
    # The first words are there while the last are not.
    assert "tenth" not in chat.theirs.last.inner_text()
    expect(chat.theirs.last).to_contain_text("tenth")
    chat.is_idle()
    expect(chat.input).to_have_value("")
    page.keyboard.press("Escape")
    expect(chat.panel).to_be_hidden()
    expect(chat.launcher).to_be_focused()
    assert watched.complaints == []
    assert watched.elsewhere(site.url, bots.url) == []


def test_shift_enter_begins_a_line_and_enter_sends(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/lines", page_with(bots.url, bots.fast)))
    chat.input.press_sequentially("one")
    chat.input.press("Shift+Enter")
    chat.input.press_sequentially("two")
    chat.input.press("Enter")
    expect(chat.mine).to_have_text("one\ntwo", use_inner_text=True)


def test_enter_that_ends_a_word_of_an_input_method_does_not_send(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/ime", page_with(bots.url, bots.fast)))
    chat.input.fill("かんじ")
    chat.input.evaluate(
        "e => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    expect(chat.input).to_have_value("かんじ")
    expect(chat.mine).to_have_count(0)
    chat.input.press("Enter")
    expect(chat.mine).to_have_text("かんじ")


def test_an_answer_can_be_stopped_and_what_was_said_stays(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/stop", page_with(bots.url, bots.slow)))
    chat.say(WORDS)
    expect(chat.theirs.last).to_contain_text("word1")
    chat.named("Stop the answer").click()
    expect(chat.host.locator(".note")).to_have_text("Stopped.")
    chat.is_idle()
    said = chat.theirs.last.inner_text()
    assert "word39" not in said
    assert transcript(watched.page, bots.url) == [("user", WORDS), ("assistant", said)]


def test_stopping_before_the_first_word_stops(bots: Bots, site: Site, watched: Watched) -> None:
    chat = opened(watched.page, site.put("/early", page_with(bots.url, bots.slow)))
    chat.input.fill(WORDS)
    watched.page.evaluate(
        "const go = document.querySelector('chatd-widget').shadowRoot.querySelector('.go');"
        "go.click(); setTimeout(() => go.click())"
    )
    expect(chat.host.locator(".note")).to_contain_text("Stopped.")
    chat.is_idle()
    # It was not on its way yet, so it stays here and can be sent after all.
    expect(chat.mine).to_have_text(WORDS)
    expect(chat.theirs).to_have_count(0)


def test_a_new_conversation_begins_empty_and_the_old_one_is_not_shown_again(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/fresh", page_with(bots.url, bots.fast)))
    chat.say("something private")
    expect(chat.theirs).to_have_text("something private")
    chat.is_idle()
    chat.named("New conversation").click()
    expect(chat.mine).to_have_count(0)
    expect(chat.input).to_be_focused()
    chat.say("anew")
    expect(chat.theirs).to_have_text("anew")
    chat.is_idle()
    watched.page.reload()
    chat.open()
    expect(chat.mine).to_have_text("anew")


def test_the_greeting_and_the_suggestions_of_the_chatbot_are_shown(
    bots: Bots, site: Site, watched: Watched
) -> None:
    described(watched.page, greeting="Hello, I am **Ada**.", suggestions=["Are you open?", "Cost?"])
    chat = opened(watched.page, site.put("/greeting", page_with(bots.url, bots.fast)))
    expect(chat.theirs.locator("strong")).to_have_text("Ada")
    expect(chat.panel).to_have_attribute("aria-label", "Ada")
    chat.named("Are you open?").click()
    expect(chat.theirs).to_have_text(["Hello, I am Ada.", "Are you open?"])
    expect(chat.named("Cost?")).to_be_hidden()
    assert transcript(watched.page, bots.url)[0] == ("user", "Are you open?")


def test_code_is_copied_as_it_was_written(bots: Bots, site: Site, browser: Browser) -> None:
    with watching(browser, permissions=["clipboard-read", "clipboard-write"]) as watched:
        chat = opened(watched.page, site.put("/copy", page_with(bots.url, bots.fast)))
        chat.say("Look:\n\n```js\nif (a < b) {\n  c();\n}\n```")
        chat.named("Copy").click()
        expect(chat.host.locator(".copy")).to_have_text("Copy ✓")
        copied = watched.page.evaluate("navigator.clipboard.readText()")
        assert copied == "if (a < b) {\n  c();\n}"


# Connections that break, pages that are left


def test_an_answer_goes_on_where_its_connection_broke(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/cut", page_with(wire.url, bots.slow)))
    chat.say(WORDS)
    for word in ("word3", "word12", "word20"):
        expect(chat.theirs.last).to_contain_text(word)
        wire.cut()
    expect(chat.theirs.last).to_have_text(WORDS, timeout=20_000)
    chat.is_idle()
    assert wire.said == 1
    assert transcript(watched.page, bots.url) == [("user", WORDS), ("assistant", WORDS)]


def test_a_message_whose_answer_was_lost_is_not_said_twice(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/lost", page_with(wire.url, bots.fast)))
    wire.deaf = 1
    chat.say("only once")
    expect(chat.theirs).to_have_text("only once", timeout=20_000)
    assert wire.said == 2
    assert transcript(watched.page, bots.url) == [("user", "only once"), ("assistant", "only once")]


def test_an_answer_goes_on_after_the_page_was_loaded_again(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/again", page_with(bots.url, bots.slow)))
    chat.say(WORDS)
    expect(chat.theirs.last).to_contain_text("word4")
    watched.page.reload()
    chat.open()
    expect(chat.theirs.last).to_have_text(WORDS, timeout=20_000)
    chat.is_idle()
    expect(chat.mine).to_have_count(1)
    assert transcript(watched.page, bots.url) == [("user", WORDS), ("assistant", WORDS)]


def test_the_conversation_goes_on_on_another_page_of_the_site(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/one", page_with(bots.url, bots.fast)))
    chat.say("said on the first page")
    expect(chat.theirs).to_have_text("said on the first page")
    chat.is_idle()
    watched.page.goto(site.put("/two", page_with(bots.url, bots.fast)))
    chat.open()
    expect(chat.mine).to_have_text("said on the first page")
    expect(chat.theirs).to_have_text("said on the first page")


def test_what_is_said_in_two_windows_at_once_is_answered_one_after_the_other(
    bots: Bots, site: Site, watched: Watched
) -> None:
    url = site.put("/windows", page_with(bots.url, bots.slow))
    first = opened(watched.page, url)
    first.say("to begin")
    expect(first.theirs).to_have_text("to begin")
    first.is_idle()
    page = watched.page.context.new_page()
    # It does not hear of the other one by itself.
    page.add_init_script("addEventListener('storage', (e) => e.stopImmediatePropagation(), true)")
    second = opened(page, url)
    expect(second.mine).to_have_text("to begin")
    first.say(WORDS)
    expect(first.theirs.last).to_contain_text("word1")
    second.say("from the other window")
    expect(second.theirs.last).to_have_text("from the other window", timeout=20_000)
    assert [text for role, text in transcript(second.page, bots.url) if role == "assistant"] == [
        "to begin",
        WORDS,
        "from the other window",
    ]


def test_what_is_older_than_a_page_of_history_is_shown_when_asked_for(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/older", page_with(bots.url, bots.fast)))
    for i in range(26):
        watched.page.evaluate("text => chatd.send(text)", f"message {i}")
    chat.is_idle()
    watched.page.reload()
    chat.open()
    expect(chat.mine).to_have_count(25)
    chat.named("Earlier messages").click()
    expect(chat.mine).to_have_count(26)
    expect(chat.mine.first).to_have_text("message 0")
    expect(chat.named("Earlier messages")).to_be_hidden()


def test_an_offline_visitor_is_told_so_and_the_message_goes_out_later(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/offline", page_with(wire.url, bots.fast)))
    page.context.set_offline(True)
    chat.say("from a tunnel")
    expect(chat.notice).to_contain_text("No connection.")
    expect(chat.status).to_contain_text("No connection.")
    page.context.set_offline(False)
    expect(chat.theirs).to_have_text("from a tunnel", timeout=20_000)
    expect(chat.notice).to_be_hidden()
    said = [("user", "from a tunnel"), ("assistant", "from a tunnel")]
    assert transcript(page, bots.url) == said


def test_a_session_that_is_gone_is_followed_by_a_new_one(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/gone", page_with(bots.url, bots.fast)))
    chat.say("before")
    expect(chat.theirs).to_have_text("before")
    chat.is_idle()
    (entry,) = kept(page).values()
    erase = urllib.request.Request(
        f"{bots.url}/api/chat/widget/session",
        headers={"Authorization": f"Bearer {entry['session']}"},
        method="DELETE",
    )
    urllib.request.urlopen(erase, timeout=30).close()
    chat.say("after")
    expect(chat.theirs).to_have_text(["before", "after"])
    page.reload()
    chat.open()
    expect(chat.mine).to_have_text("after")


# What goes wrong is said in words


def refusal(status: str, code: str, **headers: str) -> bytes:
    """chatd's answer to a message that it does not take."""
    body = json.dumps({"status": int(status[:3]), "code": code, "detail": "No."}).encode()
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Access-Control-Allow-Origin: *",
        "Access-Control-Expose-Headers: Retry-After",
        "Connection: close",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_too_many_messages_are_told_of_with_the_time_to_wait(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/limited", page_with(wire.url, bots.fast)))
    wire.refusals = [refusal("429 Too Many Requests", "rate_limited", Retry_After="3")]
    chat.say("too fast")
    expect(chat.notice).to_contain_text(re.compile(r"You can send again in \d seconds?\."))
    expect(chat.status).to_contain_text("send again")
    # Until then nothing is sent, by no way.
    chat.named("Try again").click()
    chat.say("faster still")
    assert wire.said == 1
    expect(chat.input).to_have_value("faster still")
    expect(chat.notice).to_be_hidden(timeout=10_000)
    chat.named("Try again").click()
    expect(chat.theirs).to_have_text("too fast")
    chat.is_idle()
    assert transcript(watched.page, bots.url) == [("user", "too fast"), ("assistant", "too fast")]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ("429 Too Many Requests", "budget_exhausted", "The limit is reached."),
        ("429 Too Many Requests", "rate_limited", "The limit is reached."),
        ("403 Forbidden", "identity_required", "Please sign in to chat."),
        ("403 Forbidden", "turn_refused", "This message was declined."),
        ("403 Forbidden", "origin_not_allowed", "This chat is not available here."),
        ("413 Content Too Large", "body_too_large", "This message is too long."),
        ("502 Bad Gateway", "provider_failed", "No answer came."),
    ],
)
def test_each_refusal_has_its_words(
    bots: Bots, site: Site, wire: Wire, watched: Watched, status: str, code: str, words: str
) -> None:
    chat = opened(watched.page, site.put(f"/{code}", page_with(wire.url, bots.fast)))
    wire.refusals = [refusal(status, code, Retry_After="60000")]
    chat.say("hello")
    expect(chat.host.locator(".note")).to_contain_text(words)
    expect(chat.status).to_contain_text(words)
    chat.named("Try again").click()
    expect(chat.theirs).to_have_text("hello")
    expect(chat.host.locator(".note")).to_have_count(0)


def test_a_message_that_failed_is_sent_again_without_doubling_it(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/failed", page_with(bots.url, bots.gone)))
    chat.say("is anybody there?")
    for _ in range(3):
        expect(chat.host.locator(".note")).to_contain_text("No answer came.", timeout=20_000)
        chat.is_idle()
        expect(chat.mine).to_have_count(1)
        chat.named("Try again").click()
    expect(chat.host.locator(".note")).to_contain_text("No answer came.", timeout=20_000)
    assert transcript(page, bots.url) == [("user", "is anybody there?")]
    page.reload()
    chat.open()
    expect(chat.mine).to_have_count(1)
    # It can still be sent again, with the key that it had.
    expect(chat.named("Try again")).to_be_visible()


# Visitors


def token(sub: str) -> str:
    """A token that says who it is for. Nobody checks its signature here."""
    part = base64.urlsafe_b64encode(json.dumps({"sub": sub}).encode()).decode().rstrip("=")
    return f"x.{part}.y"


def test_who_has_to_sign_in_is_told_before_writing(
    bots: Bots, site: Site, watched: Watched
) -> None:
    described(watched.page, require_identity=True)
    chat = opened(watched.page, site.put("/sign-in", page_with(bots.url, bots.fast)))
    expect(chat.notice).to_have_text("Please sign in to chat.")
    watched.page.evaluate("token => chatd.setUser(token)", token("ann"))
    expect(chat.notice).to_be_hidden()


def test_after_a_logout_nothing_of_the_visitor_before_is_left(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/logout", page_with(bots.url, bots.fast)))
    chat.say("my secret")
    expect(chat.theirs).to_have_text("my secret")
    chat.is_idle()
    page.evaluate("chatd.setUser()")
    expect(chat.mine).to_have_count(0)
    assert kept(page) == {}
    page.reload()
    chat.open()
    chat.say("somebody else")
    expect(chat.mine).to_have_text("somebody else")


def test_visitors_with_a_token_are_kept_apart(bots: Bots, site: Site, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{bots.url}/demo/{bots.fast}")
    chat = Chat(page)
    page.evaluate("token => chatd.setUser(token)", token("ann"))
    page.evaluate("chatd.open()")
    chat.say("said by Ann")
    expect(chat.theirs).to_have_text("said by Ann")
    chat.is_idle()
    # A fresh token for the same visitor changes nothing, also in the middle of an answer.
    page.evaluate("token => { chatd.send('and again'); chatd.setUser(token); }", token("ann"))
    expect(chat.theirs).to_have_text(["said by Ann", "and again"])
    chat.is_idle()
    page.reload()
    page.evaluate("token => chatd.setUser(token)", token("ann"))
    page.evaluate("chatd.open()")
    expect(chat.mine).to_have_text(["said by Ann", "and again"])
    page.evaluate("token => chatd.setUser(token)", token("bob"))
    expect(chat.mine).to_have_count(0)
    assert [key for key in kept(page) if key.endswith(" ann")] == []


# Any page


def measured(chat: Chat) -> Any:
    """Where the widget stands, and how it looks."""
    chat.page.wait_for_timeout(300)
    return chat.host.evaluate(
        """(host) => [".launcher", ".panel", "textarea", ".go", "h2", ".mine .text", ".theirs .text"].map((name) => {
            const element = host.shadowRoot.querySelector(name);
            const { x, y, width, height } = element.getBoundingClientRect();
            const style = getComputedStyle(element);
            const looks = ["color", "backgroundColor", "fontSize", "fontFamily", "direction", "opacity",
                "visibility", "pointerEvents", "textAlign", "letterSpacing", "lineHeight", "filter"];
            return [name, x, y, width, height, ...looks.map((look) => style[look])];
        })"""
    )


def said_hello(chat: Chat) -> Chat:
    chat.say("hello")
    expect(chat.theirs).to_have_text("hello")
    chat.is_idle()
    return chat


def test_a_hostile_page_under_a_strict_policy_changes_nothing(
    bots: Bots, site: Site, browser: Browser
) -> None:
    with watching(browser) as plain:
        url = site.put("/plain", page_with(bots.url, bots.fast))
        wanted = measured(said_hello(opened(plain.page, url)))
    site.pages["/hostile.css"] = ("text/css", HOSTILE.encode(), {})
    site.pages["/hostile.js"] = (
        "text/javascript",
        b"customElements.define('other-widget', class extends HTMLElement {});"
        b"window.violations = [];"
        b"addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
        b"Array.prototype.extra = () => 1; Object.prototype.more = 1;",
        {},
    )
    head = '<script src="/hostile.js"></script><link rel="stylesheet" href="/hostile.css">'
    html = page_with(bots.url, bots.fast, head=head, body="<other-widget></other-widget>")
    policy = f"{STRICT}; script-src 'self' {bots.url}; style-src 'self'; img-src data:; connect-src {bots.url}"
    with watching(browser) as hostile:
        chat = opened(hostile.page, site.put("/hostile", html, policy))
        assert measured(said_hello(chat)) == wanted
        assert hostile.page.evaluate("violations") == []
        assert hostile.complaints == []
        assert hostile.elsewhere(site.url, bots.url) == []
        # And the page is as it was but for the one element.
        assert hostile.page.evaluate("document.querySelectorAll('style').length") == 0
        assert hostile.page.evaluate("document.body.lastElementChild.tagName") == "CHATD-WIDGET"


def test_a_page_from_right_to_left_has_the_chat_at_its_end(
    bots: Bots, site: Site, watched: Watched
) -> None:
    html = page_with(bots.url, bots.fast).replace('lang="en"', 'lang="ar" dir="rtl"')
    chat = opened(watched.page, site.put("/rtl", html))
    box = chat.launcher.bounding_box()
    assert box is not None
    assert box["x"] < 100
    expect(chat.input).to_have_attribute("placeholder", "رسالتك")
    expect(chat.launcher).to_have_attribute("aria-label", "إغلاق الدردشة")


def test_the_script_by_its_hash_runs_with_integrity(
    bots: Bots, site: Site, watched: Watched
) -> None:
    line = (
        f'<script async src="{bots.url}{script_path()}" integrity="{script_integrity()}" '
        f'crossorigin="anonymous" data-chatbot-id="{bots.fast}"></script>'
    )
    html = f'<!doctype html><title>Shop</title><link rel="icon" href="data:,">{line}'
    said_hello(opened(watched.page, site.put("/pinned", html)))
    assert watched.complaints == []


def test_the_script_twice_on_a_page_makes_one_chat(
    bots: Bots, site: Site, watched: Watched
) -> None:
    html = page_with(bots.url, bots.fast)
    line = html[html.index("<script") : html.index("</body>")]
    said_hello(opened(watched.page, site.put("/twice", html.replace(line, line * 2))))
    expect(watched.page.locator("chatd-widget")).to_have_count(1)
    assert watched.complaints == []


def test_a_page_without_storage_can_chat(bots: Bots, site: Site, watched: Watched) -> None:
    watched.page.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no') }})"
    )
    said_hello(opened(watched.page, site.put("/storageless", page_with(bots.url, bots.fast))))
    assert watched.complaints == []


# Scripts and looks


def test_a_page_can_do_all_that_a_visitor_can(bots: Bots, site: Site, watched: Watched) -> None:
    page = watched.page
    script = f"""
        window.heard = [];
        (window.chatd ||= []).push((chatd) => {{
            for (const name of ["ready", "open", "close", "message", "error", "reset"])
                chatd.on(name, (detail) => heard.push([name, detail]));
            chatd.init({{ chatbotId: "{bots.fast}", position: "start", theme: "dark" }});
        }});"""
    html = (
        f'<!doctype html><title>Shop</title><link rel="icon" href="data:,"><body>'
        f'<script>{script}</script><script async src="{bots.url}/widget.js"></script>'
    )
    page.goto(site.put("/api", html))
    chat = Chat(page)
    expect(chat.launcher).to_be_visible()
    box = chat.launcher.bounding_box()
    assert box is not None
    assert box["x"] < 100
    page.evaluate("chatd.toggle()")
    expect(chat.panel).to_be_visible()
    page.evaluate("chatd.send('from the page')")
    expect(chat.theirs).to_have_text("from the page")
    chat.is_idle()
    page.evaluate("chatd.reset()")
    expect(chat.theirs).to_have_count(0)
    page.evaluate("chatd.close()")
    expect(chat.panel).to_be_hidden()
    heard = page.evaluate("heard")
    assert [name for name, _ in heard] == ["ready", "open", "message", "reset", "close"]
    assert heard[2][1] == {"role": "assistant", "text": "from the page"}
    # What is registered with `on` can be ended.
    page.evaluate("chatd.on('open', () => heard.push('no'))(); chatd.open()")
    assert page.evaluate("heard.at(-1)") == ["open", None]
    # Made anew, it takes the place of the one before.
    page.evaluate("id => { chatd.init({ chatbotId: id }) }", bots.slow)
    expect(page.locator("chatd-widget")).to_have_count(1)


def test_an_element_in_the_page_is_as_large_as_its_place(
    bots: Bots, site: Site, watched: Watched
) -> None:
    element = (
        f'<div style="width:333px"><chatd-widget chatbot-id="{bots.fast}" mode="inline" '
        'style="--chatd-height: 444px; --chatd-accent: #ffd400"></chatd-widget></div>'
    )
    html = page_with(bots.url, bots.fast, body=element).replace(
        f'data-chatbot-id="{bots.fast}"', ""
    )
    watched.page.goto(site.put("/inline", html))
    chat = Chat(watched.page)
    expect(chat.panel).to_be_visible()
    box = chat.panel.bounding_box()
    assert box is not None
    assert (box["width"], box["height"]) == (333, 444)
    expect(chat.launcher).to_have_count(0)
    said_hello(chat)
    # On a light accent the text is dark by itself.
    expect(chat.mine).to_have_css("background-color", "rgb(255, 212, 0)")
    expect(chat.mine).to_have_css("color", "rgb(0, 0, 0)")


def test_a_page_can_be_the_chat_alone(bots: Bots, site: Site, watched: Watched) -> None:
    watched.page.goto(site.put("/page", page_with(bots.url, bots.fast, 'data-mode="page"')))
    chat = Chat(watched.page)
    expect(chat.panel).to_be_visible()
    assert chat.panel.bounding_box() == {"x": 0, "y": 0, "width": 1280, "height": 860}
    said_hello(chat)
    watched.page.keyboard.press("Escape")
    expect(chat.panel).to_be_visible()


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("de", "Ihre Nachricht"),
        ("es-MX", "Su mensaje"),
        ("fr", "Votre message"),
        ("ar", "رسالتك"),
        ("zh-Hans", "您的消息"),
        ("tlh", "Your message"),
    ],
)
def test_the_widget_speaks_the_language_of_the_page(
    bots: Bots, site: Site, watched: Watched, language: str, words: str
) -> None:
    html = page_with(bots.url, bots.fast).replace('lang="en"', f'lang="{language}"')
    chat = opened(watched.page, site.put(f"/{language}", html))
    expect(chat.input).to_have_attribute("placeholder", words)


def test_the_theme_follows_the_system_while_nothing_else_is_said(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/theme", page_with(bots.url, bots.fast)))
    expect(chat.panel).to_have_css("background-color", "rgb(255, 255, 255)")
    page.emulate_media(color_scheme="dark")
    expect(chat.panel).to_have_css("background-color", "rgb(21, 24, 28)")
    page.evaluate("document.querySelector('chatd-widget').setAttribute('theme', 'light')")
    expect(chat.panel).to_have_css("background-color", "rgb(255, 255, 255)")


# A phone


def test_on_a_phone_the_chat_is_the_screen_and_the_keyboard_does_not_cover_the_input(
    bots: Bots, site: Site, browser: Browser
) -> None:
    with watching(browser, **PHONE) as watched:
        page = watched.page
        page.goto(site.put("/phone", page_with(bots.url, bots.fast)))
        chat = Chat(page)
        chat.launcher.tap()
        expect(chat.panel).to_be_visible()
        assert chat.panel.bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 780}
        expect(chat.panel).to_have_attribute("aria-modal", "true")
        expect(chat.launcher).to_be_hidden()
        # No keyboard comes up unasked.
        expect(chat.input).not_to_be_focused()
        chat.input.tap()
        chat.input.fill("from a phone")
        # Chromium shows no keyboard here; what the page sees of one is a smaller visual viewport.
        page.evaluate(
            "Object.defineProperties(visualViewport, {height: {get: () => 430}, offsetTop: {get: () => 25}});"
            "visualViewport.dispatchEvent(new Event('resize'))"
        )
        box = chat.input.bounding_box()
        assert box is not None
        assert box["y"] >= 25
        assert box["y"] + box["height"] <= 25 + 430
        chat.go.tap()
        expect(chat.theirs).to_have_text("from a phone")
        assert float(chat.input.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) >= 16
        # Neither the notch nor the bar at the bottom covers anything.
        page.context.new_cdp_session(page).send(
            "Emulation.setSafeAreaInsetsOverride", {"insets": {"top": 47, "bottom": 34}}
        )
        expect(chat.host.locator(".compose")).to_have_css("padding-bottom", "34px")
        expect(chat.host.locator("header")).to_have_css("padding-top", "47px")
        chat.panel.get_by_role("button", name="Close chat").tap()
        expect(chat.panel).to_be_hidden()
        expect(chat.launcher).to_be_visible()
        assert watched.complaints == []


def test_on_a_small_screen_tab_goes_round_in_the_chat(
    bots: Bots, site: Site, browser: Browser
) -> None:
    with watching(browser, viewport={"width": 400, "height": 700}) as watched:
        page = watched.page
        html = page_with(bots.url, bots.fast, body='<a href="/x">a link behind</a>')
        chat = opened(page, site.put("/round", html))
        inside = "document.activeElement.tagName"
        seen = set()
        for key in ["Tab"] * 8 + ["Shift+Tab"] * 8:
            page.keyboard.press(key)
            assert page.evaluate(inside) == "CHATD-WIDGET"
            seen.add(
                chat.host.evaluate(
                    "h => h.shadowRoot.activeElement.getAttribute('aria-label') ?? h.shadowRoot.activeElement.tagName"
                )
            )
        assert {"New conversation", "Close chat", "Your message", "Send"} <= seen


# For everybody


State = Callable[[Chat, Wire], None]


def closed(chat: Chat, _: Wire) -> None:
    chat.page.keyboard.press("Escape")
    expect(chat.panel).to_be_hidden()


def empty(chat: Chat, _: Wire) -> None:
    expect(chat.named("Cost?")).to_be_visible()


def answered(chat: Chat, _: Wire) -> None:
    chat.say(MARKDOWN)
    expect(chat.theirs.last).to_contain_text("the end")
    chat.is_idle()


def writing(chat: Chat, _: Wire) -> None:
    chat.say(f"slowly {WORDS}")
    expect(chat.theirs.last).to_contain_text("word1")


def failed(chat: Chat, wire: Wire) -> None:
    wire.refusals = [refusal("502 Bad Gateway", "provider_failed")]
    chat.say("hello")
    expect(chat.named("Try again")).to_be_visible()


def limited(chat: Chat, wire: Wire) -> None:
    wire.refusals = [refusal("429 Too Many Requests", "rate_limited", Retry_After="500")]
    chat.say("hello")
    expect(chat.notice).to_be_visible()


def offline(chat: Chat, wire: Wire) -> None:
    chat.page.context.set_offline(True)
    chat.say("hello")
    expect(chat.notice).to_be_visible()


MARKDOWN = """# A title

Some **bold**, *slanted*, ~~gone~~ and `code`, and [a link](https://example.com/).

1. one
   - inner
2. two

| a | b |
|---|--:|
| 1 | 2 |

```python
print("a line of code that is too long for the panel and has to be scrolled sideways to be read")
```

> quoted

the end"""


@pytest.mark.parametrize("theme", ["light", "dark", "phone"])
@pytest.mark.parametrize("state", [closed, empty, answered, writing, failed, limited, offline])
def test_nobody_is_kept_out_in_any_state(
    bots: Bots, site: Site, wire: Wire, browser: Browser, state: State, theme: str
) -> None:
    page_html = page_with(
        wire.url, bots.slow if state is writing else bots.fast, f'data-theme="{theme}"'
    )
    device = PHONE if theme == "phone" else {}
    with watching(browser, reduced_motion="reduce", **device) as watched:
        page = watched.page
        described(page, greeting="Hello, I am Ada.", suggestions=["Are you open?", "Cost?"])
        chat = opened(page, site.put("/everybody", page_html))
        state(chat, wire)
        page.evaluate(AXE.read_text())
        result = page.evaluate(
            "axe.run(document, {resultTypes: ['violations'], runOnly: undefined})"
        )
        violations = [
            (found["id"], [node["html"] for node in found["nodes"]])
            for found in result["violations"]
        ]
        assert violations == []
        small = chat.host.evaluate(
            """(host) => [...host.shadowRoot.querySelectorAll("button, textarea")]
                .filter((target) => target.checkVisibility())
                .map((target) => [target.className, target.getBoundingClientRect()])
                .filter(([, box]) => box.width < 44 || box.height < 44)
                .map(([name]) => name)"""
        )
        assert small == []
        moving = chat.host.evaluate(
            "host => host.shadowRoot.getAnimations().filter((a) => a.playState === 'running').length"
        )
        assert moving == 0


def test_a_finished_message_is_announced_once(bots: Bots, site: Site, watched: Watched) -> None:
    chat = opened(watched.page, site.put("/announced", page_with(bots.url, bots.slow)))
    chat.host.evaluate(
        """(host) => {
            window.announced = [];
            const live = host.shadowRoot.querySelectorAll("[role=status], [role=alert], [role=log], [aria-live]");
            window.regions = live.length;
            new MutationObserver(() => announced.push(live[0].textContent)).observe(live[0],
                { childList: true, characterData: true, subtree: true });
        }"""
    )
    chat.say("one two three four five six")
    expect(chat.theirs.last).to_have_text("one two three four five six")
    chat.is_idle()
    assert watched.page.evaluate("regions") == 1
    assert watched.page.evaluate("announced") == ["one two three four five six"]


def test_focus_and_the_place_in_the_list_stay_while_an_answer_is_written(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/reading", page_with(bots.url, bots.slow)))
    lines = "\n\n".join(f"line {i}" for i in range(60))
    page.evaluate("text => { chatd.send(text) }", lines)
    expect(chat.theirs.last).to_contain_text("line 1")
    scroll = chat.host.locator(".scroll")
    scroll.evaluate("e => { e.scrollTop = 0 }")
    expect(chat.theirs.last).to_contain_text("line 12")
    assert scroll.evaluate("e => e.scrollTop") == 0
    expect(chat.input).to_be_focused()


# The demo page


def test_the_demo_shows_the_chat_and_the_line_that_works_elsewhere(
    bots: Bots, site: Site, browser: Browser
) -> None:
    with watching(browser, permissions=["clipboard-read", "clipboard-write"]) as watched:
        page = watched.page
        page.goto(f"{bots.url}/demo/{bots.fast}")
        chat = Chat(page)
        expect(chat.panel).to_be_visible()
        said_hello(chat)
        page.locator("select[name=position]").select_option("start")
        page.locator("[data-copies=line]").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        page.goto(site.put("/copied", f"<!doctype html><title>Shop</title><body>{copied}"))
        expect(chat.launcher).to_be_visible()
        box = chat.launcher.bounding_box()
        assert box is not None
        assert box["x"] < 100
        said_hello(opened(page, page.url))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_demo_loads_nothing_from_elsewhere_and_keeps_nobody_out(
    bots: Bots, browser: Browser, scheme: str
) -> None:
    with watching(browser, color_scheme=scheme, bypass_csp=False) as watched:
        page = watched.page
        page.goto(f"{bots.url}/demo/{bots.fast}")
        expect(Chat(page).panel).to_be_visible()
        page.wait_for_load_state("networkidle")
        assert watched.elsewhere(bots.url) == []
        assert [c for c in watched.complaints if "404" not in c] == []
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run(document)")
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]] == []


# What it costs


def test_before_the_first_click_a_page_loads_the_script_and_what_the_chatbot_looks_like(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    devtools = page.context.new_cdp_session(page)
    devtools.send("Network.enable")
    sizes: list[float] = []
    devtools.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    page.goto(site.put("/costs", page_with(bots.url, bots.fast)))
    chat = Chat(page)
    expect(chat.launcher).to_be_visible()
    page.wait_for_load_state("networkidle")
    of_chatd = [url.removeprefix(bots.url) for url in watched.asked if url.startswith(bots.url)]
    assert of_chatd == ["/widget.js", f"/api/chat/widget/bot/{bots.fast}"]
    # The page itself is in it, and headers are.
    assert sum(sizes) < 18_000
    assert chat.host.evaluate("h => h.shadowRoot.querySelectorAll('*').length") < 10
    assert kept(page) == {}


def test_two_hundred_messages_take_little_memory(bots: Bots, site: Site, watched: Watched) -> None:
    page = watched.page
    devtools = page.context.new_cdp_session(page)
    chat = opened(page, site.put("/memory", page_with(bots.url, bots.fast)))

    def used() -> float:
        devtools.send("HeapProfiler.collectGarbage")
        usage = devtools.send("Runtime.getHeapUsage")
        return float(usage["usedSize"] + usage.get("embedderHeapUsedSize", 0))

    said_hello(chat)
    before = used()
    for _ in range(99):
        page.evaluate("text => chatd.send(text)", MARKDOWN)
    chat.is_idle()
    expect(chat.host.locator("li.mine, li.theirs")).to_have_count(200)
    # About 5,000 elements, of which Chromium takes a kilobyte each.
    assert used() - before < 16 * 1024 * 1024
