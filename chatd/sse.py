"""Server-sent events, read from bytes as the WHATWG HTML standard (section 9.2) says."""

from __future__ import annotations

from collections.abc import Iterator

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""The largest event that is taken; what is kept in memory stays below about twice that."""


class EventTooLarge(ValueError):
    """An event is over the cap."""


class SSEDecoder:
    """Turns chunks of bytes, cut anywhere, into the `data` of each event.

    LF, CRLF and CR end a line, several `data:` lines are joined by LF, a byte order mark at the
    start and comments are skipped. Fields other than `data` are not needed here and dropped.

    :param max_bytes: an event above this raises `EventTooLarge`.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._at_start = True
        self._skip_lf = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of each event that `chunk` completes, in order."""
        if self._skip_lf and chunk:
            self._skip_lf = False
            chunk = chunk.removeprefix(b"\n")
        if b"\n" not in chunk and b"\r" not in chunk:
            self._keep(chunk)
            return
        self._skip_lf = chunk.endswith(b"\r")
        self._tail.append(chunk)
        text = b"".join(self._tail)
        self._tail.clear()
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._tail_bytes = 0
        if self._at_start and lines:
            self._at_start = False
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        data = self._data
        for line in lines:
            if line:
                if line.startswith(b"data"):
                    self._field(line)
            elif data:
                yield data[0] if len(data) == 1 else b"\n".join(data)
                data.clear()
                self._data_bytes = 0
        self._keep(rest)

    def _keep(self, rest: bytes) -> None:
        if rest:
            self._tail.append(rest)
            self._tail_bytes += len(rest)
            self._check(self._tail_bytes + self._data_bytes)

    def _field(self, line: bytes) -> None:
        if line[4:6] == b": ":
            value = line[6:]
        elif len(line) == 4 or line[4:5] == b":":
            value = line[5:]
        else:
            return
        self._data.append(value)
        self._data_bytes += len(value) + 1
        self._check(self._data_bytes)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise EventTooLarge(f"an event of more than {self._max_bytes} bytes")
