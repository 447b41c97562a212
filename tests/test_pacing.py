"""Streams that take turns: how long they wait for each other, and what never waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress

import pytest
from chatd_plugins.openai_compatible import open_openai_compatible
from tornado.ioloop import IOLoop

from chatd import pacing
from chatd.domain import Message
from chatd.errors import ProviderError, ProviderErrorKind
from chatd.pacing import FEW_STREAMS, MAX_WAIT, MEMORY, SHARE, Pace, PacedStream, Pacer
from chatd.provider import Event, Finish, Provider, ProviderRequest, TextDelta
from chatd.testing.fake_provider import SSE_HEAD, sse

ASKED = ProviderRequest("test/model", [Message("user", "Hello?")])
STEP = 0.01


class Machine:
    """An event loop with streams, on a clock of its own.

    :param streams: how many; each gets 20 tokens a second.
    :param read: what a read costs with the write after it, in seconds.
    :param other: the share of the loop's time that goes into everything else.
    """

    def __init__(self, streams: int, *, read: float = 40e-6, other: float = 0.2) -> None:
        self.now = 1000.0
        self.worked = 5.0
        self.read, self.other = read, other
        self.share = 0.0
        self.pace = Pace(busy=lambda: self.worked)
        self.pace.streams = streams

    def run(self, seconds: float) -> list[float]:
        """The wait at each step on the way."""
        waits = []
        for _ in range(round(seconds / STEP)):
            waits.append(self.pace.wait(self.now))
            reads = self.pace.streams / max(0.05, waits[-1])
            self.share = min(1.0, self.other + reads * self.read)
            self.now += STEP
            self.worked += STEP * self.share
        return waits


def test_few_streams_never_wait_however_busy_the_loop_is() -> None:
    assert set(Machine(FEW_STREAMS, other=1.0).run(5)) == {0.0}


def test_many_streams_do_not_wait_while_the_loop_has_time() -> None:
    machine = Machine(300)
    assert set(machine.run(5)) == {0.0}
    assert machine.share < SHARE


@pytest.mark.parametrize("other", [0.0, 0.2, 0.3])
def test_the_wait_becomes_what_leaves_the_loop_its_time_and_stays_there(other: float) -> None:
    machine = Machine(1000, other=other, read=20e-6)
    machine.read = (SHARE - other) * 0.1 / 1000
    machine.run(5)
    found = machine.run(5)
    assert machine.share == pytest.approx(SHARE, rel=0.05)
    assert max(found) == pytest.approx(min(found), rel=0.05) == pytest.approx(0.1, rel=0.05)


def test_no_wait_is_longer_than_the_longest() -> None:
    machine = Machine(10_000, other=0.8)
    waits = machine.run(5)
    assert max(waits) == waits[-1] == MAX_WAIT


def test_nobody_waits_any_more_once_the_load_is_over() -> None:
    machine = Machine(1000, other=0.4)
    assert machine.run(5)[-1] > 0
    machine.other, machine.read = 0.1, 1e-6
    assert machine.run(5)[-1] == 0


def test_load_of_long_ago_is_forgotten() -> None:
    machine = Machine(1000, other=0.4)
    assert machine.run(5)[-1] > 0
    machine.now += 2 * MEMORY
    machine.worked += 2 * MEMORY
    assert machine.run(STEP) == [0.0]


class Endless(Pace):
    """Lets everybody wait for an hour, who waits at all."""

    def wait(self, now: float) -> float:
        return 3600.0


class Short(Pace):
    """Lets everybody wait for a moment."""

    def wait(self, now: float) -> float:
        return 0.001


async def test_waits_end_and_with_the_last_the_timer() -> None:
    pacer = Pacer(Short())
    assert pacer.is_idle
    waits = [pacer.wait() for _ in range(3)]
    assert not pacer.is_idle
    for wait in waits:
        assert wait is not None
        await wait
    while not pacer.is_idle:
        await asyncio.sleep(0.01)


async def test_a_wait_that_was_cancelled_does_not_hold_up_the_others() -> None:
    pacer = Pacer(Short())
    first, second = pacer.wait(), pacer.wait()
    assert first is not None and second is not None
    first.cancel()
    await second


async def test_who_hurries_waits_no_longer_and_not_again() -> None:
    with PacedStream(Pacer(Endless())) as stream:
        wait = stream.wait()
        assert wait is not None
        stream.hurry()
        await wait
        assert stream.wait() is None


CHUNKED_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def said(text: str) -> bytes:
    """An event with some of the answer."""
    return sse({"choices": [{"delta": {"content": text}}]})


class Service:
    """Sends the parts of one event stream, each when it is told to, and ends the body then."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SSE_HEAD)
        gone = asyncio.create_task(self._watch(reader))
        while (part := await self.parts.get()) is not None:
            writer.write(part)
            await writer.drain()
        writer.close()
        await gone

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass
        self.closed.set()

    def say(self, *texts: str) -> None:
        """Sends an event for each text."""
        for text in texts:
            self.parts.put_nowait(said(text))


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def provider(io_loop: IOLoop, service: Service) -> Iterator[Provider]:
    """`openai_compatible`, asking the service, in a process whose streams wait for an hour."""

    async def start() -> tuple[asyncio.Server, Provider]:
        pacing.pacer().pace = Endless()
        server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        return server, await open_openai_compatible({"base_url": f"http://127.0.0.1:{port}/v1"})

    server, provider = io_loop.run_sync(start)
    yield provider
    io_loop.run_sync(provider.close)
    server.close()


