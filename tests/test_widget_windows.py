"""The widget in several windows, and what a visitor sees of answers that fail, in a real Chromium."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Browser, Page, Request, expect

from tests.pages import Site, Watched, Wire, watching
from tests.test_widget import (  # noqa: F401 - the fixtures are taken from there
    PHONE,
    WORDS,
    Bots,
    Chat,
    bots,
    kept,
    opened,
    page_with,
    refusal,
    said_hello,
    site,
    token,
    transcript,
    watched,
    wire,
)

# Pytest hands fixtures in by their names.
# ruff: noqa: F811

LATER = 20_000


def asked_by(page: Page) -> list[str]:
    """What a page asks of chatd from now on: method and path."""
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(f"{request.method} {request.url.partition('/api/chat/widget')[2]}")

    page.on("request", note)
    return asked


def apart(site: Site, watched: Watched, url: str, bot: str) -> tuple[Chat, Chat]:
    """One conversation in two windows, of which the second does not hear of the first by itself."""
    address = site.put("/apart", page_with(url, bot))
    first = opened(watched.page, address)
    first.say("to begin")
    expect(first.theirs).to_have_text("to begin")
    first.is_idle()
    page = watched.page.context.new_page()
    page.add_init_script("addEventListener('storage', (e) => e.stopImmediatePropagation(), true)")
    second = opened(page, address)
    expect(second.mine).to_have_text("to begin")
    return first, second


def test_a_message_that_waits_for_another_window_is_sent_once_when_that_is_answered(
    bots: Bots, site: Site, watched: Watched
) -> None:
    first, second = apart(site, watched, bots.url, bots.slow)
    first.say(WORDS)
    expect(first.theirs.last).to_contain_text("word1")
    asked = asked_by(second.page)
    second.say("after it")
    expect(second.theirs.last).to_have_text("after it", timeout=LATER)
    second.is_idle()
    assert asked == ["POST ", "GET /stream", "POST "]


def test_a_message_that_waits_is_not_sent_after_it_was_stopped(
    bots: Bots, site: Site, watched: Watched
) -> None:
    first, second = apart(site, watched, bots.url, bots.slow)
    first.say(WORDS)
    expect(first.theirs.last).to_contain_text("word1")
    with second.page.expect_request("**/widget/stream"):
        second.say("better not")
    second.named("Stop the answer").click()
    expect(second.host.locator(".note")).to_contain_text("Stopped.")
    first.is_idle()
    expect(first.theirs.last).to_have_text(WORDS, timeout=LATER)
    second.page.wait_for_timeout(1000)
    assert ("user", "better not") not in transcript(first.page, bots.url)
    # It is not lost either.
    second.named("Try again").click()
    expect(second.theirs.last).to_have_text("better not")


def test_a_message_that_waits_in_vain_is_told_of_in_words(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    chat = said_hello(opened(watched.page, site.put("/vain", page_with(wire.url, bots.fast))))
    wire.refusals = [refusal("409 Conflict", "turn_in_progress")] * 50
    chat.say("is it my turn?")
    expect(chat.host.locator(".note")).to_contain_text("No answer came.", timeout=LATER)
    wire.refusals = []
    chat.named("Try again").click()
    expect(chat.theirs.last).to_have_text("is it my turn?")


def test_what_is_said_in_one_window_shows_in_the_other_when_it_is_looked_at(
    bots: Bots, site: Site, watched: Watched
) -> None:
    first, second = apart(site, watched, bots.url, bots.fast)
    first.say("said here")
    expect(first.theirs.last).to_have_text("said here")
    first.is_idle()
    expect(second.mine).to_have_text("to begin")
    second.page.evaluate("dispatchEvent(new Event('focus'))")
    expect(second.mine).to_have_text(["to begin", "said here"])
    expect(second.theirs).to_have_text(["to begin", "said here"])
    # The first one hears of the second by itself.
    second.say("and there")
    expect(first.theirs.last).to_have_text("and there")
    first.named("New conversation").click()
    second.page.evaluate("dispatchEvent(new Event('focus'))")
    expect(second.mine).to_have_count(0)


def test_a_message_like_the_one_before_that_never_arrived_can_be_sent_after_a_reload(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/same", page_with(wire.url, bots.fast)))
    chat.say("yes")
    expect(chat.theirs).to_have_text("yes")
    chat.is_idle()
    wire.refusals = [refusal("503 Service Unavailable", "overloaded")]
    chat.say("yes")
    expect(chat.named("Try again")).to_be_visible()
    page.reload()
    chat.open()
    expect(chat.mine).to_have_text(["yes", "yes"])
    chat.named("Try again").click()
    expect(chat.theirs).to_have_text(["yes", "yes"])
    chat.is_idle()
    page.reload()
    chat.open()
    expect(chat.mine).to_have_text(["yes", "yes"])
    expect(chat.named("Try again")).to_have_count(0)
    assert transcript(page, bots.url) == [("user", "yes"), ("assistant", "yes")] * 2


def test_a_message_that_arrived_unseen_is_not_shown_twice_after_a_reload(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    page = watched.page
    chat = opened(page, site.put("/unseen", page_with(wire.url, bots.fast)))
    chat.say("yes")
    expect(chat.theirs).to_have_text("yes")
    chat.is_idle()
    wire.deaf = 1
    with page.expect_request("**/api/chat/widget"):
        chat.say("yes")
    page.reload()
    chat.open()
    expect(chat.theirs).to_have_text(["yes", "yes"])
    expect(chat.mine).to_have_text(["yes", "yes"])
    assert transcript(page, bots.url) == [("user", "yes"), ("assistant", "yes")] * 2


# What goes wrong on the way


HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"


def page_of_a_proxy(status: str) -> bytes:
    """An HTML page in place of chatd's answer, which a page may read."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {len(HTML)}\r\n"
    return f"{head}Access-Control-Allow-Origin: *\r\nConnection: close\r\n\r\n".encode() + HTML


