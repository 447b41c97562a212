"""The contract of an interceptor: a plugin's code around a turn."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from chatd.domain import Chatbot, Message
from chatd.provider import Event


@dataclass(frozen=True, slots=True)
class TurnContext:
    """A turn as the model is about to be asked. Make a changed one with `dataclasses.replace`.

    `messages` holds system prompt, history and the new messages, oldest first.
    """

    turn_id: str
    session_id: str
    chatbot: Chatbot
    messages: Sequence[Message]


Proceed = Callable[[TurnContext], AsyncGenerator[Event, None]]


class Interceptor(Protocol):
    """Adds context, refuses, redacts or observes."""

    def around(self, turn: TurnContext, proceed: Proceed) -> AsyncGenerator[Event, None]:
        """An async generator that answers the turn, usually by passing on the events of `proceed(turn)`.

        Change `turn` to change what the model is given; change the events to change what is
        shown and stored; raise `TurnRefused` to decline; leave `proceed` alone to answer
        without a model. Other exceptions fail the turn, with the plugin's name in the log.
        """

    async def close(self) -> None:
        """Lets go of everything. Called once, last."""
