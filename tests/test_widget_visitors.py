"""The widget with visitors that the site knows, and chatbots that say who they are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jwt
import pytest
from playwright.sync_api import Browser, expect

from tests.pages import Site, watching
from tests.support import chatd_command, server_process
from tests.test_widget import CONFIG, Chat, opened, page_with


@dataclass
class Known:
    """A server, and a chatbot for known visitors alone, with the secret that signs for them."""

    url: str
    bot: str
    secret: str

    def token(self, sub: str, seconds: float = 600) -> str:
        return jwt.encode({"sub": sub, "exp": int(time.time() + seconds)}, self.secret, "HS256")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Known]:
    """`chatd serve` with a chatbot that asks who a visitor is, and introduces itself."""
    folder = tmp_path_factory.mktemp("known")
    (folder / "chatd.yaml").write_text(CONFIG)

    def bots(command: str, *arguments: str) -> str:
        done = chatd_command("bots", command, "--config", "chatd.yaml", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def found(pattern: str, text: str) -> str:
        match = re.search(pattern, text)
        assert match is not None, text
        return match[1]

    bot = found(r"id +(\S+)", bots("add", "--name", "Ada", "--model", "fast"))
    secret = found(r"(\S{40,})", bots("identity-secret", bot))
    bots(
        *("set", bot, "--require-identity", "yes", "--allowed-origin", site.url),
        *("--greeting", "Hello, I am **Ada**.", "--suggestion", "Are you open?"),
        *("--accent", "#ffd400", "--theme", "dark", "--language", "de"),
    )
    with server_process(folder, "--config", "chatd.yaml") as server:
        yield Known(server.url, bot, secret)


def test_the_chatbot_introduces_itself_as_it_is_set(
    known: Known, site: Site, browser: Browser
) -> None:
    with watching(browser) as watched:
        chat = opened(watched.page, site.put("/set", page_with(known.url, known.bot)))
        expect(chat.theirs.locator("strong")).to_have_text("Ada")
        expect(chat.input).to_have_attribute("placeholder", "Ihre Nachricht")
        expect(chat.launcher).to_have_css("background-color", "rgb(255, 212, 0)")
        expect(chat.panel).to_have_css("background-color", "rgb(21, 24, 28)")
        chat.named("Are you open?").click()
        expect(chat.host.locator(".note")).to_contain_text("Bitte melden Sie sich an.")


def test_a_visitor_never_sees_the_history_of_the_one_before(
    known: Known, site: Site, browser: Browser
) -> None:
    with watching(browser) as watched:
        page = watched.page
        ann = f'data-user-token="{known.token("ann")}"'
        chat = opened(page, site.put("/ann", page_with(known.url, known.bot, ann)))
        chat.say("said by Ann")
        expect(chat.theirs.last).to_have_text("said by Ann")
        page.reload()
        chat.open()
        expect(chat.mine).to_have_text("said by Ann")
        # On a shared computer, without a logout.
        bob = f'data-user-token="{known.token("bob")}"'
        chat = opened(page, site.put("/bob", page_with(known.url, known.bot, bob)))
        chat.say("said by Bob")
        expect(chat.mine).to_have_text("said by Bob")


def test_a_session_taken_from_another_visitor_opens_nothing(
    known: Known, site: Site, browser: Browser
) -> None:
    with watching(browser) as watched:
        page = watched.page
        ann = f'data-user-token="{known.token("ann")}"'
        chat = opened(page, site.put("/taken", page_with(known.url, known.bot, ann)))
        chat.say("said by Ann")
        expect(chat.theirs.last).to_have_text("said by Ann")
        page.evaluate(
            """() => { for (const [key, value] of Object.entries(localStorage))
                localStorage.setItem(key.replace(/ann$/, "eve"), value); }"""
        )
        eve = f'data-user-token="{known.token("eve")}"'
        chat = opened(page, site.put("/eve", page_with(known.url, known.bot, eve)))
        chat.say("said by Eve")
        expect(chat.mine).to_have_text("said by Eve")


def test_a_token_that_ran_out_is_asked_for_again(
    known: Known, site: Site, browser: Browser
) -> None:
    with watching(browser) as watched:
        page = watched.page
        tokens = [known.token("ann", -100), known.token("ann")]
        script = f"""<script>
            window.tokens = {tokens!r};
            (window.chatd ||= []).push((chatd) => chatd.init({{
                chatbotId: "{known.bot}", userToken: async () => tokens.shift() }}));
        </script>"""
        html = page_with(known.url, known.bot, head=script)
        html = html.replace(f'data-chatbot-id="{known.bot}"', "")
        chat: Chat = opened(page, site.put("/again", html))
        chat.say("with a fresh token")
        expect(chat.theirs.last).to_have_text("with a fresh token")
        assert page.evaluate("tokens.length") == 0


def test_the_demo_of_a_chatbot_with_origins_of_its_own_is_introduced(
    known: Known, browser: Browser
) -> None:
    with watching(browser) as watched:
        watched.page.goto(f"{known.url}/demo/{known.bot}")
        expect(Chat(watched.page).theirs).to_have_text("Hello, I am Ada.")


def test_a_page_whose_token_fails_once_is_asked_again_and_the_visitor_is_told(
    known: Known, site: Site, browser: Browser
) -> None:
    with watching(browser) as watched:
        script = f"""<script>
            window.asked = 0;
            (window.chatd ||= []).push((chatd) => chatd.init({{
                chatbotId: "{known.bot}", userToken: async () => {{
                    if (window.asked++ === 0) throw new TypeError("Failed to fetch");
                    return "{known.token("ann")}"; }} }}));
        </script>"""
        html = page_with(known.url, known.bot, head=script)
        html = html.replace(f'data-chatbot-id="{known.bot}"', "")
        chat: Chat = opened(watched.page, site.put("/once", html))
        notice = chat.host.locator(".notice")
        expect(notice).to_be_visible()
        chat.say("hello")
        expect(chat.theirs.last).to_have_text("hello")
        expect(notice).to_be_hidden()


def test_after_a_logout_the_elements_own_token_counts_no_more(
    known: Known, site: Site, browser: Browser
) -> None:
    with watching(browser) as watched:
        page = watched.page
        ann = f'data-user-token="{known.token("ann")}"'
        chat = opened(page, site.put("/logout", page_with(known.url, known.bot, ann)))
        chat.say("said by Ann")
        expect(chat.theirs.last).to_have_text("said by Ann")
        page.evaluate("chatd.setUser()")
        page.evaluate("document.querySelector('chatd-widget').setAttribute('language', 'en')")
        chat.say("said by nobody")
        expect(chat.host.locator(".note")).to_contain_text("sign in")
