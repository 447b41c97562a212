"""What a widget needs to draw itself."""

from __future__ import annotations

from chatd.domain import canonical_id
from chatd.errors import NotFound, OriginNotAllowed, StorageUnavailable
from chatd.handlers.base import ApiHandler, Operation, Route

MAX_AGE_SECONDS = 60
"""How long a browser may keep it: each page of a site asks, and what is set rarely changes."""


class WidgetBotHandler(ApiHandler):
    """`GET /api/chat/widget/bot/{chatbot_id}`. The model and the prompt are not a page's to know."""

    async def get(self, chatbot_id: str) -> None:
        chatbot = await self.services.access.chatbot(canonical_id(chatbot_id) or "")
        self.serve_chatbot(chatbot, check_origin=True)
        settings = chatbot.settings
        self.set_header("Cache-Control", f"max-age={MAX_AGE_SECONDS}")
        self.answer(
            {
                "chatbot_id": chatbot.id,
                "name": chatbot.name,
                "greeting": settings.greeting,
                "suggestions": settings.suggestions,
                "theme": {"mode": settings.theme, "accent": settings.accent},
                "language": settings.language,
                "require_identity": settings.require_identity,
            }
        )


ROUTES = [
    Route(
        "/api/chat/widget/bot/{chatbot_id}",
        WidgetBotHandler,
        {
            "GET": Operation(
                summary="What a widget needs to draw itself",
                description="The chatbot's name, and what its operator set for the widget; `null` "
                "where the widget may choose.",
                auth="none",
                response="widget_bot",
                errors=(OriginNotAllowed, NotFound, StorageUnavailable),
            )
        },
        tag="Widget",
    ),
]
