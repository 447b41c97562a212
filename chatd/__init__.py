"""chatd: a chatbot back end. What stands here is what plugins may import, and all of it."""

from chatd.domain import (
    MESSAGE_OVERHEAD_CHARS,
    Chatbot,
    ChatbotSettings,
    Message,
    Session,
    StoredMessage,
    TurnStatus,
    Usage,
)
from chatd.errors import (
    ConflictError,
    Fault,
    IdempotencyKeyReused,
    NotFound,
    PluginError,
    ProviderError,
    ProviderErrorKind,
    StorageUnavailable,
    TurnInProgress,
    TurnRefused,
)
from chatd.handlers.base import ApiHandler as Handler
from chatd.hookspecs import hookimpl
from chatd.interceptor import Interceptor, Proceed, TurnContext
from chatd.offers import (
    InterceptorRegister,
    ProviderRegister,
    RouteRegister,
    StorageRegister,
)
from chatd.provider import (
    Event,
    Finish,
    FinishReason,
    Provider,
    ProviderRequest,
    ReasoningDelta,
    TextDelta,
    Timeouts,
    UsageReport,
)
from chatd.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder
from chatd.storage import (
    BeginTurn,
    BegunTurn,
    ExistingTurn,
    FinishTurn,
    MessagePage,
    Rating,
    Storage,
    TurnRecord,
)

__version__ = "0.1.0"

__all__ = [
    "MAX_EVENT_BYTES",
    "MESSAGE_OVERHEAD_CHARS",
    "BeginTurn",
    "BegunTurn",
    "Chatbot",
    "ChatbotSettings",
    "ConflictError",
    "Event",
    "EventTooLarge",
    "ExistingTurn",
    "Fault",
    "Finish",
    "FinishReason",
    "FinishTurn",
    "Handler",
    "IdempotencyKeyReused",
    "Interceptor",
    "InterceptorRegister",
    "Message",
    "MessagePage",
    "NotFound",
    "PluginError",
    "Proceed",
    "Provider",
    "ProviderError",
    "ProviderErrorKind",
    "ProviderRegister",
    "ProviderRequest",
    "Rating",
    "ReasoningDelta",
    "RouteRegister",
    "SSEDecoder",
    "Session",
    "Storage",
    "StorageRegister",
    "StorageUnavailable",
    "StoredMessage",
    "TextDelta",
    "Timeouts",
    "TurnContext",
    "TurnInProgress",
    "TurnRecord",
    "TurnRefused",
    "TurnStatus",
    "Usage",
    "UsageReport",
    "__version__",
    "hookimpl",
]
