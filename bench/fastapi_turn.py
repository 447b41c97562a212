"""What both FastAPI applications, `fastapi_async` and `fastapi_sync`, are made of.

Each is chatd's turn as one would write it in an afternoon with FastAPI, uvicorn and supabase-py. They
are what chatd is compared with, on the same tables and the same PostgREST: they check the key and the
session, load the history, ask the model through httpx and store both messages. They do so in four
requests to PostgREST, the least that supabase-py needs, and leave out what chatd does beyond that:
idempotency, one turn at a time, budgets, limits, what happens when something fails. They run in
.venv-bench, as `uvicorn bench.fastapi_sync:app`, and take their settings from the environment.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from typing import Any, Literal
from uuid import UUID

from fastapi import HTTPException
from pydantic import BaseModel, Field

HISTORY = 20
"""Messages of history that the model is given."""
MODEL_URL = os.environ["MODEL_URL"]
SUPABASE = (os.environ["SUPABASE_URL"], os.environ["SUPABASE_KEY"])
MODEL_SECONDS = 60
"""How long the model may take."""
COMPLETIONS = "/v1/chat/completions"
EVENT_STREAM = "text/event-stream"
DONE = "data: [DONE]\n\n"


class ChatMessage(BaseModel):
    """One thing said."""

    role: Literal["user", "assistant"]
    content: str = Field(min_length=1)


class ChatRequest(BaseModel):
    """The body of a turn."""

    api_key: str
    session_id: UUID
    type: str = Field(min_length=1, max_length=255)
    assistant_id: UUID
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False


class ChatAnswer(BaseModel):
    """What is answered."""

    response: str
    model: str
    finish_reason: str | None


def use_postgrest(client: Any) -> Any:
    """The client, asking PostgREST itself: Supabase's gateway, which is not here, has it under /rest/v1."""
    client.rest_url = SUPABASE[0]
    return client


def chatbot_query(client: Any, request: ChatRequest) -> Any:
    """Asks for the chatbot's row."""
    return client.table("chatbots").select("*").eq("id", str(request.assistant_id))


def session_query(client: Any, request: ChatRequest) -> Any:
    """Asks whether the session is the chatbot's."""
    sessions = client.table("sessions").select("session_id")
    return sessions.eq("session_id", str(request.session_id)).eq(
        "chatbot_id", str(request.assistant_id)
    )


def history_query(client: Any, request: ChatRequest) -> Any:
    """Asks for the last messages, the newest first."""
    messages = client.table("conversations").select("role, content")
    return messages.eq("session_id", str(request.session_id)).order("id", desc=True).limit(HISTORY)


def storing_query(client: Any, request: ChatRequest, reply: str) -> Any:
    """Stores what was said and the reply."""
    session = str(request.session_id)
    said = {"session_id": session, "role": "user", "content": request.messages[-1].content}
    answer = {"session_id": session, "role": "assistant", "content": reply}
    return client.table("conversations").insert([said, answer])


def checked_chatbot(rows: list[dict[str, Any]], request: ChatRequest) -> dict[str, Any]:
    """The chatbot's row, when the key is its own."""
    hashed = "sha256:" + hashlib.sha256(request.api_key.encode()).hexdigest()
    if not rows or not hmac.compare_digest(rows[0]["api_key"], hashed):
        raise HTTPException(401, "The API key is not this chatbot's.")
    return rows[0]


def check_session(rows: list[dict[str, Any]]) -> None:
    """Refuses a session that is not there."""
    if not rows:
        raise HTTPException(404, "There is no such session.")


def completion_body(
    bot: dict[str, Any], history: list[dict[str, str]], request: ChatRequest
) -> dict[str, Any]:
    """What the model is asked: the system prompt, the history and what is newly said."""
    system = {"role": "system", "content": bot["settings"].get("system_prompt") or ""}
    said = request.messages[-1].model_dump()
    messages = [system, *reversed(history), said]
    return {"model": bot["model_name"], "messages": messages, "stream": request.stream}


def chat_answer(completion: dict[str, Any]) -> ChatAnswer:
    """The model's answer as a client gets it."""
    choice = completion["choices"][0]
    return ChatAnswer(
        response=choice["message"]["content"],
        model=completion["model"],
        finish_reason=choice["finish_reason"],
    )


def text_of(line: str) -> str:
    """The text in a line of the model's stream, mostly a token."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return ""
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return (choices and choices[0]["delta"].get("content")) or ""


def event(text: str) -> str:
    """A server-sent event."""
    return f"data: {json.dumps({'type': 'text-delta', 'delta': text})}\n\n"
