"""What becomes of Markdown in the widget: the right elements at every prefix, and never a script."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.pages import Site, Watched, watching
from tests.support import server_process
from tests.test_widget import CONFIG, Chat, opened, page_with
from tests.xss import PAYLOADS

ROOT = Path(__file__).parent.parent
ALLOWED = {
    *("a", "blockquote", "br", "button", "code", "div", "em", "h3", "hr", "li", "ol", "p", "pre"),
    *("s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
ATTRIBUTES = {
    *("class", "data-language", "dir", "href", "rel", "start", "style", "tabindex", "target"),
    "type",
}

CASES = {
    "one *two* __three__ ***four***": "<p>one <em>two</em> <strong>three</strong> <em><strong>four</strong></em></p>",
    "**a *b* c** and *a **b** c*": "<p><strong>a <em>b</em> c</strong> and <em>a <strong>b</strong> c</em></p>",
    "2 * 3 * 4 and snake_case_name": "<p>2 * 3 * 4 and snake_case_name</p>",
    "**not closed and *this": "<p>**not closed and *this</p>",
    "~~gone~~ ~kept~": "<p><s>gone</s> ~kept~</p>",
    "`a * b` and ``c ` d``": "<p><code>a * b</code> and <code>c ` d</code></p>",
    "`*a` and *`b*`*": "<p><code>*a</code> and <em><code>b*</code></em></p>",
    "\\*a\\* \\`b\\` \\[c\\](d)": "<p>*a* `b` [c](d)</p>",
    "a  \nb\nc<br>d": "<p>a<br>b<br>c<br>d</p>",
    "# One\n### Three ##\n#no": "<h3>One</h3><h3>Three</h3><p>#no</p>",
    "- a\n- b\n  - c\n    - d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><ul><li><p>d</p></li></ul></li></ul></li><li><p>e</p></li></ul>",
    "3. a\n4. b\n\n   more": '<ol start="3"><li><p>a</p></li><li><p>b</p><p>more</p></li></ol>',
    "1. a\n\n   ```js\n   x\n   ```\n2. b": '<ol><li><p>a</p><pre js="">x</pre></li><li><p>b</p></li></ol>',
    "in\n1984. year": "<p>in<br>1984. year</p>",
    "* * *\n---": "<hr><hr>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "```py\n<b>\n\n  x\n```\nafter": '<pre py="">&lt;b&gt;\n\n  x</pre><p>after</p>',
    "~~~\nnot closed": "<pre>not closed</pre>",
    "a | b\n--|:-:\n1 | `x|y`\n2": "<table><tr><th>a</th><th center>b</th></tr><tr><td>1</td><td center><code>x|y</code></td></tr></table><p>2</p>",
    "| a |\n|---|\n| x \\| y |": "<table><tr><th>a</th></tr><tr><td>x | y</td></tr></table>",
    "[a *b*](https://e.com/x_(y) 'T') [c](<http://e.com/ d>)": '<p><a href="https://e.com/x_(y)">a <em>b</em></a> c</p>',
    "see https://e.com/a_b_c. (https://e.com/)": '<p>see <a href="https://e.com/a_b_c">https://e.com/a_b_c</a>. (<a href="https://e.com/">https://e.com/</a>)</p>',
    "<https://e.com> <mailto:a@e.com> <b>": '<p><a href="https://e.com">https://e.com</a> <a href="mailto:a@e.com">mailto:a@e.com</a> &lt;b&gt;</p>',
    "![a cat](https://e.com/cat.png)": '<p><a href="https://e.com/cat.png">a cat</a></p>',
    "[a [b] c](https://e.com) [x] (y) [z]": '<p><a href="https://e.com">a [b] c</a> [x] (y) [z]</p>',
    "a & b &lt; <i>": "<p>a &amp; b &amp;lt; &lt;i&gt;</p>",
    "": "",
    " \n\n ": "",
}

DOCUMENT = """# Title

