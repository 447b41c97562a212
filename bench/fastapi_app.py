"""chatd's turn as one would write it in an afternoon with FastAPI, uvicorn and supabase-py.

It is what chatd is compared with, on the same tables and the same PostgREST: it checks the key and the
session, loads the history, asks the model through httpx and stores both messages. It does so in four
requests to PostgREST, the least that supabase-py needs, and it leaves out what chatd does beyond that:
idempotency, one turn at a time, budgets, limits, what happens when something fails. It runs in
.venv-bench, as `uvicorn bench.fastapi_app:app`, and takes its settings from the environment.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal
from uuid import UUID

import httpx
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from supabase import AsyncClient, acreate_client

HISTORY = 20
"""Messages of history that the model is given."""


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


@asynccontextmanager
async def clients(app: FastAPI) -> AsyncIterator[None]:
    """One client for PostgREST and one for the model, for as long as the server runs."""
    url = os.environ["SUPABASE_URL"]
    client = await acreate_client(url, os.environ["SUPABASE_KEY"])
    # Supabase's gateway has PostgREST under /rest/v1; here it is asked without one.
    client.rest_url = url
    app.state.supabase = client
    async with httpx.AsyncClient(base_url=os.environ["MODEL_URL"], timeout=60) as http:
        app.state.http = http
        yield


app = FastAPI(lifespan=clients)


@app.get("/health")
async def health() -> dict[str, str]:
    """Says that it runs."""
    return {"status": "ok"}


@app.post("/api/chat", response_model=ChatAnswer)
async def chat(request: ChatRequest) -> ChatAnswer | StreamingResponse:
    """Runs a turn and stores it."""
    client: AsyncClient = app.state.supabase
    bot = await chatbot(client, request)
    messages = await prompt(client, bot, request)
    if request.stream:
        return StreamingResponse(events(bot, request, messages), media_type="text/event-stream")
    answer = await app.state.http.post(
        "/v1/chat/completions", json={"model": bot["model_name"], "messages": messages}
    )
    answer.raise_for_status()
    completion = answer.json()
    choice = completion["choices"][0]
    reply = choice["message"]["content"]
    await store(client, request, reply)
    return ChatAnswer(
        response=reply, model=completion["model"], finish_reason=choice["finish_reason"]
    )


async def chatbot(client: AsyncClient, request: ChatRequest) -> dict[str, Any]:
    """The chatbot's row, when the key is its own."""
    found = await client.table("chatbots").select("*").eq("id", str(request.assistant_id)).execute()
    hashed = "sha256:" + hashlib.sha256(request.api_key.encode()).hexdigest()
    if not found.data or not hmac.compare_digest(found.data[0]["api_key"], hashed):
        raise HTTPException(401, "The API key is not this chatbot's.")
    return found.data[0]


async def prompt(
    client: AsyncClient, bot: dict[str, Any], request: ChatRequest
) -> list[dict[str, str]]:
    """The system prompt, the history and what is newly said."""
    session = str(request.session_id)
    found = (
        await client.table("sessions")
        .select("session_id")
        .eq("session_id", session)
        .eq("chatbot_id", bot["id"])
        .execute()
    )
    if not found.data:
        raise HTTPException(404, "There is no such session.")
    history = (
        await client.table("conversations")
        .select("role, content")
        .eq("session_id", session)
        .order("id", desc=True)
        .limit(HISTORY)
        .execute()
    )
    system = {"role": "system", "content": bot["settings"].get("system_prompt") or ""}
    return [system, *reversed(history.data), request.messages[-1].model_dump()]


async def store(client: AsyncClient, request: ChatRequest, reply: str) -> None:
    """Stores what was said and the reply."""
    session = str(request.session_id)
    said = {"session_id": session, "role": "user", "content": request.messages[-1].content}
    answer = {"session_id": session, "role": "assistant", "content": reply}
    await client.table("conversations").insert([said, answer]).execute()


async def events(
    bot: dict[str, Any], request: ChatRequest, messages: list[dict[str, str]]
) -> AsyncIterator[str]:
    """The reply as server-sent events, stored at its end."""
    body = {"model": bot["model_name"], "messages": messages, "stream": True}
    reply = ""
    async with app.state.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choices = json.loads(line.removeprefix("data: "))["choices"]
            if choices and (text := choices[0]["delta"].get("content")):
                reply += text
                yield f"data: {json.dumps({'type': 'text-delta', 'delta': text})}\n\n"
    await store(app.state.supabase, request, reply)
    yield "data: [DONE]\n\n"
