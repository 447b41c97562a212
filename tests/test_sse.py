"""Server-sent events, read from bytes that may be cut anywhere."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatd.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder


def decode(*chunks: bytes, max_bytes: int = MAX_EVENT_BYTES) -> list[bytes]:
    decoder = SSEDecoder(max_bytes)
    return [data for chunk in chunks for data in decoder.feed(chunk)]


def bytewise(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lf_crlf_and_cr_end_a_line(end: bytes) -> None:
    stream = b"data: a" + end + end + b"data: b" + end + end
    assert decode(stream) == decode(*bytewise(stream)) == [b"a", b"b"]


def test_line_ends_of_all_kinds_may_be_mixed() -> None:
    stream = b"data: a\r\n\ndata: b\r\r\ndata: c\n\r\ndata: d\r\r"
    assert decode(stream) == decode(*bytewise(stream)) == [b"a", b"b", b"c", b"d"]


def test_an_event_that_ends_in_cr_is_not_held_back() -> None:
    """The LF that may follow belongs to the line that is over."""
    decoder = SSEDecoder()
    assert list(decoder.feed(b"data: a\r\n\r")) == [b"a"]
    assert list(decoder.feed(b"\ndata: b\r\n\r")) == [b"b"]


def test_a_crlf_cut_in_two_is_one_line_end() -> None:
    assert decode(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [b"a\nb"]


def test_several_data_lines_are_joined_by_lf() -> None:
    assert decode(b"data: a\ndata:\ndata: c\n\n") == [b"a\n\nc"]


def test_a_byte_order_mark_at_the_start_is_skipped() -> None:
    stream = b"\xef\xbb\xbfdata: a\n\n"
    assert decode(stream) == decode(*bytewise(stream)) == [b"a"]


def test_a_byte_order_mark_anywhere_else_is_part_of_the_line() -> None:
    assert decode(b"\ndata: \xef\xbb\xbfa\n\n\xef\xbb\xbfdata: b\n\n") == [b"\xef\xbb\xbfa"]


def test_one_space_after_the_colon_is_dropped_and_no_more() -> None:
    assert decode(b"data:a\n\ndata: b\n\ndata:  c \n\n") == [b"a", b"b", b" c "]


def test_comments_and_other_fields_are_skipped() -> None:
    stream = b": OPENROUTER PROCESSING\n\nevent: x\nid: 1\nretry: 5\ndata: a\ndatax: b\n: c\n\n"
    assert decode(stream) == [b"a"]


def test_a_data_field_without_a_value_is_an_empty_line() -> None:
    assert decode(b"data\n\ndata: a\ndata\n\n") == [b"", b"a\n"]


def test_an_event_without_its_empty_line_is_not_told() -> None:
    assert decode(b"data: a\n\ndata: b\n") == [b"a"]


def test_characters_cut_in_two_come_out_whole() -> None:
    stream = "data: é😀\n\n".encode()
    for i in range(len(stream)):
        assert decode(stream[:i], stream[i:]) == ["é😀".encode()]


def test_an_event_as_large_as_the_cap_is_taken_and_a_larger_one_is_not() -> None:
    fits = b"x" * (64 - len(b"data: "))
    assert decode(b"data: " + fits, b"\n\n", max_bytes=64) == [fits]
    with pytest.raises(EventTooLarge):
        decode(b"data: " + b"x" * 64, b"\n\n", max_bytes=64)


def test_the_cap_holds_for_many_short_lines_of_one_event_as_well() -> None:
    with pytest.raises(EventTooLarge):
        decode(*[b"data: x\n"] * 100, max_bytes=64)


def test_the_cap_counts_the_lines_before_a_line_that_never_ends() -> None:
    with pytest.raises(EventTooLarge):
        decode(b"data: " + b"x" * 40 + b"\n", b"data: " + b"x" * 40, max_bytes=64)


def test_the_cap_holds_for_a_line_that_never_ends_whatever_its_field() -> None:
    for start in (b"data: ", b": ", b"id: "):
        with pytest.raises(EventTooLarge):
            decode(start, *[b"x" * 10] * 100, max_bytes=64)


def test_the_cap_is_of_one_event_not_of_the_stream() -> None:
    assert len(decode(*[b"data: " + b"x" * 40 + b"\n\n"] * 100, max_bytes=64)) == 100


def test_a_megabyte_in_one_line_is_read_without_copying_it_for_each_chunk() -> None:
    value = b"x" * 1024 * 1024
    stream = b"data: " + value + b"\n\n"
    chunks = [stream[i : i + 1000] for i in range(0, len(stream), 1000)]
    tracemalloc.start()
    assert decode(*chunks) == [value]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * len(value)


# Built of what matters to the format, so that the cases that matter are common.
STREAMS = st.lists(
    st.sampled_from(
        [b"\n", b"\r", b"\r\n", b"data", b"data:", b"data: ", b":", b" ", b"id: 1", b"\xef\xbb\xbf"]
    )
    | st.text(max_size=4).map(lambda text: text.encode("utf-8", "replace"))
    | st.binary(max_size=3),
    max_size=30,
).map(b"".join)


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 200), max_size=20))
def test_the_same_events_come_however_a_stream_is_cut(stream: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[a:b] for a, b in pairwise(places)]
    assert decode(*chunks) == decode(stream) == decode(*bytewise(stream))


@given(
    values=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"))),
    end=st.sampled_from(["\n", "\r", "\r\n"]),
    size=st.integers(1, 50),
)
def test_what_was_written_is_what_is_read(values: list[str], end: str, size: int) -> None:
    stream = "".join(f"data: {value}{end}{end}" for value in values).encode()
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert decode(*chunks) == [value.encode() for value in values]
