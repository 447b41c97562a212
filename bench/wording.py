"""What is said in the measured turns, and the requests that say it."""

from __future__ import annotations

import json
from collections.abc import Sequence

KEY = "bench-key-0123456789abcdef"
BOT = "6f1f5b52-7a44-4f0e-9a57-0c3f8d0f2b11"
MODEL = "mock"
SESSIONS = 64
"""Sessions of a subject, one for each connection: turns of one session would wait for each other."""
HISTORY = 20
"""Messages that come before the new one in each turn."""
PROMPT_MESSAGES = 1 + HISTORY + 1
"""What the model is given in each turn: the system prompt, the history and the new message."""

QUESTION = "How do I change the address that my parcel, which I ordered yesterday, goes to?".ljust(
    84
)
REPLY = ("Certainly. " + "Open your orders, choose the parcel and then its address. " * 5)[:284]
SYSTEM_PROMPT = ("You are the helpful assistant of a shop. " * 5)[:184]
OVERHEAD = 16
"""Characters that a message costs of a context budget beside its text."""
FIRST_TOKEN = "Certainly"
"""How each reply begins, and what nothing else holds."""
NEXT_TOKEN = " lorem"
"""What the further tokens of a streamed reply are."""

PROMPT_CHARS = (
    len(SYSTEM_PROMPT)
    + len(QUESTION)
    + HISTORY // 2 * (len(QUESTION) + len(REPLY))
    + (HISTORY + 2) * OVERHEAD
)
PROMPT_TOKENS = PROMPT_CHARS // 4
"""What the mock says that the prompt had, so that chatd's estimate of four characters stays."""


def context_tokens(messages: int) -> int:
    """A chatbot's budget that holds so many messages of history, an even number, and no more."""
    chars = PROMPT_CHARS + (messages - HISTORY) // 2 * (len(QUESTION) + len(REPLY) + 2 * OVERHEAD)
    return chars // 4 + 25


def http(
    method: str, path: str, body: object = None, key: str = "", *, close: bool = False
) -> bytes:
    """An HTTP request, on a connection that is kept open unless it is told to close it."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    if close:
        head += "Connection: close\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return f"{head}\r\n".encode() + content


def chat(session: str, *, stream: bool = False, bot: str = BOT, key: str = KEY) -> bytes:
    """A turn of chatd's API."""
    said = [{"role": "user", "content": QUESTION}]
    body = {"api_key": key, "assistant_id": bot, "session_id": session, "type": "message"}
    return http("POST", "/api/chat", {**body, "messages": said, "stream": stream})


def completion(key: str, *, stream: bool = False) -> bytes:
    """The same turn for a server that stores nothing and is given the history."""
    pair = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        *pair * (HISTORY // 2),
        {"role": "user", "content": QUESTION},
    ]
    body = {"model": MODEL, "messages": messages, "stream": stream}
    return http("POST", "/v1/chat/completions", body, key)


def chats(sessions: Sequence[str], *, stream: bool = False) -> list[bytes]:
    """A turn of each session."""
    return [chat(session, stream=stream) for session in sessions]
