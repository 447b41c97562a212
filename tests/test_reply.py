"""A reply as it comes, read from any place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chatd.reply import Reply


@given(
    parts=st.lists(st.text(max_size=4), max_size=5),
    place=st.integers(0, 12),
    limit=st.integers(1, 5),
)
def test_what_was_said_can_be_read_from_any_place(parts: list[str], place: int, limit: int) -> None:
    reply = Reply("a turn", "a session")
    for part in parts:
        reply.say(part)
    assert reply.text_from(place, limit) == "".join(parts)[place : place + limit]
