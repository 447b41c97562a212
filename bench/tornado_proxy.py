"""The limit: a bare Tornado handler that hands a request on to the mock and the answer back.

It checks nothing, stores nothing and knows nothing of chats, so that what it takes is what any chat
back end on Tornado and aiohttp takes at least. `python -m bench.tornado_proxy PORT URL`.
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
from tornado.web import Application, RequestHandler

JSON = {"Content-Type": "application/json"}


class Health(RequestHandler):
    """Says that it runs."""

    def get(self) -> None:
        self.finish({"status": "ok"})


class Proxy(RequestHandler):
    """Hands on what was posted."""

    def initialize(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url, self.http = url, http

    async def post(self) -> None:
        async with self.http.post(self.url, data=self.request.body, headers=JSON) as answer:
            self.set_header("Content-Type", answer.headers["Content-Type"])
            if "Content-Length" in answer.headers:
                self.write(await answer.read())
                return
            async for part in answer.content.iter_any():
                self.write(part)
                await self.flush()


async def serve(port: int, url: str) -> None:
    """Serves until the process is ended."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        proxy = ("/api/chat", Proxy, {"url": url, "http": http})
        Application([proxy, ("/health", Health)]).listen(port, "127.0.0.1")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))
