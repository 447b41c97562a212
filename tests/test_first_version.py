"""Requests that were written for the first public version are answered as that version did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chatd.domain import canonical_id
from tests.support import chatd_command
from tests.test_cli import fetch, serving

ASSISTANT_ID = "e97f4988-4f70-470b-b2e5-aca28ddbcff0"
API_KEY = "c8bc40f2-e83d-4e92-ac2b-d5bd6444da0a"
MODEL = "openai/gpt-3.5-turbo"
QUESTION = "Hello, how are you?"
ANSWER = "I'm doing well, thank you for asking! How can I assist you today?"
CONFIG = f"""
storage: {{use: sqlite}}
providers:
  main: {{use: echo, reply: "{ANSWER}"}}
models:
  - {{match: "{MODEL}", ask: [main]}}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server, and beside it the chatbot of that version's database, made while it runs."""
    folder = tmp_path_factory.mktemp("first-version")
    (folder / "chatd.yaml").write_text(CONFIG, encoding="utf-8")
    with serving(folder) as server:
        known = ["--id", ASSISTANT_ID, "--api-key", API_KEY, "--model", MODEL]
        made = chatd_command("bots", "add", *known, cwd=folder)
        assert made.returncode == 0, made.stderr
        yield server.url


def test_the_four_requests_give_their_four_answers(url: str) -> None:
    begun = fetch(f"{url}/api/chat/session", {"api_key": API_KEY, "assistant_id": ASSISTANT_ID})
    assert begun.status == 200
    assert begun.json.keys() == {"session_id"}
    assert canonical_id(begun.json["session_id"])

    said = fetch(
        f"{url}/api/chat",
        {
            "api_key": API_KEY,
            "session_id": begun.json["session_id"],
            "type": "custom_code",
            "assistant_id": ASSISTANT_ID,
            "messages": [{"role": "user", "content": QUESTION}],
        },
    )
    assert said.status == 200
    assert said.json["response"] == ANSWER

    widget = fetch(f"{url}/api/chat/widget/session", {"chatbot_id": ASSISTANT_ID})
    assert widget.status == 200
    assert canonical_id(widget.json["session_id"])
    assert widget.json["session_id"] != begun.json["session_id"]

    asked = fetch(
        f"{url}/api/chat/widget",
        {"session_id": widget.json["session_id"], "message": QUESTION},
    )
    assert asked.status == 200
    assert asked.json["response"] == ANSWER


def test_every_error_carries_a_detail(url: str) -> None:
    nobody = "00000000-0000-4000-8000-000000000000"
    session, chat = f"{url}/api/chat/session", f"{url}/api/chat"
    answers = [
        fetch(session, {"api_key": "wrong", "assistant_id": ASSISTANT_ID}),
        fetch(session, {"api_key": API_KEY, "assistant_id": nobody}),
        fetch(session, {"api_key": API_KEY}),
        fetch(chat, {"api_key": API_KEY, "assistant_id": ASSISTANT_ID}),
        fetch(f"{url}/api/chat/widget/session", {"chatbot_id": nobody}),
        fetch(f"{url}/api/chat/widget", {"session_id": nobody, "message": QUESTION}),
        fetch(session),
        fetch(f"{url}/nowhere"),
    ]
    assert [a.status for a in answers] == [401, 401, 422, 422, 404, 404, 405, 404]
    for answer in answers:
        assert isinstance(answer.json["detail"], str)
        assert answer.json["detail"]


def test_health_says_ok_and_nothing_else(url: str) -> None:
    answer = fetch(f"{url}/health")
    assert answer.status == 200
    assert answer.json == {"status": "ok"}


def test_docs_is_a_page(url: str) -> None:
    answer = fetch(f"{url}/docs")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/html")
    assert b"<html" in answer.body.lower()
