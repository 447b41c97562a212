"""The OpenAPI 3.1 document, built from the routes and the schemas that validate requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from chatd.errors import (
    InvalidRequest,
    MalformedRequest,
    RateLimited,
    RequestError,
)
from chatd.handlers.base import Operation, Route
from chatd.handlers.problems import (
    PROBLEMS,
    BodyTooLarge,
    HeadersTooLarge,
    NotAcceptable,
    UnsupportedMediaType,
)
from chatd.validation import schema

_EVERYWHERE = (MalformedRequest, BodyTooLarge, HeadersTooLarge, RequestError)
_WITH_BODY = (UnsupportedMediaType, InvalidRequest)
_REQUEST_ID = {
    "X-Request-Id": {
        "description": "The request's id, the caller's own if it sent one.",
        "schema": {"type": "string"},
    }
}
_QUOTA = {
    "RateLimit-Policy": {
        "description": "The limits that count this request: of each its name with its window, how "
        "many (`q`) and in how many seconds (`w`).",
        "schema": {"type": "string"},
    },
    "RateLimit": {
        "description": "The limit that is nearest: how many are left (`r`), and in how many seconds "
        "one comes back (`t`).",
        "schema": {"type": "string"},
    },
}
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}},
}
# One event: OpenAPI 3.1 has no word for it, and tools read the schema of a stream as this.
_EVENTS = {
    "type": "object",
    "description": "The AI SDK's UI message stream, version 1: `data:` lines with a JSON object whose "
    "`type` is `start`, `text-start`, `text-delta`, `text-end`, `finish`, `error` or `abort`, each "
    "with an `id:`; `data: [DONE]` is last. An `error` has the `code` of the plain answer.",
    "required": ["data"],
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "data": {"type": "string", "pattern": r"^(\{.*\}|\[DONE\])$"},
    },
}
_INTERNAL = {"$schema", "x-error"}


def build(routes: Iterable[Route], version: str) -> dict[str, Any]:
    """The document for `routes`; those without a response schema are pages and left out."""
    used: set[str] = set()
    paths: dict[str, Any] = {}
    for route in routes:
        for method, operation in route.operations.items():
            if operation.response != "openapi" and (
                operation.response or operation.events or operation.nothing
            ):
                names = (operation.request, operation.response, operation.problem)
                used.update(name for name in names if name)
                entry = _operation(route, method, operation)
                paths.setdefault(route.path, {})[method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chatd",
            "version": version,
            "description": "Chats for many chatbots. Errors are problem details (RFC 9457); "
            "switch on their `code`.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "REST", "description": "For clients that hold a chatbot's API key."},
            {"name": "Widget", "description": "For pages, which hold no key."},
            {"name": "Operation", "description": "For whoever runs the server."},
        ],
        "paths": paths,
        "components": {
            "schemas": {_title(name): _public(schema(name).document) for name in sorted(used)},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "The API key."},
                "session": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The id of a widget's session.",
                },
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _operation(route: Route, method: str, operation: Operation) -> dict[str, Any]:
    errors = [*_EVERYWHERE, *(_WITH_BODY if operation.request else ()), *operation.errors]
    if operation.response or operation.events:
        errors.append(NotAcceptable)
    entry: dict[str, Any] = {
        "operationId": f"{method.lower()}{route.path.title().replace('/', '')}",
        "summary": operation.summary,
        "responses": {**_successes(operation), **_problems(errors, operation.problem)},
    }
    if parameters := _parameters(route, operation):
        entry["parameters"] = parameters
    if operation.description:
        entry["description"] = operation.description
    if route.tag:
        entry["tags"] = [route.tag]
    if operation.auth == "api_key":
        # Where a body may have an `api_key` that is the third way, so none of these is required.
        third = operation.request and "api_key" in schema(operation.request).document["properties"]
        entry["security"] = [*([{}] if third else []), {"bearer": []}, {"header": []}]
    elif operation.auth == "widget":
        entry["security"] = [{"session": []}]
    if operation.request:
        entry["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(operation.request)}},
        }
    return entry


def _parameters(route: Route, operation: Operation) -> list[dict[str, Any]]:
    path = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "format": "uuid"},
        }
        for name in re.findall(r"{([a-z_]+)}", route.path)
    ]
    return path + [
        {
            "name": parameter.name,
            "in": parameter.place,
            "schema": dict(parameter.schema),
            "description": parameter.description,
        }
        for parameter in operation.parameters
    ]


def _successes(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.response is not None:
        content["application/json"] = {"schema": _reference(operation.response)}
    if operation.events:
        told = {"description": operation.events} if isinstance(operation.events, str) else {}
        content["text/event-stream"] = {"schema": {**_EVENTS, **told}}
    answers: dict[str, Any] = {}
    if content:
        headers = {**_REQUEST_ID, **(_QUOTA if RateLimited in operation.errors else {})}
        answers["200"] = {"description": "Done.", "headers": headers, "content": content}
    if operation.nothing is not None:
        answers["204"] = {"description": operation.nothing, "headers": _REQUEST_ID}
    return answers


def _problems(errors: Iterable[type[RequestError]], told: str) -> dict[str, Any]:
    kind = "application/problem+json" if told == "problem" else "application/json"
    by_status: dict[int, list[type[RequestError]]] = {}
    for error in errors:
        by_status.setdefault(PROBLEMS[error].status, []).append(error)
    return {
        str(status): {
            "description": f"{HTTPStatus(status).phrase}: "
            + ", ".join(f"`{kind.code}`" for kind in kinds),
            "headers": {**_REQUEST_ID, **({**_QUOTA, **_RETRY_AFTER} if status == 429 else {})},
            "content": {kind: {"schema": _reference(told)}},
        }
        for status, kinds in sorted(by_status.items())
    }


def _title(name: str) -> str:
    return str(schema(name).document["title"])


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{_title(name)}"}


def _public(value: Any) -> Any:
    """A schema without what only chatd reads."""
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items() if k not in _INTERNAL}
    return [_public(item) for item in value] if isinstance(value, list) else value
