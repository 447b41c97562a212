"""A model that takes no time: OpenAI's chat completions, answered with bytes made beforehand.

`python -m bench.mock` prints its port and serves until it is ended. It reads of a request only where
it ends and whether a stream is asked for, straight from epoll, so that one core answers tens of
thousands of requests a second.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from bench.wording import FIRST_TOKEN, MODEL, NEXT_TOKEN, PROMPT_TOKENS, REPLY

LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
STREAM = re.compile(rb'"stream": ?true')
MESSAGE = b'"role"'
WRONG = b"HTTP/1.1 400 Fewer messages than were to be sent\r\nContent-Length: 0\r\n\r\n"
BACKLOG = 4096


def plain(prompt_tokens: int) -> bytes:
    """The whole HTTP answer to a request without `stream`."""
    message = {"role": "assistant", "content": REPLY}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    value = {**_head("chat.completion"), "choices": [choice], "usage": _usage(prompt_tokens)}
    content = json.dumps(value).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


def pieces(tokens: int, prompt_tokens: int) -> list[bytes]:
    """The parts of a streamed HTTP answer: one for each token, the first with the head."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    first = head + _chunk(_event({"role": "assistant", "content": FIRST_TOKEN}))
    next_one = _chunk(_event({"content": NEXT_TOKEN}))
    last = {**_head("chat.completion.chunk"), "choices": [], "usage": _usage(prompt_tokens)}
    end = _chunk(_event({}, "stop")) + _chunk(_data(last)) + _chunk(b"data: [DONE]\n\n")
    return [first, *[next_one] * (tokens - 1), end + b"0\r\n\r\n"]


def _head(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1_760_000_000, "model": MODEL}


def _usage(prompt_tokens: int) -> dict[str, Any]:
    # A cost that no budget notices, however many turns are measured.
    told = {"completion_tokens": 70, "cost": 1e-9}
    if prompt_tokens:
        told |= {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + 70}
    return told


def _event(delta: dict[str, Any], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return _data({**_head("chat.completion.chunk"), "choices": [choice]})


def _data(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@dataclass(slots=True)
class Stream:
    """A reply that is being streamed: when its next part is due, and which that is."""

    due: float
    client: socket.socket
    part: int = 1


class Mock:
    """Serves on a socket that listens.

    :param interval: seconds between the tokens of a stream; 0 sends it in one piece.
    :param messages: how many messages a request must have at least, if it has more than one; else it
        gets no answer but a 400. After streams there are more, since their replies are shorter.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        interval: float,
        tokens: int,
        prompt_tokens: int,
        messages: int,
    ) -> None:
        self._listener = listener
        self._messages = messages
        self._interval = interval
        self._plain = plain(prompt_tokens)
        # A streamed reply is another than those that the history is made of, so there is more of it.
        self._pieces = pieces(tokens, 0)
        if not interval:
            self._pieces = [b"".join(self._pieces)]
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self._clients: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        # All have one interval, so those that came first are due first.
        self._streams: deque[Stream] = deque()

    def run(self) -> None:
        """Serves for ever."""
        own = self._listener.fileno()
        while True:
            for number, _ in self._wait():
                if number == own:
                    self._accept()
                else:
                    self._read(number)
            now = time.perf_counter()
            while self._streams and self._streams[0].due <= now:
                self._go_on(self._streams.popleft())

    def _wait(self) -> list[tuple[int, int]]:
        if not self._streams:
            return self._epoll.poll()
        # epoll counts in milliseconds, select in microseconds.
        left = max(0.0, self._streams[0].due - time.perf_counter())
        select.select([self._epoll], [], [], left)
        return self._epoll.poll(0)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients[client.fileno()] = client
        self._epoll.register(client.fileno(), select.EPOLLIN)

    def _read(self, number: int) -> None:
        client = self._clients[number]
        try:
            data = client.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            return self._drop(number)
        if unread := self._unread.pop(number, b""):
            data = unread + data
        head = data.find(b"\r\n\r\n")
        length = LENGTH.search(data, 0, head + 4) if head >= 0 else None
        if head < 0 or (length and len(data) < head + 4 + int(length[1])):
            self._unread[number] = data
        elif self._messages and 1 < data.count(MESSAGE) < self._messages:
            self._send(client, WRONG)
        else:
            self._answer(client, STREAM.search(data, head) is not None)
        return None

    def _answer(self, client: socket.socket, stream: bool) -> None:
        if not stream:
            self._send(client, self._plain)
            return
        if self._send(client, self._pieces[0]) and self._interval:
            self._streams.append(Stream(time.perf_counter() + self._interval, client))

    def _go_on(self, stream: Stream) -> None:
        client = stream.client
        if client.fileno() < 0 or not self._send(client, self._pieces[stream.part]):
            return
        stream.part += 1
        if stream.part < len(self._pieces):
            stream.due += self._interval
            self._streams.append(stream)

    def _send(self, client: socket.socket, data: bytes) -> bool:
        """Whether all of it went out; a client that does not read is dropped."""
        try:
            client.sendall(data)
        except OSError:
            self._drop(client.fileno())
            return False
        return True

    def _drop(self, number: int) -> None:
        self._unread.pop(number, None)
        self._epoll.unregister(number)
        self._clients.pop(number).close()


def main() -> None:
    """Reads the options and serves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--interval", type=float, default=0, help="seconds between tokens")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a streamed reply")
    parser.add_argument(
        "--prompt-tokens", type=int, default=PROMPT_TOKENS, help="0 does not tell them"
    )
    parser.add_argument(
        "--messages", type=int, default=0, help="how many a request with more than one has at least"
    )
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    print(listener.getsockname()[1], flush=True)
    Mock(
        listener,
        interval=options.interval,
        tokens=options.tokens,
        prompt_tokens=options.prompt_tokens,
        messages=options.messages,
    ).run()


if __name__ == "__main__":
    main()
