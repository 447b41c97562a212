"""Everything that can go wrong, by what the client is told.

ChatdError
├── ConfigError              the configuration has faults: all of them, each with its line
├── PluginError              a plugin cannot be loaded or misbehaves, by name
├── ConflictError            an id or an API key is taken already
├── ProviderError            one provider failed at one attempt (never leaves `turns.py`)
└── RequestError             ends a request; `code` is what the client reads
    ├── MalformedRequest     ├── InvalidRequest      ├── InvalidApiKey
    ├── SessionRequired      ├── NotFound            ├── OriginNotAllowed
    ├── IdentityRequired     ├── TurnRefused
    ├── TurnInProgress       ├── IdempotencyKeyReused
    ├── RateLimited          ├── BudgetExhausted     ├── ProviderFailed
    ├── ProviderTimeout      ├── StorageUnavailable  ├── Overloaded
    └── ShuttingDown
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class ChatdError(Exception):
    """The root of chatd's own errors."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a document: where (a JSON Pointer, RFC 6901) and what."""

    pointer: str
    message: str


class ConfigError(ChatdError):
    """The configuration cannot be used. `faults` are sentences, each with file and line."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class PluginError(ChatdError):
    """A plugin cannot be used; the text names it and says what to do."""


class ConflictError(ChatdError):
    """Storage already has a chatbot with this id or this API key."""


class ProviderErrorKind(StrEnum):
    """Why a provider did not answer."""

    AUTHENTICATION = "authentication"  # key missing, wrong or dead
    CREDIT = "credit"  # the account is out of money
    MODERATION = "moderation"  # refused for what was said
    RATE_LIMIT = "rate_limit"
    OVERLOADED = "overloaded"  # 5xx, 529: theirs to mend
    INVALID_REQUEST = "invalid_request"  # the same request would fail again
    CONTEXT_LENGTH = "context_length"  # the conversation is too long for the model
    CONNECTION = "connection"  # no answer at all: DNS, refused, reset
    TIMEOUT = "timeout"
    EMPTY = "empty"  # an answer without a word in it
    INCOMPLETE = "incomplete"  # ended without saying that it had
    PROTOCOL = "protocol"  # not what the wire format allows


_RETRYABLE = {
    ProviderErrorKind.RATE_LIMIT,
    ProviderErrorKind.OVERLOADED,
    ProviderErrorKind.CONNECTION,
    ProviderErrorKind.TIMEOUT,
    ProviderErrorKind.EMPTY,
    ProviderErrorKind.INCOMPLETE,
    ProviderErrorKind.PROTOCOL,
}


class ProviderError(ChatdError):
    """One attempt at one provider failed.

    :param kind: why.
    :param detail: for the operator's log; may quote the provider, never a key.
    :param status: the HTTP status, if there was one.
    :param retry_after: seconds the provider asked to wait, if it did.
    :param retryable: whether the same request may succeed at the same provider later;
        by default it follows from `kind`.
    :param reached_model: whether a model may have worked on it, so that it may be billed.
    """

    def __init__(
        self,
        kind: ProviderErrorKind,
        detail: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        retryable: bool | None = None,
        reached_model: bool = False,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.status = status
        self.retry_after = retry_after
        self.retryable = kind in _RETRYABLE if retryable is None else retryable
        self.reached_model = reached_model


PROCESS_LOST = "process_lost"
"""What storage gives as the error code of a turn whose process ended without it."""


class RequestError(ChatdError):
    """A request that ends without what it asked for.

    `code` is API.md's word for it, `detail` a sentence that says what to do; neither holds a
    secret, an upstream body or what a visitor wrote.
    """

    code = "internal_error"
    default_detail = "Something went wrong in the server. It has been logged with this request id."

    def __init__(
        self,
        detail: str | None = None,
        *,
        retry_after: float | None = None,
        errors: Sequence[Fault] = (),
        turn_id: str | None = None,
    ) -> None:
        super().__init__(detail or self.default_detail)
        self.detail = detail or self.default_detail
        self.retry_after = retry_after
        self.errors = tuple(errors)
        self.turn_id = turn_id


class MalformedRequest(RequestError):
    """The bytes are not a JSON document that can be read in one way only."""

    code = "malformed_request"
    default_detail = "The body is not valid JSON."


class InvalidRequest(RequestError):
    """JSON that does not fit its schema, with every fault."""

    code = "invalid_request"
    default_detail = "The body does not fit this endpoint's schema; `errors` names each fault."


class InvalidApiKey(RequestError):
    """No key, a wrong one, or another chatbot's: told alike, so that ids cannot be tried out."""

    code = "invalid_api_key"
    default_detail = (
        "The API key is missing, wrong, or not this assistant's. Send it as `api_key` in the "
        "body, as `Authorization: Bearer …` or as `X-API-Key`."
    )


