"""A chatbot and sessions with a history, put into a storage as chatd itself writes them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from bench.wording import (
    BOT,
    HISTORY,
    KEY,
    MODEL,
    QUESTION,
    REPLY,
    SESSIONS,
    SYSTEM_PROMPT,
    context_tokens,
)
from chatd.domain import (
    Chatbot,
    ChatbotSettings,
    Message,
    Session,
    TurnStatus,
    Usage,
    hash_api_key,
    new_id,
)
from chatd.storage import BeginTurn, FinishTurn, Storage


@dataclass(frozen=True)
class Seeds:
    """What there is to talk to.

    :param history: messages in each session, and how many of them fit the chatbot's budget.
    """

    bot: str = BOT
    history: int = HISTORY
    sessions: int = SESSIONS


DEFAULT = Seeds()


async def add_chatbot(storage: Storage, seeds: Seeds, key: str = KEY) -> None:
    """Stores the chatbot, whose budget holds the history and no more."""
    settings = ChatbotSettings(
        system_prompt=SYSTEM_PROMPT, context_tokens=context_tokens(seeds.history)
    )
    hashed = hash_api_key(key)
    await storage.add_chatbot(Chatbot(seeds.bot, "Bench", MODEL, hashed, settings))


async def add_sessions(storage: Storage, seeds: Seeds) -> list[str]:
    """The ids of new sessions, in each of which so much was said."""
    sessions = [Session(new_id(), seeds.bot, "api") for _ in range(seeds.sessions)]
    await asyncio.gather(*(_talk(storage, session, seeds.history) for session in sessions))
    return [session.id for session in sessions]


async def _talk(storage: Storage, session: Session, messages: int) -> None:
    await storage.create_session(session)
    for _ in range(messages // 2):
        turn = new_id()
        said = [Message("user", QUESTION)]
        await storage.begin_turn(BeginTurn(turn, session.id, session.chatbot_id, said, 0, 60))
        await storage.finish_turn(
            FinishTurn(turn, TurnStatus.COMPLETED, REPLY, usage=Usage(cost_usd=0))
        )
