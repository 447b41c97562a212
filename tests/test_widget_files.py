"""The widget's files: the built script is the source's, small, and served for any page to keep."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import subprocess
from pathlib import Path

from chatd.handlers.widget import script_integrity, script_path
from tests.support import Served

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "chatd" / "static" / "widget" / "widget.js"
MOST_BYTES = 15_360


def _node(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_built_script_is_what_the_source_gives(tmp_path: Path) -> None:
    built = _node("widget/build.mjs", str(tmp_path))
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "widget.js").read_bytes() == BUILT.read_bytes()


def test_the_source_is_strict_typescript() -> None:
    checked = _node("node_modules/typescript/bin/tsc", "--project", "widget")
    assert checked.returncode == 0, checked.stdout
    options = json.loads((ROOT / "widget" / "tsconfig.json").read_text())["compilerOptions"]
    assert options["strict"] is True


def test_the_script_is_no_larger_than_it_may_be() -> None:
    assert len(gzip.compress(BUILT.read_bytes(), 9)) <= MOST_BYTES


def test_the_source_never_makes_html_of_text() -> None:
    sources = [*(ROOT / "widget" / "src").rglob("*.ts"), BUILT]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert [path.name for path in sources if forbidden in path.read_text()] == [], forbidden


def test_every_language_has_all_words_and_keeps_their_gaps() -> None:
    languages = {
        path.stem: json.loads(path.read_text())
        for path in (ROOT / "widget" / "languages").glob("*.json")
    }
    assert {"ar", "de", "en", "es", "fr", "zh"} <= languages.keys()
    for name, words in languages.items():
        assert words.keys() == languages["en"].keys(), name
        assert all(words.values()), name
        assert not [word for word in words.values() if "|" in word], name
        assert [key for key, word in words.items() if "{time}" in word] == ["wait"], name


async def test_the_script_may_be_loaded_by_every_page_and_kept_for_five_minutes(
    served: Served,
) -> None:
    answer = await served.get("/widget.js", headers={"Origin": "https://elsewhere.example"})
    assert answer.status == 200
    assert answer.body == BUILT.read_bytes()
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert answer.headers["Cache-Control"] == "public, max-age=300"
    for encoding in ("gzip", "identity"):
        first = await served.get("/widget.js", headers={"Accept-Encoding": encoding})
        again = {"If-None-Match": first.headers["Etag"], "Accept-Encoding": encoding}
        second = await served.get("/widget.js", headers=again)
        assert (second.status, second.body) == (304, b"")


async def test_the_script_is_sent_compressed_to_who_takes_that(served: Served) -> None:
    async with served.http.get(
        f"{served.url}/widget.js", headers={"Accept-Encoding": "gzip, br"}
    ) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert "Accept-Encoding" in answer.headers["Vary"]
        assert int(answer.headers["Content-Length"]) <= MOST_BYTES
        assert await answer.read() == BUILT.read_bytes()


async def test_the_script_by_its_hash_never_changes(served: Served) -> None:
    answer = await served.get(script_path())
    assert answer.body == BUILT.read_bytes()
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert hashlib.sha256(answer.body).hexdigest()[:32] in script_path()
    digest = base64.b64encode(hashlib.sha384(answer.body).digest()).decode()
    assert script_integrity() == f"sha384-{digest}"


async def test_the_hash_of_another_version_is_not_found(served: Served) -> None:
    for name in ("0" * 32 + ".js", "widget.js", "demo.html", "..%2Fdocs%2Findex.html"):
        answer = await served.get(f"/widget/{name}")
        assert (answer.status, answer.json["code"]) == (404, "not_found"), name


async def test_the_demo_shows_a_chatbot(served: Served) -> None:
    bot = await served.add_bot()
    page = await served.get(f"/demo/{bot.id}")
    text = page.body.decode()
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert f"{served.url}/widget.js" in text
    assert script_path() in text
    assert script_integrity() in text
    assert "{{" not in text
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


async def test_the_demo_of_no_chatbot_is_not_found(served: Served) -> None:
    for id in ("123e4567-e89b-12d3-a456-426614174000", "nobody"):
        answer = await served.get(f"/demo/{id}")
        assert (answer.status, answer.json["code"]) == (404, "not_found")
    assert (await served.get("/demo/assets/demo.html")).status == 404