class SessionRequired(RequestError):
    """A widget's request that names no session."""

    code = "session_required"
    default_detail = "Send the id of the widget's session as `Authorization: Bearer …`."


class NotFound(RequestError):
    """Unknown, or somebody else's: told alike."""

    code = "not_found"
    default_detail = "There is nothing here. Check the path and the ids in the request."


class OriginNotAllowed(RequestError):
    """A page of this origin may not talk to this chatbot."""

    code = "origin_not_allowed"
    default_detail = (
        "Pages of this origin may not talk to this chatbot. Its operator can add the origin "
        "to the chatbot's allowed origins."
    )


class IdentityRequired(RequestError):
    """This chatbot's visitors are known by a token, and there is none that is good."""

    code = "identity_required"
    default_detail = (
        "This chatbot talks to visitors who are known: send the user_token that the server of the "
        "site signed for this visitor."
    )


class TurnRefused(RequestError):
    """A plugin declined the turn; its `detail` is shown to the client."""

    code = "turn_refused"
    default_detail = "This message was declined."


class TurnInProgress(RequestError):
    """The session already has a running turn, `turn_id`."""

    code = "turn_in_progress"
    default_detail = "A turn is running in this session. Wait for its end, then send again."


class IdempotencyKeyReused(RequestError):
    """The key was used with another body."""

    code = "idempotency_key_reused"
    default_detail = "This Idempotency-Key was used with another body. Use a new key."


class RateLimited(RequestError):
    """Too much in too short a time, here or at every provider."""

    code = "rate_limited"
    default_detail = "Too many requests just now. Wait as long as Retry-After says."


class BudgetExhausted(RequestError):
    """The chatbot has cost what it may cost in a day."""

    code = "budget_exhausted"
    default_detail = (
        "This chatbot has no more answers for today. It goes on at midnight UTC, "
        "or when its operator raises its budget."
    )


class ProviderFailed(RequestError):
    """Every provider in the chain failed."""

    code = "provider_failed"
    default_detail = "No model provider could answer. Try again in a moment."


class ProviderTimeout(RequestError):
    """No answer in time."""

    code = "provider_timeout"
    default_detail = "The model provider did not answer in time. Try again in a moment."


class StorageUnavailable(RequestError):
    """Storage cannot be asked just now.

    :param detail: for the operator's log. The client always reads `client_detail`.
    """

    code = "storage_unavailable"
    default_detail = "storage does not answer"
    client_detail = "Conversations cannot be read or stored just now. Try again in a moment."

    def __init__(self, detail: str | None = None, *, retry_after: float | None = 2) -> None:
        super().__init__(detail, retry_after=retry_after)


class Overloaded(RequestError):
    """The model providers ask to be left alone for a while."""

    code = "overloaded"
    default_detail = "The model provider is overloaded. Wait as long as Retry-After says."


class ShuttingDown(RequestError):
    """This process takes no new turns, or ended with turns running."""

    code = "shutting_down"
    default_detail = "The server is restarting. Try again in a moment."

    def __init__(self, detail: str | None = None, *, retry_after: float | None = 1) -> None:
        super().__init__(detail, retry_after=retry_after)


def error_of(code: str) -> RequestError:
    """The error that a code stands for, as it is stored with a turn."""
    if code == PROCESS_LOST:
        return ShuttingDown()
    kinds: list[type[RequestError]] = [RequestError, *RequestError.__subclasses__()]
    return next((kind() for kind in kinds if kind.code == code), RequestError())
