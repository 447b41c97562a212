"""Where things stand in the widget, measured in a real Chromium."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.pages import Site, Watched, Wire, watching
from tests.test_widget import (  # noqa: F401 - the fixtures are taken from there
    PHONE,
    Bots,
    Chat,
    bots,
    described,
    opened,
    page_with,
    refusal,
    site,
    watched,
    wire,
)

# Pytest hands fixtures in by their names.
# ruff: noqa: F811

LINES = "\n\n".join(f"line {i}" for i in range(60))
ARABIC = """| اليوم | يفتح |
|---|---|
| الاثنين | 9:00 |

1. البند الأول
2. البند الثاني

> اقتباس"""


def box(element: Locator) -> dict[str, float]:
    """Where an element stands."""
    found = element.bounding_box()
    assert found is not None
    return {"left": found["x"], "right": found["x"] + found["width"], **found}


def is_at_its_end(chat: Chat) -> None:
    """Waits until the end of the conversation is in sight."""
    chat.page.wait_for_function(
        """() => { const { scrollHeight, scrollTop, clientHeight } =
            document.querySelector("chatd-widget").shadowRoot.querySelector(".scroll");
            return scrollHeight - scrollTop - clientHeight <= 1; }"""
    )


@pytest.mark.parametrize("device", [{}, PHONE], ids=["desktop", "phone"])
def test_a_long_suggestion_stays_inside_of_the_chat(
    bots: Bots, site: Site, browser: Browser, device: dict[str, Any]
) -> None:
    long = "I would like to return something that I bought from you last week"
    with watching(browser, **device) as watched:
        described(watched.page, suggestions=[long])
        chat = opened(watched.page, site.put("/suggestion", page_with(bots.url, bots.fast)))
        assert box(chat.named(long))["right"] <= box(chat.panel)["right"] - 16


def test_an_answer_from_right_to_left_has_its_columns_numbers_and_bars_at_the_right(
    bots: Bots, site: Site, watched: Watched
) -> None:
    html = page_with(bots.url, bots.fast).replace('lang="en"', 'lang="ar" dir="rtl"')
    chat = opened(watched.page, site.put("/order", html))
    chat.say(ARABIC)
    answer = chat.theirs.last
    expect(answer.locator("blockquote")).to_be_visible()
    first, second = box(answer.locator("th").first), box(answer.locator("th").last)
    assert first["left"] > second["left"]
    right = box(answer)["right"]
    assert abs(box(answer.locator("table"))["right"] - right) <= 1
    # The numbers stand in the room that a list leaves at its beginning.
    assert box(answer.locator("ol"))["right"] - box(answer.locator("li").first)["right"] > 10
    bar = answer.locator("blockquote").evaluate("e => getComputedStyle(e).borderRightWidth")
    assert bar == "3px"


def test_the_end_of_a_conversation_stays_in_sight_when_something_takes_room(
    bots: Bots, site: Site, wire: Wire, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/end", page_with(wire.url, bots.fast)))
    chat.say(LINES)
    expect(chat.theirs.last).to_contain_text("line 59")
    chat.is_idle()
    before = box(chat.host.locator(".scroll"))["height"]
    chat.input.fill("a\nb\nc\nd\ne\nf")
    assert box(chat.host.locator(".scroll"))["height"] < before
    is_at_its_end(chat)
    wire.refusals = [refusal("429 Too Many Requests", "rate_limited", Retry_After="500")]
    chat.input.press("Enter")
    expect(chat.notice).to_contain_text("You can send again in")
    # What is said of it twice does not contradict itself.
    expect(chat.host.locator(".note")).to_contain_text("No answer came.")
    is_at_its_end(chat)


def test_a_list_that_is_read_further_up_stays_there_when_something_takes_room(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/up", page_with(bots.url, bots.fast)))
    chat.say(LINES)
    expect(chat.theirs.last).to_contain_text("line 59")
    chat.is_idle()
    scroll = chat.host.locator(".scroll")
    scroll.evaluate("e => new Promise((done) => { e.onscroll = done; e.scrollTop = 40; })")
    before = box(scroll)["height"]
    chat.input.fill("a\nb\nc\nd\ne\nf")
    watched.page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
    )
    assert box(scroll)["height"] < before
    assert scroll.evaluate("e => e.scrollTop") == 40


def test_the_header_and_the_input_stay_when_a_message_is_brought_into_view(
    bots: Bots, site: Site, watched: Watched
) -> None:
    chat = opened(watched.page, site.put("/header", page_with(bots.url, bots.fast)))
    chat.say(LINES)
    expect(chat.theirs.last).to_contain_text("line 59")
    chat.is_idle()
    header = chat.host.locator("header")
    before = box(header)
    # Browsers do so for what is found in the page, and for screen readers.
    chat.mine.evaluate("e => e.scrollIntoView({ block: 'start' })")
    chat.theirs.last.evaluate("e => e.scrollIntoView({ block: 'start' })")
    assert chat.panel.evaluate("e => e.scrollTop") == 0
    assert box(header) == before


def test_the_text_of_the_demo_is_beside_the_chat_wherever_that_stands(
    bots: Bots, watched: Watched
) -> None:
    page = watched.page
    described(page, language="ar")
    page.goto(f"{bots.url}/demo/{bots.fast}")
    chat = Chat(page)
    expect(chat.panel).to_be_visible()
    expect(page.locator("body")).to_have_class("right")
    assert box(chat.panel)["right"] < box(page.locator("h1"))["left"]
    page.get_by_label("Corner").select_option("start")
    expect(page.locator("body")).not_to_have_class("right")
    assert box(page.locator("h1"))["right"] < box(chat.panel)["left"]
