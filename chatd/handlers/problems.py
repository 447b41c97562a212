"""Errors as HTTP tells them: problem details (RFC 9457), one status for each code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from chatd import errors
from chatd.errors import RequestError, StorageUnavailable


class MethodNotAllowed(RequestError):
    """The path is known, the method is not for it."""

    code = "method_not_allowed"
    default_detail = "This method is not for this path; the Allow header names those that are."


class NotAcceptable(RequestError):
    """The client takes nothing that this endpoint gives."""

    code = "not_acceptable"
    default_detail = "The Accept header rules out what this endpoint answers."


class UnsupportedMediaType(RequestError):
    """The body is not said to be JSON in UTF-8."""

    code = "unsupported_media_type"
    default_detail = "Send the body as Content-Type: application/json, in UTF-8, not compressed."


class BodyTooLarge(RequestError):
    """The body is over the limit."""

    code = "body_too_large"
    default_detail = "The body is too large."


class HeadersTooLarge(RequestError):
    """The headers are over the limit."""

    code = "headers_too_large"
    default_detail = "The headers are too large or too many."


class TooManyConnections(RequestError):
    """The server has as many connections as it takes."""

    code = "overloaded"
    default_detail = "The server has as many connections as it takes. Come back a little later."


@dataclass(frozen=True, slots=True)
class Problem:
    """What HTTP says of a code."""

    status: int
    title: str


PROBLEMS: dict[type[RequestError], Problem] = {
    errors.MalformedRequest: Problem(400, "The request cannot be read"),
    errors.InvalidApiKey: Problem(401, "The API key is not valid"),
    errors.SessionRequired: Problem(401, "The session is missing"),
    errors.OriginNotAllowed: Problem(403, "The origin is not allowed"),
    errors.IdentityRequired: Problem(403, "The visitor is not known"),
    errors.TurnRefused: Problem(403, "The message was declined"),
    errors.NotFound: Problem(404, "Not found"),
    MethodNotAllowed: Problem(405, "The method is not allowed"),
    NotAcceptable: Problem(406, "Not acceptable"),
    errors.TurnInProgress: Problem(409, "A turn is running"),
    BodyTooLarge: Problem(413, "The body is too large"),
    UnsupportedMediaType: Problem(415, "The media type is not supported"),
    errors.InvalidRequest: Problem(422, "The request is not valid"),
    errors.IdempotencyKeyReused: Problem(422, "The idempotency key was used before"),
    errors.RateLimited: Problem(429, "Too many requests"),
    errors.BudgetExhausted: Problem(429, "The budget is used up"),
    HeadersTooLarge: Problem(431, "The headers are too large"),
    RequestError: Problem(500, "Internal error"),
    errors.ProviderFailed: Problem(502, "The model provider failed"),
    StorageUnavailable: Problem(503, "Storage is unavailable"),
    errors.Overloaded: Problem(503, "The model provider is overloaded"),
    TooManyConnections: Problem(503, "Too many connections"),
    errors.ShuttingDown: Problem(503, "The server is shutting down"),
    errors.ProviderTimeout: Problem(504, "The model provider took too long"),
}
"""Every error that a client can see. A test holds that none is missing."""


def problem_of(error: RequestError) -> Problem:
    """The entry for an error, or for the nearest class above it."""
    return next(PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS)


def problem_body(error: RequestError, request_id: str) -> dict[str, Any]:
    """The body of an error's response."""
    problem = problem_of(error)
    storage = isinstance(error, StorageUnavailable)
    body: dict[str, Any] = {
        "type": f"urn:chatd:problem:{error.code}",
        "title": problem.title,
        "status": problem.status,
        "detail": StorageUnavailable.client_detail if storage else error.detail,
        "code": error.code,
        "request_id": request_id,
    }
    if error.errors:
        body["errors"] = [{"pointer": f.pointer, "message": f.message} for f in error.errors]
    if error.turn_id:
        body["turn_id"] = error.turn_id
    return body


def retry_after(error: RequestError) -> str | None:
    """The Retry-After header, in whole seconds."""
    return None if error.retry_after is None else str(max(1, math.ceil(error.retry_after)))
