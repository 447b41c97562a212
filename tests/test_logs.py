"""Lines of log: in their order, written together, and lost only when they cannot be written."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading

import pytest

from chatd.logs import JsonFormatter, LineHandler


class Stream(io.StringIO):
    """A stream that counts how often it is written to, and that may be full."""

    writes = 0
    is_full = False

    def write(self, text: str) -> int:
        self.writes += 1
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(text)

    @property
    def lines(self) -> list[str]:
        """What was written."""
        return self.getvalue().splitlines()


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def handler(stream: Stream) -> LineHandler:
    handler = LineHandler(stream)
    handler.setFormatter(JsonFormatter())
    return handler


def a_record(text: str) -> logging.LogRecord:
    return logging.LogRecord("chatd", logging.WARNING, "", 0, text, (), None)


async def test_the_lines_of_one_turn_of_the_loop_are_written_together(
    handler: LineHandler, stream: Stream
) -> None:
    for number in range(5):
        handler.say(str(number))
    assert stream.lines == []
    await asyncio.sleep(0)
    assert (stream.lines, stream.writes) == (list("01234"), 1)
    handler.say("5")
    await asyncio.sleep(0)
    assert (stream.lines, stream.writes) == (list("012345"), 2)


async def test_a_record_comes_after_the_lines_before_it(
    handler: LineHandler, stream: Stream
) -> None:
    handler.say("one")
    handler.handle(a_record("two"))
    handler.say("three")
    handler.flush()
    first, second, third = stream.lines
    assert (first, json.loads(second)["message"], third) == ("one", "two", "three")
    await asyncio.sleep(0)
    assert len(stream.lines) == 3


def test_without_a_loop_a_line_is_written_at_once(handler: LineHandler, stream: Stream) -> None:
    handler.say("one")
    assert stream.lines == ["one"]


def test_lines_of_a_loop_that_ended_are_written_with_the_next(
    handler: LineHandler, stream: Stream
) -> None:
    for _ in range(2):
        loop = asyncio.new_event_loop()
        loop.call_soon(handler.say, "one")
        # It ends before its next turn.
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()

    async def next_words() -> None:
        handler.say("two")
        await asyncio.sleep(0)

    asyncio.run(next_words())
    assert stream.lines == ["one", "one", "two"]


async def test_what_cannot_be_written_is_lost_and_what_follows_is_not(
    handler: LineHandler, stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    stream.is_full = True
    for text in ("one", "two", "three"):
        handler.say(text)
    await asyncio.sleep(0)
    assert "No space left on device" in capsys.readouterr().err
    assert not handler._lines
    stream.is_full = False
    for text in ("four", "five"):
        handler.say(text)
        await asyncio.sleep(0)
    assert stream.lines == ["four", "five"]


async def test_threads_lose_no_line(handler: LineHandler, stream: Stream) -> None:
    def talk(name: str) -> None:
        for number in range(500):
            handler.handle(a_record(f"{name} {number}"))

    threads = [threading.Thread(target=talk, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for number in range(2000):
        handler.say(f'{{"message": "loop {number}"}}')
        if number % 10 == 0:
            await asyncio.sleep(0)
    for thread in threads:
        await asyncio.to_thread(thread.join)
    handler.flush()
    said = [json.loads(line)["message"] for line in stream.lines]
    for name, count in (("a", 500), ("b", 500), ("loop", 2000)):
        own = [text for text in said if text.startswith(f"{name} ")]
        assert own == [f"{name} {number}" for number in range(count)]
