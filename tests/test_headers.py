"""The short way to read a request's head: what it takes it reads as Tornado does."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders

from chatd.headers import MAX_BYTES, MAX_LINES, QuickHeaders, usual

LINES = st.one_of(
    st.sampled_from(
        [
            "Host: a",
            "host:b",
            "Content-Type:  application/json ",
            "X-Empty:",
            "X-Tab:\ta\t",
            "X-Latin: \xe9",
            " folded",
            "Name : a",
            "no colon",
            "X-Null: \0",
            "X-Colons: a:b: c",
            "x-LOWER_and!odd#: 1",
        ]
    ),
    st.builds(
        "{}:{}".format,
        st.text(st.characters(max_codepoint=255), max_size=12),
        st.text(st.characters(max_codepoint=255), max_size=20),
    ),
)
STARTS = st.sampled_from(
    ["GET / HTTP/1.1", "POST /a?b=c HTTP/1.1", "GET / HTTP/1.0", "GET  / HTTP/1.1", "GET /", ""]
)
ENDS = st.sampled_from(["\r\n", "\r\n", "\r\n", "\n"])


def tornados(data: bytes) -> tuple[str, HTTPHeaders]:
    """How Tornado reads a head."""
    return HTTP1Connection._parse_headers(None, data)  # type: ignore[arg-type]


@given(st.data(), STARTS, st.lists(LINES, max_size=6), st.sampled_from(["", "\r\n", "\n"]))
def test_what_it_takes_it_reads_as_tornado(
    data: st.DataObject, start: str, lines: list[str], before: str
) -> None:
    head = before + "".join(line + data.draw(ENDS) for line in [start, *lines])
    raw = (head + data.draw(ENDS)).encode("latin-1")
    found = usual(raw)
    if found is None:
        return
    start_line, headers = tornados(raw)
    assert found[0] == start_line
    assert list(found[1].get_all()) == list(headers.get_all())
    assert found[1].given == {name.lower(): value for name, value in headers.items()}


@given(st.lists(st.tuples(st.sampled_from(["set", "add", "del"]), st.sampled_from("aBc"))))
@example([("set", "a"), ("add", "A"), ("add", "a"), ("del", "a")])
def test_they_are_looked_up_and_changed_as_tornados(changes: list[tuple[str, str]]) -> None:
    quick, tornado = QuickHeaders({}), HTTPHeaders()
    for number, (change, name) in enumerate(changes):
        for headers in (quick, tornado):
            match change:
                case "set":
                    headers[name] = str(number)
                case "add":
                    headers.add(name, str(number))
                case _:
                    with suppress(KeyError):
                        del headers[name]
        for asked in "abcABC":
            assert quick.get(asked) == tornado.get(asked)
            assert (asked in quick) == (asked in tornado)
    assert list(quick.get_all()) == list(tornado.get_all())


def head(*lines: str) -> bytes:
    """A request's head."""
    return ("\r\n".join(["GET / HTTP/1.1", *lines]) + "\r\n\r\n").encode("latin-1")


def test_the_usual_request_is_taken() -> None:
    found = usual(head("Host: a", "X-API-Key:  k ", "Accept: */*"))
    assert found is not None
    assert found[1].given == {"host": "a", "x-api-key": "k", "accept": "*/*"}
    assert found[1]["x-api-KEY"] == "k"
    assert found[1].get("X-Api-Key") == "k"


@pytest.mark.parametrize(
    "lines",
    [
        ["Host: a", " folded"],
        ["Host: a", "host: b"],
        ["Host : a"],
        ["Host: a\tb"],
        ["Host: \xe9"],
        ["Host: a\nX-B: c"],
        ["Host: a", *(f"X-{number}: 1" for number in range(MAX_LINES))],
        ["Host: " + "a" * MAX_BYTES],
        [],
    ],
)
def test_other_requests_are_left_to_tornado(lines: list[str]) -> None:
    assert usual(head(*lines)) is None