@pytest.mark.parametrize(
    "answer",
    [
        refusal("500 Internal Server Error", "internal_error"),
        page_of_a_proxy("502 Bad Gateway"),
        page_of_a_proxy("200 OK"),
    ],
    ids=["500", "502", "200"],
)
def test_an_answer_that_is_none_is_told_of_and_can_be_tried_again(
    bots: Bots, site: Site, wire: Wire, watched: Watched, answer: bytes
) -> None:
    chat = opened(watched.page, site.put("/none", page_with(wire.url, bots.fast)))
    wire.refusals = [answer] * 20
    chat.say("hello")
    note = chat.host.locator(".note")
    expect(note).to_contain_text("No answer came.", timeout=LATER)
    assert "502" not in chat.panel.inner_text()
    wire.refusals = []
    chat.named("Try again").click()
    expect(chat.theirs).to_have_text("hello")
    assert transcript(watched.page, bots.url) == [("user", "hello"), ("assistant", "hello")]


def test_an_answer_that_is_cut_for_good_is_told_of_and_its_rest_can_be_had(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/cut-off", page_with(wire.url, bots.slow)))
    chat.say(WORDS)
    expect(chat.theirs).to_contain_text("word3")
    watched.page.route(
        "**/events",
        lambda route: route.fulfill(
            status=502, body="no", headers={"Access-Control-Allow-Origin": "*"}
        ),
    )
    wire.cut()
    expect(chat.host.locator(".note")).to_contain_text("The answer broke off.", timeout=LATER)
    watched.page.unroute("**/events")
    chat.named("Try again").click()
    expect(chat.theirs).to_have_text(WORDS, timeout=LATER)
    expect(chat.host.locator(".note")).to_have_count(0)
    assert transcript(watched.page, bots.url) == [("user", WORDS), ("assistant", WORDS)]


def test_a_history_that_cannot_be_read_is_told_of_and_can_be_tried_again(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    chat = said_hello(opened(page, site.put("/unread", page_with(bots.url, bots.fast))))
    page.route(
        "**/messages",
        lambda route: route.fulfill(
            status=500, body="<h1>500</h1>", headers={"Access-Control-Allow-Origin": "*"}
        ),
    )
    page.reload()
    chat.open()
    expect(chat.notice).to_contain_text("No answer came.")
    page.unroute("**/messages")
    chat.notice.get_by_role("button", name="Try again").click()
    expect(chat.mine).to_have_text("hello")
    expect(chat.notice).to_be_hidden()


# Who is gone


@pytest.mark.parametrize(
    "source", ["null", "() => null", "async () => { throw new Error('down') }"]
)
def test_nothing_of_the_visitor_before_is_left_whatever_the_next_source_gives(
    bots: Bots, site: Site, watched: Watched, source: str
) -> None:
    page = watched.page
    chat = said_hello(opened(page, site.put("/gone-user", page_with(bots.url, bots.fast))))
    page.evaluate("token => chatd.setUser(token)", token("ann"))
    said_hello(chat)
    page.evaluate(f"chatd.setUser({source})")
    expect(chat.mine).to_have_count(0)
    assert kept(page) == {}


def test_a_conversation_of_nobody_known_ends_with_a_logout_too(
    bots: Bots, site: Site, watched: Watched
) -> None:
    page = watched.page
    chat = said_hello(opened(page, site.put("/nobody", page_with(bots.url, bots.fast))))
    page.evaluate("chatd.setUser(() => null)")
    expect(chat.mine).to_have_count(0)
    assert kept(page) == {}


# By touch alone, and from right to left


def test_everything_can_be_done_by_touch_alone(
    bots: Bots, site: Site, wire: Wire, browser: Browser
) -> None:
    with watching(browser, **PHONE, permissions=["clipboard-read", "clipboard-write"]) as watched:
        page = watched.page
        body = {"name": "Ada", "suggestions": ["Are you open?"]}
        page.route(
            "**/api/chat/widget/bot/*",
            lambda route: route.fulfill(
                body=json.dumps(body), headers={"Access-Control-Allow-Origin": "*"}
            ),
        )
        page.goto(site.put("/touch", page_with(wire.url, bots.slow)))
        chat = Chat(page)
        chat.launcher.tap()
        chat.named("Are you open?").tap()
        expect(chat.theirs).to_have_text("Are you open?")
        chat.is_idle()
        chat.input.fill(WORDS)
        chat.go.tap()
        expect(chat.theirs.last).to_contain_text("word1")
        chat.go.tap()
        expect(chat.host.locator(".note")).to_have_text("Stopped.")
        wire.refusals = [refusal("502 Bad Gateway", "provider_failed")]
        chat.input.fill("```js\nlet a;\n```")
        chat.go.tap()
        chat.named("Try again").tap()
        # No keyboard comes up unasked.
        expect(chat.input).not_to_be_focused()
        chat.is_idle()
        chat.named("Copy").tap()
        expect(chat.host.locator(".copy")).to_have_text("Copy ✓")
        chat.named("New conversation").tap()
        expect(chat.mine).to_have_count(0)
        expect(chat.input).not_to_be_focused()
        chat.panel.get_by_role("button", name="Close chat").tap()
        expect(chat.panel).to_be_hidden()


def test_a_long_latin_name_keeps_its_beginning_on_a_page_from_right_to_left(
    bots: Bots, site: Site, watched: Watched
) -> None:
    name = "Assistance of the Shop with the Longest Name of All in the Whole Street"
    watched.page.route(
        "**/api/chat/widget/bot/*",
        lambda route: route.fulfill(
            json={"name": name}, headers={"Access-Control-Allow-Origin": "*"}
        ),
    )
    html = page_with(bots.url, bots.fast).replace('lang="en"', 'lang="ar" dir="rtl"')
    chat = opened(watched.page, site.put("/long-name", html))
    hidden = chat.host.locator("h2").evaluate(
        """(title) => { const range = document.createRange();
            range.setStart(title.firstChild, 0); range.setEnd(title.firstChild, 1);
            return title.getBoundingClientRect().left - range.getBoundingClientRect().left; }"""
    )
    assert hidden <= 1
