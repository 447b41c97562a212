"""The headers of the usual request, read and looked up at a fraction of what Tornado takes.

Tornado looks at a request's lines one by one, and at each name and value of them; one expression
sees here that all of them are as they mostly are. What is not, Tornado reads.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from tornado.httputil import HTTPHeaders

MAX_LINES = 64
"""The most headers of a usual request."""

MAX_BYTES = 8 * 1024
"""The most bytes of its head, which is less than handlers take."""

_HEAD = re.compile(
    r"([!-~]+ [!-~]+ HTTP/1\.1)\r\n((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[ -~]*\r\n)+)\r\n"
)
"""Printable ASCII alone, each line ended as RFC 9112 says, nothing folded."""


@lru_cache(1000)
def _canonical(name: str) -> str:
    """A header's name as Tornado's headers have it."""
    return "-".join([word.capitalize() for word in name.split("-")])


class QuickHeaders(HTTPHeaders):
    """Tornado's, whose own look-ups of what is not there raise and catch an error.

    :param values: what is in them, by names as Tornado writes them; not to be used after.
    """

    def __init__(self, values: dict[str, str]) -> None:
        self._as_list = {name: [value] for name, value in values.items()}
        self._combined_cache = values

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _canonical(name) in self._as_list

    def get(self, name: str, default: Any = None) -> Any:
        """As a mapping's."""
        name = _canonical(name)
        if (value := self._combined_cache.get(name)) is not None:
            return value
        return self[name] if name in self._as_list else default


class UsualHeaders(QuickHeaders):
    """The headers of a usual request, within what handlers take.

    `given` has them by their names in lower case.

    :param lines: as they came, without the end of a line.
    """

    def __init__(self, lines: list[str]) -> None:
        self.given: dict[str, str] = {}
        values: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.given[name.lower()] = values[_canonical(name)] = value.strip(" ")
        super().__init__(values)


def usual(data: bytes) -> tuple[str, UsualHeaders] | None:
    """The start line and the headers of a usual request's head; None of any other."""
    if len(data) > MAX_BYTES or (head := _HEAD.fullmatch(data.decode("latin-1"))) is None:
        return None
    lines = head[2].split("\r\n")
    lines.pop()
    if len(lines) > MAX_LINES:
        return None
    headers = UsualHeaders(lines)
    # Of what is given twice there is more to say than this has room for.
    return (head[1], headers) if len(headers.given) == len(lines) else None
