"""Pages of another origin for a real browser, and a connection that can break on the way to chatd."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Response,
    sync_playwright,
)

CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, closed afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=CHROMIUM_ARGUMENTS, timeout=60_000
        )
        yield browser
        browser.close()


class Site:
    """A web site of an origin of its own, with pages by path."""

    def __init__(self) -> None:
        pages: dict[str, tuple[str, bytes, dict[str, str]]] = {}
        self.pages = pages
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked.append(self.path)
                kind, data, headers = pages.get(self.path, ("text/plain", b"not here", {}))
                self.send_response(200 if self.path in pages else 404)
                for name, value in {"Content-Type": f"{kind}; charset=utf-8", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def put(self, path: str, html: str, csp: str | None = None) -> str:
        """Serves a page, and gives its address."""
        headers = {} if csp is None else {"Content-Security-Policy": csp}
        self.pages[path] = ("text/html", html.encode(), headers)
        return self.url + path

    def put_script(self, path: str, script: Path) -> str:
        """Serves a script, and gives its address."""
        self.pages[path] = ("text/javascript", script.read_bytes(), {})
        return self.url + path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Wire:
    """A TCP connection to chatd that can be cut, and answer in chatd's place as a proxy does."""

    def __init__(self, url: str) -> None:
        self._target = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._muted: set[socket.socket] = set()
        self.is_down = False
        self.refusals: list[bytes] = []
        """Whole answers for the next messages, which then do not reach chatd."""
        self.deaf = 0
        """How many of the next messages reach chatd while their answers do not come back."""
        self.said = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection now."""
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_down:
                client.close()
                continue
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            client,
            socket.create_connection(self._target) as server,
        ):
            self._open |= {client, server}
            back = threading.Thread(target=self._back, args=(server, client), daemon=True)
            back.start()
            while data := client.recv(65536):
                if data.startswith(b"POST /api/chat/widget HTTP"):
                    self.said += 1
                    if self.refusals:
                        client.sendall(self.refusals.pop(0))
                        client.shutdown(socket.SHUT_WR)
                        while client.recv(65536):
                            pass
                        break
                    if self.deaf:
                        self.deaf -= 1
                        self._muted.add(client)
                server.sendall(data)
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            back.join()
            self._open -= {client, server}

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            # chatd begins to answer when the message is stored.
            while (data := server.recv(65536)) and client not in self._muted:
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


class Watched:
    """A page, and everything that it asked for or complained of."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.asked: list[str] = []
        self.failed: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("response", self._note_response)
        self.page.on("console", self._complain)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note_response(self, response: Response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")

    def _complain(self, message: ConsoleMessage) -> None:
        # A chatbot that is not described is no fault of the page's: it then has no greeting.
        undescribed = "/api/chat/widget/bot/" in message.location["url"]
        if message.type in ("error", "warning") and not undescribed:
            self.complaints.append(message.text)

    def elsewhere(self, *origins: str) -> list[str]:
        """What was asked of others than these origins."""
        urls = [url for url in self.asked if not url.startswith(("data:", "blob:"))]
        return [url for url in urls if not url.startswith(tuple(f"{o}/" for o in origins))]


@contextmanager
def watching(browser: Browser, **options: object) -> Iterator[Watched]:
    """A page in a browser context of its own: no storage is shared with another."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})  # type: ignore[arg-type]
    try:
        yield Watched(context)
    finally:
        context.close()
