"""FastAPI with `async def` and supabase-py's AsyncClient; see `fastapi_turn`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from supabase import acreate_client

from bench import fastapi_turn as turn
from bench.fastapi_turn import ChatAnswer, ChatRequest


@asynccontextmanager
async def clients(app: FastAPI) -> AsyncIterator[None]:
    """One client for PostgREST and one for the model, for as long as the server runs."""
    app.state.supabase = turn.use_postgrest(await acreate_client(*turn.SUPABASE))
    async with httpx.AsyncClient(base_url=turn.MODEL_URL, timeout=turn.MODEL_SECONDS) as http:
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
    client = app.state.supabase
    found = await turn.chatbot_query(client, request).execute()
    bot = turn.checked_chatbot(found.data, request)
    turn.check_session((await turn.session_query(client, request).execute()).data)
    history = (await turn.history_query(client, request).execute()).data
    body = turn.completion_body(bot, history, request)
    if request.stream:
        return StreamingResponse(events(request, body), media_type=turn.EVENT_STREAM)
    completion = await app.state.http.post(turn.COMPLETIONS, json=body)
    completion.raise_for_status()
    answer = turn.chat_answer(completion.json())
    await turn.storing_query(client, request, answer.response).execute()
    return answer


async def events(request: ChatRequest, body: dict[str, Any]) -> AsyncIterator[str]:
    """The reply as server-sent events, stored at its end."""
    reply = ""
    async with app.state.http.stream("POST", turn.COMPLETIONS, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if text := turn.text_of(line):
                reply += text
                yield turn.event(text)
    await turn.storing_query(app.state.supabase, request, reply).execute()
    yield turn.DONE