Text with **strong *and slanted* words**, `code with **marks**`, ~~gone~~ and [a link](https://e.com/(x)).

1. first
   - inner **one**
   - inner two

     paragraph
2. second

| a | b |
|:--|--:|
| **1** | `2` |
| [3](https://e.com) | 4 |

```python
print("**no**")
```

> quoted *text*
> - list

![picture](https://e.com/p.png) https://e.com/bare and <https://e.com/angle>
---
end\\*"""

HARD = [
    DOCUMENT,
    "*" * 300,
    "[" * 300 + "](" * 100,
    "> " * 200 + "deep",
    "".join("  " * i + "- x\n" for i in range(60)),
    "`" * 50 + "a" + "`" * 49,
    "**a" * 200,
    "_a*b" * 150,
    "|" * 100 + "\n" + "|-" * 99,
    "```\n" * 31,
    "\\" * 99,
    "مرحبا **بك** 👩‍👩‍👧 漢字 *é*",
]


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page with the widget's Markdown alone, where Trusted Types are enforced."""
    script = tmp_path_factory.mktemp("markdown") / "markdown.js"
    subprocess.run(
        [
            *("node", "node_modules/esbuild/bin/esbuild", "widget/src/markdown/view.ts"),
            *("--bundle", "--format=iife", "--global-name=markdown", f"--outfile={script}"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    site = Site()
    site.put_script("/markdown.js", script)
    html = '<!doctype html><title>x</title><body><script src="/markdown.js"></script>'
    policy = "require-trusted-types-for 'script'; trusted-types 'none'"
    with watching(browser) as watched:
        watched.page.goto(site.put("/", html, policy))
        yield watched.page
    site.close()


def simple(html: str) -> str:
    """The elements without what all of them have."""
    html = re.sub(r' (dir|target|rel|tabindex)="[^"]*"', "", html)
    html = re.sub(r' style="text-align: (\w+);?"', r" \1", html)
    html = re.sub(r"</?(thead|tbody)>", "", html)
    html = re.sub(r'<div class="table">(.*?)</div>', r"\1", html, flags=re.DOTALL)
    return re.sub(
        r'<div class="code" data-language="(\w*)"><div class="bar">.*?</div><pre><code>(.*?)</code></pre></div>',
        _pre,
        html,
        flags=re.DOTALL,
    )


def _pre(found: re.Match[str]) -> str:
    language = f' {found[1]}=""' if found[1] else ""
    return f"<pre{language}>{found[2]}</pre>"


@pytest.mark.parametrize(("text", "wanted"), CASES.items())
def test_markdown_becomes_these_elements(page: Page, text: str, wanted: str) -> None:
    html = page.evaluate(
        """(text) => {
            const view = new markdown.MarkdownView("Copy");
            view.update(text, false);
            return view.element.innerHTML;
        }""",
        text,
    )
    assert simple(html) == wanted


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_each_prefix_looks_the_same_whether_it_grew_or_came_at_once(page: Page, text: str) -> None:
    different = page.evaluate(
        """(text) => {
            const made = (text, open) => {
                const view = new markdown.MarkdownView("Copy");
                view.update(text, open);
                return view.element;
            };
            const grown = new markdown.MarkdownView("Copy");
            const chars = [...text];
            for (let i = 0; i <= chars.length; i++) {
                const prefix = chars.slice(0, i).join("");
                grown.update(prefix, true);
                if (!grown.element.isEqualNode(made(prefix, true))) return prefix;
            }
            grown.update(text, false);
            return grown.element.isEqualNode(made(text, false)) ? null : "the end";
        }""",
        text,
    )
    assert different is None


def test_marks_of_what_is_being_written_are_never_seen(page: Page) -> None:
    text = (
        "So **very strong** and `some code` and *slanted ~~gone~~ so* and [a link](https://e.com/x)"
    )
    seen = page.evaluate(
        """(text) => {
            const view = new markdown.MarkdownView("Copy");
            return Array.from(text, (_, i) => {
                view.update(text.slice(0, i + 1), true);
                return view.element.textContent;
            });
        }""",
        text,
    )
    assert [shown for shown in seen if re.search(r"[*`~]|https|\]\(", shown)] == []


def test_no_word_is_lost_at_any_prefix(page: Page) -> None:
    text = DOCUMENT.split("![picture]", maxsplit=1)[0]
    lost = page.evaluate(
        """(text) => {
            const view = new markdown.MarkdownView("");
            for (let i = 1; i <= text.length; i++) {
                view.update(text.slice(0, i), true);
                const shown = view.element.textContent;
                const words = text.slice(0, i).replace(/\\]\\([^)]*\\)*|```\\w*|^\\s*\\d+\\.?/gm, " ").match(/[A-Za-z]+/g) ?? [];
                let at = 0;
                for (const word of words) {
                    at = shown.indexOf(word, at);
                    if (at < 0) return [text.slice(0, i), word];
                }
            }
            return null;
        }""",
        text,
    )
    assert lost is None


def test_a_long_text_without_an_end_to_its_marks_is_read_in_linear_time(page: Page) -> None:
    texts = ["*a " * 60_000, "[" * 60_000, "`a``" * 4_000, "_a" * 60_000, "<" * 60_000]
    for text in texts:
        page.evaluate("text => new markdown.MarkdownView('').update(text, false)", text)


def test_hostile_markdown_makes_only_harmless_elements_at_every_prefix(page: Page) -> None:
    found = page.evaluate(
        """([payloads, allowed, attributes]) => {
            const bad = [];
            for (const payload of payloads) {
                const grown = new markdown.MarkdownView("Copy");
                document.body.append(grown.element);
                const check = () => {
                    for (const element of grown.element.querySelectorAll("*")) {
                        const name = element.localName;
                        if (!allowed.includes(name)) bad.push([payload, name]);
                        for (const { name: attribute, value } of element.attributes) {
                            if (!attributes.includes(attribute)) bad.push([payload, attribute]);
                            if (attribute === "style" && !/^text-align: (start|center|end);$/.test(value)) bad.push([payload, value]);
                        }
                        if (name === "a" && !["http:", "https:", "mailto:"].includes(element.protocol)) bad.push([payload, element.href]);
                        if (name === "a" && element.rel !== "noopener") bad.push([payload, "rel"]);
                    }
                };
                for (let i = 1; i <= payload.length; i++) {
                    grown.update(payload.slice(0, i), true);
                    check();
                }
                grown.update(payload, false);
                check();
                for (const link of grown.element.querySelectorAll("a")) {
                    if (/evil\\.example/.test(link.href) && !payload.includes("https://evil.example/x")) bad.push([payload, link.href]);
                }
                grown.element.remove();
            }
            return bad;
        }""",
        [PAYLOADS, sorted(ALLOWED), sorted(ATTRIBUTES)],
    )
    assert found == []


def test_no_payload_runs_or_loads_anything_through_answers_or_history(
    browser: Browser, tmp_path: Path
) -> None:
    assert len(set(PAYLOADS)) >= 100
    (tmp_path / "chatd.yaml").write_text(CONFIG + "first_chatbot: {name: Ada, model: fast}\n")
    site = Site()
    # No policy protects this page.
    head = "<script>window.ran = 0; window.pwned = window.alert = () => { ran++; };</script>"
    with (
        server_process(tmp_path, "--config", "chatd.yaml") as server,
        watching(browser) as watched,
    ):
        assert server.url
        found = re.search(r"assistant_id (\S+)", server.stderr)
        assert found is not None
        page = watched.page
        chat = opened(page, site.put("/", page_with(server.url, found[1], head=head)))
        for payload in PAYLOADS:
            page.evaluate("text => chatd.send(text)", payload)
        chat.is_idle()
        expect(chat.theirs).to_have_count(len(PAYLOADS))
        _touch_all(watched, chat, site.url, server.url)
        page.reload()
        chat.open()
        expect(chat.theirs).not_to_have_count(0)
        while chat.named("Earlier messages").is_visible():
            before = chat.theirs.count()
            chat.named("Earlier messages").click()
            expect(chat.theirs).not_to_have_count(before)
        expect(chat.theirs).to_have_count(len(PAYLOADS))
        _touch_all(watched, chat, site.url, server.url)
    site.close()


def _touch_all(watched: Watched, chat: Chat, *origins: str) -> None:
    """Touches all that was made, follows each link that is none of http, and looks what happened."""

    def none(route: Route) -> None:
        route.abort()

    page = watched.page
    page.context.route("https://**", none)
    chat.host.evaluate(
        """(host) => {
            for (const element of host.shadowRoot.querySelectorAll(".text *")) {
                for (const type of ["mouseover", "focus", "load", "error", "toggle", "pointerenter"])
                    element.dispatchEvent(new Event(type));
                if (element.localName === "a" && element.protocol !== "https:") element.click();
            }
        }"""
    )
    page.wait_for_load_state("networkidle")
    assert page.evaluate("ran") == 0
    assert watched.elsewhere(*origins) == []
    assert len(page.context.pages) == 1
