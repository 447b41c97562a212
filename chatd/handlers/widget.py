"""The widget: its script for any page, and a page that shows it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from chatd.domain import canonical_id
from chatd.errors import NotFound, StorageUnavailable
from chatd.handlers.base import ApiHandler, Operation, Route

NEWEST_SECONDS = 300
"""How long a browser may keep `/widget.js` before it asks whether there is a newer one."""

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript"}
_DEMO_ASSETS = ("demo.css", "demo.js")


@dataclass(frozen=True, slots=True)
class _File:
    """A static file as it is sent, with what says which one it is."""

    data: bytes
    packed: bytes
    kind: str
    digest: str
    """The SHA-256 of the data, in hexadecimal."""

    @classmethod
    def of(cls, name: str, data: bytes) -> _File:
        kind = f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"
        packed = gzip.compress(data, 9, mtime=0)
        return cls(data, packed, kind, hashlib.sha256(data).hexdigest())


@cache
def _file(name: str) -> _File:
    data = resources.files("chatd").joinpath("static", "widget", name).read_bytes()
    return _File.of(name, data)


def script_path() -> str:
    """The path of this very script, whose content never changes: `/widget/<hash>.js`."""
    return f"/widget/{_file('widget.js').digest[:32]}.js"


def script_integrity() -> str:
    """The script's hash as a page's `integrity` has it (W3C Subresource Integrity, 3.1)."""
    digest = hashlib.sha384(_file("widget.js").data).digest()
    return f"sha384-{base64.b64encode(digest).decode()}"


class _StaticHandler(ApiHandler):
    def send_file(self, file: _File, *, cache: str) -> None:
        """Answers with a file, compressed where that is taken; 304 when the client has it."""
        self.set_header("Content-Type", file.kind)
        self.set_header("Cache-Control", cache)
        self.set_header("Vary", "Accept-Encoding, Origin")
        packed = "gzip" in self.given_headers.get("accept-encoding", "")
        self.set_header("Etag", f'"{file.digest[:32]}{"-gz" if packed else ""}"')
        if self.check_etag_header():
            self.set_status(304)
            self.finish()
            return
        if packed:
            self.set_header("Content-Encoding", "gzip")
        self.finish(file.packed if packed else file.data)

    def allow_every_page(self) -> None:
        """Lets pages of every origin load it, also with `integrity`, which needs CORS."""
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Cross-Origin-Resource-Policy", "cross-origin")


class ScriptHandler(_StaticHandler):
    """`GET /widget.js`: the newest script."""

    def get(self) -> None:
        self.allow_every_page()
        self.send_file(_file("widget.js"), cache=f"public, max-age={NEWEST_SECONDS}")


class PinnedScriptHandler(_StaticHandler):
    """`GET /widget/{name}`: one script for ever, for pages that name its hash."""

    def get(self, name: str) -> None:
        if f"/widget/{name}" != script_path():
            raise NotFound("This server has another version of the widget; /widget.js is it.")
        self.allow_every_page()
        self.send_file(_file("widget.js"), cache="public, max-age=31536000, immutable")


class DemoHandler(_StaticHandler):
    """`GET /demo/{chatbot_id}`: the widget on a page, and the line that puts it on another."""

    async def get(self, chatbot_id: str) -> None:
        chatbot = await self.services.access.chatbot(canonical_id(chatbot_id) or "")
        server = self.services.config.public_url or f"{self.request.protocol}://{self.request.host}"
        server = server.rstrip("/")
        line = f'<script async src="{server}/widget.js" data-chatbot-id="{chatbot.id}"></script>'
        pinned = (
            f'<script async src="{server}{script_path()}"\n'
            f'  integrity="{script_integrity()}"\n'
            f'  crossorigin="anonymous" data-chatbot-id="{chatbot.id}"></script>'
        )
        shown = {
            "name": chatbot.name,
            "chatbot_id": chatbot.id,
            "line": line,
            "pinned": pinned,
            "csp": f"script-src {server}; connect-src {server}",
        }
        page = re.sub(
            r"\{\{(\w+)\}\}",
            lambda found: html.escape(shown[found[1]]),
            _file("demo.html").data.decode(),
        )
        self.set_header("Content-Security-Policy", _CONTENT_SECURITY_POLICY)
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_file(_File.of("demo.html", page.encode()), cache="no-store")


class DemoAssetHandler(_StaticHandler):
    """`GET /demo/assets/{name}`."""

    def get(self, name: str) -> None:
        if name not in _DEMO_ASSETS:
            raise NotFound
        self.send_file(_file(name), cache="no-cache")


_SCRIPT = Operation(summary="The widget's script", auth="none")
_PAGE = Operation(summary="A page that shows the widget", auth="none")

ROUTES = [
    Route("/widget.js", ScriptHandler, {"GET": _SCRIPT}),
    Route("/widget/{name}", PinnedScriptHandler, {"GET": _SCRIPT}),
    Route(
        "/demo/{chatbot_id}",
        DemoHandler,
        {
            "GET": Operation(
                summary=_PAGE.summary, auth="none", errors=(NotFound, StorageUnavailable)
            )
        },
    ),
    Route("/demo/assets/{name}", DemoAssetHandler, {"GET": _PAGE}),
]
