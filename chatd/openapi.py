"""The OpenAPI 3.1 document, built from the routes and the schemas that validate requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from chatd.errors import (
    InvalidRequest,
    MalformedRequest,
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
_WITH_BODY = (NotAcceptable, UnsupportedMediaType, InvalidRequest)
_REQUEST_ID = {
    "X-Request-Id": {
        "description": "The request's id, the caller's own if it sent one.",
        "schema": {"type": "string"},
    }
}
_INTERNAL = {"$schema", "x-error"}


def build(routes: Iterable[Route], version: str) -> dict[str, Any]:
    """The document for `routes`; those without a response schema are pages and left out."""
    used: set[str] = {"problem"}
    paths: dict[str, Any] = {}
    for route in routes:
        for method, operation in route.operations.items():
            if operation.response not in (None, "openapi"):
                used.update(n for n in (operation.request, operation.response) if n)
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
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _operation(route: Route, method: str, operation: Operation) -> dict[str, Any]:
    errors = [*_EVERYWHERE, *(_WITH_BODY if operation.request else ()), *operation.errors]
    entry: dict[str, Any] = {
        "operationId": f"{method.lower()}{route.path.title().replace('/', '')}",
        "summary": operation.summary,
        "responses": {"200": _success(operation), **_problems(errors)},
    }
    if operation.description:
        entry["description"] = operation.description
    if route.tag:
        entry["tags"] = [route.tag]
    if operation.auth == "api_key":
        # The third way is `api_key` in the body, so none of these is required.
        entry["security"] = [{}, {"bearer": []}, {"header": []}]
    if operation.request:
        entry["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(operation.request)}},
        }
    return entry


def _success(operation: Operation) -> dict[str, Any]:
    assert operation.response is not None
    return {
        "description": "Done.",
        "headers": _REQUEST_ID,
        "content": {"application/json": {"schema": _reference(operation.response)}},
    }


def _problems(errors: Iterable[type[RequestError]]) -> dict[str, Any]:
    by_status: dict[int, list[type[RequestError]]] = {}
    for error in errors:
        by_status.setdefault(PROBLEMS[error].status, []).append(error)
    return {
        str(status): {
            "description": f"{HTTPStatus(status).phrase}: "
            + ", ".join(f"`{kind.code}`" for kind in kinds),
            "headers": _REQUEST_ID,
            "content": {"application/problem+json": {"schema": _reference("problem")}},
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