async def first_of(events: AsyncGenerator[Event, None]) -> Event:
    return await asyncio.wait_for(anext(events), 10)


async def test_the_first_token_does_not_wait_nor_the_end_and_what_is_between_goes_on_at_once(
    provider: Provider, service: Service
) -> None:
    service.say("")
    async with aclosing(provider.stream(ASKED)) as events:
        first = asyncio.create_task(first_of(events))
        await asyncio.wait([first], timeout=0.1)
        service.say("Hel")
        assert await first == TextDelta("Hel")
        rest = asyncio.create_task(first_of(events))
        service.say("lo", ",", " you!")
        done, _ = await asyncio.wait([rest], timeout=0.1)
        assert not done
        service.parts.put_nowait(sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
        service.parts.put_nowait(None)
        assert await rest == TextDelta("lo, you!")
        assert await first_of(events) == Finish("stop")


async def test_what_was_said_before_a_failure_comes_before_it(
    provider: Provider, service: Service
) -> None:
    async with aclosing(provider.stream(ASKED)) as events:
        service.say("Hel")
        await first_of(events)
        service.say("lo", "!")
        service.parts.put_nowait(sse({"error": {"message": "no more", "code": 502}}))
        service.parts.put_nowait(None)
        assert await first_of(events) == TextDelta("lo!")
        with pytest.raises(ProviderError):
            await first_of(events)


class Moment(Pace):
    """Lets everybody wait long enough for all of an answer to come."""

    def wait(self, now: float) -> float:
        return 0.3


@pytest.mark.parametrize("is_whole", [True, False])
async def test_what_came_before_the_connection_broke_is_not_lost(is_whole: bool) -> None:
    """Whether the answer was whole by then or not: it was there to be read before the break."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED_HEAD)
        parts = [*(said(text) for text in ("Hel", "lo", ",", " you!"))]
        if is_whole:
            parts += [
                sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}),
                b"data: [DONE]\n\n",
            ]
        for part in parts:
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(0.02)
        # Without the chunk that says so.
        writer.close()

    pacing.pacer().pace = Moment()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    provider = await open_openai_compatible({"base_url": f"http://127.0.0.1:{port}/v1"})
    found: list[Event] = []
    try:
        async with asyncio.timeout(10):
            async for event in provider.stream(ASKED):
                found.append(event)
    except ProviderError as error:
        assert not is_whole and error.kind is ProviderErrorKind.INCOMPLETE
    finally:
        await provider.close()
        server.close()
    texts = [event.text for event in found if isinstance(event, TextDelta)]
    assert texts == ["Hel", "lo, you!"]
    assert (found[-1] == Finish("stop")) is is_whole


async def test_a_stream_that_is_stopped_while_it_waits_ends_at_once(
    provider: Provider, service: Service
) -> None:
    async def read() -> None:
        async with aclosing(provider.stream(ASKED)) as events:
            async for _ in events:
                begun.set()

    begun = asyncio.Event()
    reading = asyncio.create_task(read())
    service.say("Hel")
    await asyncio.wait_for(begun.wait(), 10)
    assert pacing.pacer().pace.streams == 1
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(reading, 10)
    service.parts.put_nowait(None)
    await asyncio.wait_for(service.closed.wait(), 10)
    assert pacing.pacer().pace.streams == 0
