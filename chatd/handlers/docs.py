"""Docs: the OpenAPI document, and a page to try the endpoints. All its assets are served here."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from chatd.errors import NotFound
from chatd.handlers.base import ApiHandler, Operation, Route

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript"}
_ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "page.css")


@cache
def _asset(name: str) -> tuple[bytes, str, str]:
    """The bytes of a static file, its media type and its entity tag."""
    data = resources.files("chatd").joinpath("static", "docs", name).read_bytes()
    kind = _TYPES[name.rpartition(".")[2]]
    return data, f"{kind}; charset=utf-8", f'"{hashlib.sha256(data).hexdigest()[:32]}"'


class _FileHandler(ApiHandler):
    def send_file(self, name: str) -> None:
        """Answers with a static file, or 304 when the client has it."""
        data, kind, etag = _asset(name)
        self.set_header("Content-Type", kind)
        self.set_header("Cache-Control", "no-cache")
        self.set_header("Etag", etag)
        if self.check_etag_header():
            self.set_status(304)
            self.finish()
        else:
            self.finish(data)


class DocsHandler(_FileHandler):
    """`GET /docs`."""

    def get(self) -> None:
        self.set_header("Content-Security-Policy", _CONTENT_SECURITY_POLICY)
        self.set_header("Referrer-Policy", "no-referrer")
        self.send_file("index.html")


class AssetHandler(_FileHandler):
    """`GET /docs/assets/…`."""

    def get(self, name: str) -> None:
        if name not in _ASSETS:
            raise NotFound
        self.send_file(name)


class OpenApiHandler(ApiHandler):
    """`GET /openapi.json`."""

    def get(self) -> None:
        self.answer(self.arguments["document"]())


class RootHandler(ApiHandler):
    """`GET /` leads to the docs."""

    def get(self) -> None:
        self.redirect("/docs")


_PAGE = Operation(summary="Interactive documentation", auth="none")

ROUTES = [
    Route("/", RootHandler, {"GET": _PAGE}),
    Route("/docs", DocsHandler, {"GET": _PAGE}),
    Route("/docs/assets/{name}", AssetHandler, {"GET": _PAGE}),
]


def openapi_route(document: object) -> Route:
    """The route of the OpenAPI document, which `document()` returns."""
    return Route(
        "/openapi.json",
        OpenApiHandler,
        {"GET": Operation(summary="This document", auth="none", response="openapi")},
        arguments={"document": document},
    )
