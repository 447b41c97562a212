"""The contract of what processes share, sentence by sentence, as tests that any implementation can run.

Needs pytest and pytest-tornasync. Subclass `SharedConformance`, override `open_shared`, run pytest::

    class TestMyShared(SharedConformance):
        @pytest.fixture
        def open_shared(self):
            async def open():
                return await open_my_shared({"url": "…"})

            return open
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from tornado.ioloop import IOLoop

from chatd.domain import new_id
from chatd.shared import Shared, Spending, Window, Wish

Opener = Callable[[], Awaitable[Shared]]
MANY = 50


def a_wish(*, budget: float = 1.0, reserve: float = 0.25, seconds: float = 60) -> Wish:
    """A wish of a turn of its own."""
    return Wish(new_id(), budget, reserve, seconds)


@asynccontextmanager
async def heard(shared: Shared, *channels: str) -> AsyncIterator[asyncio.Queue[bytes]]:
    """What comes on the channels, once it is listened."""
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    ready = asyncio.Event()

    async def listen() -> None:
        async for message in shared.listen(channels):
            if message is None:
                ready.set()
            else:
                queue.put_nowait(message)

    task = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(10):
            await ready.wait()
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class SharedConformance:
    """What every implementation of `chatd.Shared` does. Two processes are two that were opened."""

    @pytest.fixture
    def open_shared(self) -> Opener:
        """Override it: a coroutine function that opens another one of what is shared."""
        raise NotImplementedError

    @pytest.fixture
    def shared(self, io_loop: IOLoop, open_shared: Opener) -> Iterator[Shared]:
        """One process's."""
        yield from _opened(io_loop, open_shared)

    @pytest.fixture
    def other(self, io_loop: IOLoop, open_shared: Opener) -> Iterator[Shared]:
        """Another's."""
        yield from _opened(io_loop, open_shared)

    @pytest.fixture
    def window(self) -> Window:
        """A window of three that nobody else takes from."""
        return Window(f"test/{new_id()}", 3, 60)

    @pytest.fixture
    def account(self) -> str:
        """An account that nobody else has."""
        return f"{new_id()}/2026-01-31"

    # Limits

    async def test_no_more_is_taken_than_there_is(
        self, shared: Shared, other: Shared, window: Window
    ) -> None:
        takes = [(shared, other)[i % 2].take("group", new_id(), [window]) for i in range(MANY)]
        left = [each[0].left for each in await asyncio.gather(*takes)]
        assert sorted(left, reverse=True) == [3, 2, 1] + [0] * (MANY - 3)

    async def test_it_is_told_when_one_comes_back(self, shared: Shared, window: Window) -> None:
        for _ in range(3):
            await shared.take("group", new_id(), [window])
        (left,) = await shared.take("group", new_id(), [window])
        assert left.left == 0
        assert 0 < left.reset <= 60

    async def test_what_is_taken_comes_back_when_its_time_is_over(self, shared: Shared) -> None:
        window = Window(new_id(), 1, 1)
        for left in (1, 0):
            assert (await shared.take("group", new_id(), [window]))[0].left == left
        await asyncio.sleep(1.1)
        assert (await shared.take("group", new_id(), [window]))[0].left == 1

    async def test_nothing_is_taken_when_one_window_has_none_left(
        self, shared: Shared, window: Window
    ) -> None:
        empty = Window(new_id(), 1, 60)
        await shared.take("group", new_id(), [empty])
        for _ in range(5):
            left = await shared.take("group", new_id(), [window, empty])
            assert [each.left for each in left] == [3, 0]

    async def test_what_is_given_back_can_be_taken_again_once(
        self, shared: Shared, other: Shared, window: Window
    ) -> None:
        hold = new_id()
        await shared.take("group", hold, [window])
        await shared.take("group", new_id(), [window])
        await shared.give_back("group", hold, [window])
        await shared.give_back("group", hold, [window])
        assert (await other.take("group", new_id(), [window]))[0].left == 2

    async def test_windows_under_other_keys_are_others(
        self, shared: Shared, window: Window
    ) -> None:
        await shared.take("group", new_id(), [window])
        (left,) = await shared.take("group", new_id(), [Window(window.key + "x", 3, 60)])
        assert left.left == 3

    # Budgets

    async def test_nothing_is_granted_of_an_account_that_nobody_knows(
        self, shared: Shared, account: str
    ) -> None:
        standing = await shared.reserve(account, a_wish())
        assert (standing.spent, standing.granted, standing.running) == (None, False, 0)

    async def test_holds_and_what_is_spent_stay_within_the_budget(
        self, shared: Shared, other: Shared, account: str
    ) -> None:
        await shared.learn(account, 0.1, settled=0, most=0)
        wishes = [(shared, other)[i % 2].reserve(account, a_wish()) for i in range(MANY)]
        granted = [each for each in await asyncio.gather(*wishes) if each.granted]
        assert len(granted) == 3
        standing = await other.account(account)
        assert [standing.running, standing.held] == pytest.approx([3, 0.75])
        assert standing.spent == pytest.approx(0.1)

    async def test_a_turn_that_runs_alone_needs_only_that_something_is_left(
        self, shared: Shared, account: str
    ) -> None:
        await shared.learn(account, 0.9, settled=0, most=0)
        first = await shared.reserve(account, a_wish())
        assert (first.granted, first.amount) == (True, 0.25)
        assert not (await shared.reserve(account, a_wish())).granted
        await shared.learn(account, 1.0, settled=0, most=0)
        assert not (await shared.reserve(account, a_wish())).granted

    async def test_what_a_turn_cost_takes_the_place_of_what_it_held(
        self, shared: Shared, other: Shared, account: str
    ) -> None:
        await shared.learn(account, 0, settled=0, most=0)
        wish = a_wish()
        await shared.reserve(account, wish)
        await other.settle(account, wish.hold, Spending(0.4, guesses=1, guessed=0.4, most=0.4))
        standing = await shared.account(account)
        assert (standing.running, standing.held, standing.guesses) == (0, 0, 1)
        assert [standing.spent, standing.settled] == pytest.approx([0.4, 0.4])
        await shared.settle(account, wish.hold, Spending(-0.1, guesses=-1, guessed=-0.4, most=0.3))
        standing = await other.account(account)
        assert [standing.spent, standing.guesses] == pytest.approx([0.3, 0])
        assert [standing.guessed, standing.most] == pytest.approx([0, 0.4])

    async def test_what_did_not_begin_costs_nothing(self, shared: Shared, account: str) -> None:
        await shared.learn(account, 0, settled=0, most=0)
        wish = a_wish()
        await shared.reserve(account, wish)
        await shared.settle(account, wish.hold, None)
        standing = await shared.account(account)
        assert (standing.spent, standing.running, standing.settled) == (0, 0, 0)

    async def test_turns_hold_what_the_dearest_cost(self, shared: Shared, account: str) -> None:
        await shared.learn(account, 0, settled=0, most=0.3)
        assert (await shared.reserve(account, a_wish())).amount == pytest.approx(0.3)
        await shared.learn(account, 0, settled=0, most=0.1)
        assert (await shared.reserve(account, a_wish())).amount == pytest.approx(0.3)

    async def test_what_was_settled_while_storage_was_asked_counts_as_well(
        self, shared: Shared, account: str
    ) -> None:
        await shared.learn(account, 0, settled=0, most=0)
        await shared.settle(account, "one", Spending(0.2, most=0.2))
        before = (await shared.account(account)).settled
        await shared.settle(account, "two", Spending(0.3, most=0.3))
        await shared.learn(account, 0.25, settled=before, most=0)
        assert (await shared.account(account)).spent == pytest.approx(0.55)

    async def test_what_a_process_held_that_died_is_free_after_a_while(
        self, shared: Shared, other: Shared, account: str
    ) -> None:
        await shared.learn(account, 0, settled=0, most=0)
        dead, alive = a_wish(reserve=0.6, seconds=0.5), a_wish(reserve=0.3, seconds=0.5)
        assert (await other.reserve(account, dead)).granted
        assert (await shared.reserve(account, alive)).granted
        await shared.hold(account, {alive.hold: 0.3}, 60)
        assert not (await shared.reserve(account, a_wish())).granted
        await asyncio.sleep(0.6)
        standing = await shared.account(account)
        assert [standing.running, standing.held] == pytest.approx([1, 0.3])
        assert (await shared.reserve(account, a_wish())).granted

    # Messages

    async def test_what_is_published_is_heard_in_order_by_all_who_listen(
        self, shared: Shared, other: Shared
    ) -> None:
        channel = new_id()
        async with heard(shared, channel) as one, heard(other, channel, new_id()) as two:
            said = [b"%d \xff\x00" % i for i in range(MANY)]
            for message in said:
                await shared.publish(channel, message)
            async with asyncio.timeout(10):
                assert [await one.get() for _ in said] == said
                assert [await two.get() for _ in said] == said

    async def test_other_channels_are_not_heard(self, shared: Shared, other: Shared) -> None:
        channel = new_id()
        async with heard(shared, channel) as queue:
            await other.publish(new_id(), b"no")
            await other.publish(channel, b"yes")
            async with asyncio.timeout(10):
                assert await queue.get() == b"yes"

    async def test_what_nobody_hears_is_no_error(self, shared: Shared) -> None:
        await shared.publish(new_id(), b"nobody")

    async def test_it_says_that_it_is_there(self, shared: Shared) -> None:
        await shared.check()


def _opened(io_loop: IOLoop, open_shared: Opener) -> Iterator[Shared]:
    shared = io_loop.run_sync(open_shared, timeout=30)
    yield shared
    io_loop.run_sync(shared.close, timeout=30)
