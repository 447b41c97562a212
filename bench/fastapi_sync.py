"""FastAPI with `def`, which it runs in threads, and supabase-py's Client; see `fastapi_turn`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from supabase import create_client

from bench import fastapi_turn as turn
from bench.fastapi_turn import ChatAnswer, ChatRequest

client = turn.use_postgrest(create_client(*turn.SUPABASE))
http = httpx.Client(base_url=turn.MODEL_URL, timeout=turn.MODEL_SECONDS)
app = FastAPI()


@app.get("/health")
def health() -> dict[str, str]:
    """Says that it runs."""
    return {"status": "ok"}


@app.post("/api/chat", response_model=ChatAnswer)
def chat(request: ChatRequest) -> ChatAnswer | StreamingResponse:
    """Runs a turn and stores it."""
    bot = turn.checked_chatbot(turn.chatbot_query(client, request).execute().data, request)
    turn.check_session(turn.session_query(client, request).execute().data)
    history = turn.history_query(client, request).execute().data
    body = turn.completion_body(bot, history, request)
    if request.stream:
        return StreamingResponse(events(request, body), media_type=turn.EVENT_STREAM)
    completion = http.post(turn.COMPLETIONS, json=body)
    completion.raise_for_status()
    answer = turn.chat_answer(completion.json())
    turn.storing_query(client, request, answer.response).execute()
    return answer


def events(request: ChatRequest, body: dict[str, Any]) -> Iterator[str]:
    """The reply as server-sent events, stored at its end."""
    reply = ""
    with http.stream("POST", turn.COMPLETIONS, json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if text := turn.text_of(line):
                reply += text
                yield turn.event(text)
    turn.storing_query(client, request, reply).execute()
    yield turn.DONE
