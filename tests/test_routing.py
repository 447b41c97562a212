"""Who answers, as a client sees it: retries, chains, breakers, splits, races and prices.

The providers are fakes that speak OpenAI's wire format over real sockets.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from chatd.breaker import Breaker, BreakerSettings, BreakerState
from chatd.domain import Chatbot, TurnStatus, Usage
from chatd.prices import Price, priced
from chatd.storage import TurnRecord
from chatd.testing.fake_provider import (
    SSE_HEAD,
    FakeProvider,
    Flood,
    Hold,
    Pause,
    Reset,
    Step,
    http_response,
    sse,
)
from tests.conftest import Serve
from tests.support import Answer, Served

MODEL = "test/model"
CONFIG = """
storage: %(storage)s
providers:
  first: {use: openai_compatible, base_url: "FIRST/v1", FIRST_SETTINGS}
  second: {use: openai_compatible, base_url: "SECOND/v1", SECOND_SETTINGS}
models:
  - {match: "*", ask: [ASK], hedge: HEDGE}
"""
QUICK = "retries: {attempts: 3, base: 0.01}"
CHAIN = "first, {provider: second, model: second/own-name}"


def answer(text: str = "Hello!", model: str = MODEL, **more: Any) -> bytes:
    """A good answer in one piece, after which the connection stays open."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return http_response(200, {"model": model, "choices": [choice], **more})


def said(text: str) -> bytes:
    """A chunk with text."""
    return sse({"model": MODEL, "choices": [{"index": 0, "delta": {"content": text}}]})


END = sse({"model": MODEL, "choices": [{"delta": {}, "finish_reason": "stop"}]}, "[DONE]")


@dataclass
class Chat:
    """A server whose providers are the fakes, and one of its sessions."""

    served: Served
    bot: Chatbot
    session: str

    async def say(self, text: str = "Hi", **more: Any) -> Answer:
        return await self.served.chat(self.bot, self.session, text, **more)

    async def anew(self) -> Chat:
        """Another session."""
        return Chat(self.served, self.bot, await self.served.session(self.bot))

    async def stop(self) -> None:
        """Stops the turn that runs, and waits for its end."""
        await self.served.runtime.services.turns.stop_in(self.bot, self.session)

    async def turn(self) -> TurnRecord:
        """The last turn, as it is stored."""
        return await self.served.last_turn(self.bot, self.session)

    async def asked(self) -> list[tuple[str, str, str | None]]:
        """Provider, model and failure of each attempt of the last turn."""
        return [(a["provider"], a["model"], a["error"]) for a in (await self.turn()).attempts]


Open = Callable[..., Awaitable[Chat]]


@pytest.fixture
def chat(serve: Serve, first: FakeProvider, second: FakeProvider) -> Open:
    async def start(
        ask: str = "first",
        *,
        settings: str = QUICK,
        other: str = QUICK,
        hedge: bool = False,
        **bot: Any,
    ) -> Chat:
        text = CONFIG.replace("FIRST_SETTINGS", settings).replace("SECOND_SETTINGS", other)
        text = text.replace("FIRST", first.url).replace("SECOND", second.url)
        served = await serve(text.replace("ASK", ask).replace("HEDGE", str(hedge).lower()))
        chatbot = await served.add_bot(model=MODEL, **bot)
        return Chat(served, chatbot, await served.session(chatbot))

    return start


# Asking again


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param((http_response(503, b""),), id="503"),
        pytest.param((http_response(429, b""),), id="429"),
        pytest.param((Reset(),), id="reset"),
        pytest.param((http_response(200, {"choices": []}),), id="no-choices"),
        pytest.param((answer(""),), id="empty"),
        pytest.param((SSE_HEAD,), id="closed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_may_pass_is_tried_again_and_the_client_sees_an_answer(
    chat: Open, first: FakeProvider, failure: tuple[Step, ...], stream: bool
) -> None:
    first.answer(*failure)
    first.answer(*failure)
    first.answer(SSE_HEAD, said("Hello!"), END)
    here = await chat()
    got = await here.say(stream=stream)
    assert got.status == 200 and b"Hello!" in got.body and b'"error"' not in got.body
    turn = await here.turn()
    assert (turn.status, turn.reply) == (TurnStatus.COMPLETED, "Hello!")
    assert [attempt["error"] is None for attempt in turn.attempts] == [False, False, True]
    assert len(first.requests) == 3


async def test_after_the_last_attempt_the_next_of_the_chain_is_asked_under_its_own_model(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(500, b""))
    second.answer(answer("From the second."))
    here = await chat(CHAIN)
    assert (await here.say()).json["response"] == "From the second."
    assert await here.asked() == [
        *[("first", MODEL, "overloaded")] * 3,
        ("second", "second/own-name", None),
    ]
    assert [request.json["model"] for request in second.requests] == ["second/own-name"]


async def test_nothing_is_asked_again_after_the_first_visible_token(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(SSE_HEAD, said("Half an ans"), Pause(0.05), Reset())
    here = await chat(CHAIN)
    got = await here.say(stream=True)
    assert b"Half an ans" in got.body and b'"provider_failed"' in got.body
    assert (len(first.requests), len(second.requests)) == (1, 0)
    turn = await here.turn()
    assert (turn.status, turn.reply) == (TurnStatus.INTERRUPTED, "Half an ans")


async def test_thinking_is_not_visible_so_another_may_answer_after_it(
    chat: Open, first: FakeProvider
) -> None:
    thought = sse({"choices": [{"delta": {"reasoning": "Well, let me see"}}]})
    first.answer(SSE_HEAD, thought, Pause(0.05), Reset())
    first.answer(SSE_HEAD, thought, said("Yes."), END)
    here = await chat()
    assert (await here.say()).json["response"] == "Yes."
    assert [error for _, _, error in await here.asked()] == ["incomplete", None]


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
async def test_what_cannot_pass_is_not_tried_again_at_the_same_provider(
    chat: Open, first: FakeProvider, second: FakeProvider, status: int
) -> None:
    first.always(http_response(status, {"error": {"message": "no", "code": status}}))
    second.always(answer())
    here = await chat(CHAIN)
    assert (await here.say()).status == 200
    assert (len(first.requests), len(second.requests)) == (1, 1)


# Retry-After


async def test_a_hint_to_wait_is_waited_for(chat: Open, first: FakeProvider) -> None:
    first.answer(http_response(429, b"", {"Retry-After": "1"}))
    first.answer(answer())
    here = await chat()
    before = asyncio.get_running_loop().time()
    assert (await here.say()).status == 200
    assert asyncio.get_running_loop().time() - before >= 1


async def test_a_hint_longer_than_the_patience_sends_to_the_next_provider(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(429, b"", {"Retry-After": "10"}))
    second.always(answer("From the second."))
    here = await chat(CHAIN)
    assert (await here.say()).json["response"] == "From the second."
    assert len(first.requests) == 1


async def test_a_hint_is_waited_for_when_the_others_are_left_alone(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(
        CHAIN,
        settings="retries: {attempts: 2, base: 0.01, patience: 0}",
        other="retries: {attempts: 1}, breaker: {requests: 1, open_seconds: 60}",
    )
    first.answer(http_response(401, b""))
    second.always(http_response(503, b""))
    assert (await here.say()).status == 502
    first.answer(http_response(429, b"", {"Retry-After": "1"}))
    first.answer(answer("After a second."))
    assert (await here.say()).json["response"] == "After a second."
    assert len(second.requests) == 1


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limited"), (503, "overloaded")])
async def test_a_hint_beyond_the_deadline_is_told_to_the_client_at_once_and_capped(
    chat: Open, first: FakeProvider, status: int, code: str
) -> None:
    first.always(http_response(status, b"", {"Retry-After": "3600"}))
    here = await chat()
    got = await here.say()
    assert (got.status, got.json["code"], got.headers["Retry-After"]) == (status, code, "60")
    assert len(first.requests) == 1


async def test_no_pause_goes_beyond_the_deadline_of_the_turn(
    chat: Open, first: FakeProvider
) -> None:
    first.always(http_response(429, b"", {"Retry-After": "3"}))
    here = await chat(settings="timeouts: {plain: 2}")
    got = await here.say()
    assert (got.status, got.json["code"]) == (429, "rate_limited")
    assert len(first.requests) == 1


async def pausing(here: Chat, first: FakeProvider) -> asyncio.Task[Answer]:
    """A turn that waits before it asks again."""
    first.always(http_response(429, b"", {"Retry-After": "10"}))
    saying = asyncio.create_task(here.say())
    await (await first.received()).closed_within(10)
    return saying


async def test_a_turn_that_is_stopped_in_a_pause_asks_nobody_again(
    chat: Open, first: FakeProvider
) -> None:
    here = await chat()
    saying = await pausing(here, first)
    await here.stop()
    assert (await saying).status == 200
    assert (await here.turn()).status is TurnStatus.STOPPED
    assert await here.asked() == [("first", MODEL, "rate_limit")]
    assert len(first.requests) == 1


async def test_a_server_that_stops_does_not_wait_for_a_pause_beyond_its_patience(
    chat: Open, first: FakeProvider
) -> None:
    here = await chat()
    saying = await pausing(here, first)
    await here.served.runtime.services.turns.drain(0)
    got = await saying
    assert (got.status, got.json["code"]) == (503, "shutting_down")
    turn = await here.turn()
    assert (turn.status, turn.error_code) == (TurnStatus.FAILED, "shutting_down")
    assert len(first.requests) == 1


# Deadlines


@pytest.mark.parametrize(
    "script",
    [
        pytest.param((Hold(),), id="silence"),
        pytest.param((SSE_HEAD, Flood(b": PROCESSING\n\n", pause=0.02)), id="comments"),
    ],
)
async def test_a_first_token_that_does_not_come_is_not_waited_for_twice(
    chat: Open, first: FakeProvider, second: FakeProvider, script: tuple[Step, ...]
) -> None:
    first.always(*script)
    second.always(answer("From the second."))
    here = await chat(CHAIN, settings="timeouts: {first_token: 0.2}")
    assert (await here.say()).json["response"] == "From the second."
    assert [error for _, _, error in await here.asked()] == ["timeout", None]
    await first.requests[0].closed_within(5)


async def test_words_that_come_too_slowly_are_ended_by_the_total_deadline(
    chat: Open, first: FakeProvider
) -> None:
    first.always(SSE_HEAD, Flood(said("x"), pause=0.1))
    here = await chat(settings="timeouts: {total: 0.8}")
    got = await here.say(stream=True)
    assert b'"provider_timeout"' in got.body
    turn = await here.turn()
    assert turn.status is TurnStatus.INTERRUPTED and turn.reply and set(turn.reply) == {"x"}
    assert [error for _, _, error in await here.asked()] == ["timeout"]
    await first.requests[0].closed_within(5)


# Too long for the model

TOO_LONG = http_response(
    400, {"error": {"code": "context_length_exceeded", "message": "maximum context length"}}
)


async def test_a_history_too_long_for_the_model_is_halved_once(
    chat: Open, first: FakeProvider
) -> None:
    here = await chat(CHAIN, system_prompt="Be kind.")
    for number in range(4):
        first.answer(answer(f"Answer {number}."))
        await here.say(f"Question {number}?")
    first.answer(TOO_LONG)
    first.answer(answer("It fits."))
    got = await here.say("Question 4?")
    assert (got.json["response"], got.json["history_truncated"]) == ("It fits.", True)
    sent = [message["content"] for message in first.requests[-1].json["messages"]]
    assert sent == ["Be kind.", *history(2), *history(3), "Question 4?"]
    assert (await here.turn()).history_truncated
    # What is stored is all of it.
    assert len(await here.served.transcript(here.bot, here.session)) == 10


def history(number: int) -> list[str]:
    return [f"Question {number}?", f"Answer {number}."]


async def test_what_is_too_long_with_half_of_its_history_is_the_clients_to_mend(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN)
    first.answer(answer())
    await here.say()
    first.always(TOO_LONG)
    got = await here.say()
    assert (got.status, got.json["code"]) == (422, "invalid_request")
    assert (len(first.requests), len(second.requests)) == (3, 0)


# The breaker

TOUCHY = "retries: {attempts: 1}, breaker: {requests: 4, open_seconds: OPEN}"


async def test_a_provider_that_fails_again_and_again_is_left_alone_and_tried_one_at_a_time(
    chat: Open, first: FakeProvider, second: FakeProvider, caplog: pytest.LogCaptureFixture
) -> None:
    first.always(http_response(503, b""))
    second.always(answer("From the second."))
    here = await chat(CHAIN, settings=TOUCHY.replace("OPEN", "0.5"))
    for _ in range(8):
        assert (await here.say()).json["response"] == "From the second."
    assert len(first.requests) == 4
    states = here.served.runtime.router.states
    assert states()[("first", MODEL)] is BreakerState.OPEN
    assert "fails too often" in caplog.text
    await asyncio.sleep(0.6)
    assert states()[("first", MODEL)] is BreakerState.HALF_OPEN
    # One tries it, the others do not wait for how that ends.
    first.always(Pause(0.3), answer("From the first."))
    sessions = [await here.anew() for _ in range(10)]
    answers = [got.json["response"] for got in await asyncio.gather(*(s.say() for s in sessions))]
    assert Counter(answers) == {"From the first.": 1, "From the second.": 9}
    assert len(first.requests) == 5
    assert states()[("first", MODEL)] is BreakerState.CLOSED
    assert "answers again" in caplog.text
    assert (await here.say()).json["response"] == "From the first."


async def test_a_try_that_fails_leaves_the_provider_alone_for_as_long_again(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(503, b""))
    second.always(answer())
    here = await chat(CHAIN, settings=TOUCHY.replace("OPEN", "0.3"))
    for _ in range(5):
        await here.say()
    await asyncio.sleep(0.4)
    for _ in range(3):
        await here.say()
    assert len(first.requests) == 5


async def test_when_all_are_left_alone_who_failed_least_recently_is_asked(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    touchy = TOUCHY.replace("OPEN", "60")
    first.always(http_response(503, b""))
    second.always(http_response(503, b""))
    here = await chat(CHAIN, settings=touchy, other=touchy)
    for _ in range(4):
        assert (await here.say()).status == 502
    assert (len(first.requests), len(second.requests)) == (4, 4)
    first.always(answer("From the first."))
    assert (await here.say()).json["response"] == "From the first."
    # That it answered closes it at once.
    assert here.served.runtime.router.states()[("first", MODEL)] is BreakerState.CLOSED


async def test_what_clients_do_wrong_does_not_open_the_breaker(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(400, {"error": {"message": "no"}}))
    second.always(answer())
    here = await chat(CHAIN, settings=TOUCHY.replace("OPEN", "60"))
    for _ in range(8):
        await here.say()
    assert len(first.requests) == 8


async def test_an_answer_that_hits_the_turns_deadline_counts_as_a_failure(
    chat: Open, first: FakeProvider
) -> None:
    first.always(Hold())
    settings = "timeouts: {plain: 0.2}, breaker: {requests: 2, open_seconds: 60}"
    here = await chat(settings=settings)
    for _ in range(2):
        assert (await here.say()).json["code"] == "provider_timeout"
    assert here.served.runtime.router.states()[("first", MODEL)] is BreakerState.OPEN


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def test_failures_older_than_the_window_do_not_count() -> None:
    clock = Clock()
    breaker = Breaker(BreakerSettings(share=0.5, requests=4, window=10), clock)
    for _ in range(3):
        breaker.force().failed()
    clock.now += 11
    for _ in range(3):
        breaker.force().failed()
    assert breaker.state is BreakerState.CLOSED
    breaker.force().failed()
    assert breaker.state is BreakerState.OPEN


def test_a_share_of_failures_below_the_set_one_opens_nothing() -> None:
    breaker = Breaker(BreakerSettings(share=0.5, requests=10), Clock())
    for _ in range(60):
        breaker.force().succeeded()
    for _ in range(59):
        breaker.force().failed()
    assert breaker.state is BreakerState.CLOSED
    breaker.force().failed()
    assert breaker.state is BreakerState.OPEN


def test_an_answer_that_breaks_off_counts_as_failed_and_once() -> None:
    breaker = Breaker(BreakerSettings(share=1.0, requests=4), Clock())
    for count in range(4):
        assert breaker.state is BreakerState.CLOSED, count
        ticket = breaker.ask()
        assert ticket is not None
        ticket.succeeded()
        ticket.failed()
    assert breaker.state is BreakerState.OPEN


def test_a_try_that_is_dropped_lets_another_one_try() -> None:
    clock = Clock()
    breaker = Breaker(BreakerSettings(requests=1, open_seconds=5), clock)
    old = breaker.ask()
    breaker.force().failed()
    assert breaker.ask() is None
    clock.now += 6
    trying = breaker.ask()
    assert trying is not None and breaker.ask() is None
    # One from before says nothing of the try.
    assert old is not None
    old.dropped()
    assert breaker.ask() is None
    trying.dropped()
    assert breaker.ask() is not None


def test_a_late_success_from_before_does_not_close_it() -> None:
    breaker = Breaker(BreakerSettings(requests=1), Clock())
    old = breaker.ask()
    breaker.force().failed()
    assert old is not None and not old.succeeded()
    assert breaker.state is BreakerState.OPEN


def test_a_forced_try_that_fails_late_does_not_open_what_another_closed() -> None:
    breaker = Breaker(BreakerSettings(requests=3), Clock())
    for _ in range(3):
        breaker.force().failed()
    one, other = breaker.force(), breaker.force()
    assert one.succeeded()
    other.failed()
    assert breaker.state is BreakerState.CLOSED


# Splitting


async def test_traffic_is_split_by_weight_and_a_session_stays_on_its_side(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(answer(model="a"))
    second.always(answer(model="b"))
    ask = "{provider: first, model: a, weight: 3}, {provider: second, model: b, weight: 1}"
    here = await chat(ask)
    sides = Counter[str]()
    for _ in range(120):
        one = await here.anew()
        models = {(await one.say()).json["model"] for _ in range(3)}
        assert len(models) == 1
        assert (await one.turn()).side in ("first/a", "second/b")
        sides.update(models)
    # 3 of 4, give or take four standard deviations.
    assert 71 <= sides["a"] <= 109


async def test_the_other_side_answers_when_one_fails(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    first.always(http_response(401, b""))
    second.always(answer("From b."))
    ask = "{provider: first, model: a, weight: 1000000}, {provider: second, model: b, weight: 1}"
    here = await chat(ask)
    assert (await here.say()).json["response"] == "From b."
    assert await here.asked() == [("first", "a", "authentication"), ("second", "b", None)]
    # The side is what was chosen, not who answered.
    assert (await here.turn()).side == "first/a"


# Racing


async def warmed(here: Chat, first: FakeProvider, *, stream: bool = False) -> None:
    """Lets it be known how long a first token takes."""
    first.always(answer("Usual."))
    for _ in range(20):
        assert b"Usual." in (await here.say(stream=stream)).body


@pytest.mark.parametrize("stream", [False, True])
async def test_when_the_first_token_is_late_the_next_is_asked_and_the_loser_hung_up_on(
    chat: Open, first: FakeProvider, second: FakeProvider, stream: bool
) -> None:
    second.always(SSE_HEAD, said("From the second."), END)
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first, stream=stream)
    assert second.requests == []
    first.always(Hold())
    got = await here.say(stream=stream)
    assert b"From the second." in got.body
    await first.requests[-1].closed_within(5)
    turn = await here.turn()
    assert (turn.status, turn.provider) == (TurnStatus.COMPLETED, "second")
    assert [(a["provider"], a.get("lost", False)) for a in turn.attempts] == [
        ("first", True),
        ("second", False),
    ]


async def test_how_long_answers_in_one_piece_take_says_nothing_of_streams(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first)
    first.always(SSE_HEAD, Pause(0.5), said("Late."), END)
    assert b"Late." in (await here.say(stream=True)).body
    assert second.requests == []


async def test_a_late_one_that_is_first_after_all_wins(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first)
    second.always(Hold())
    first.always(Pause(0.5), answer("Late but first."))
    assert (await here.say()).json["response"] == "Late but first."
    await second.requests[0].closed_within(5)
    turn = await here.turn()
    assert turn.provider == "first"


async def test_when_one_of_two_fails_the_other_is_waited_for(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first)
    first.always(Pause(0.4), http_response(500, b""))
    second.always(Pause(0.8), answer("From the second."))
    assert (await here.say()).json["response"] == "From the second."
    # The first was asked again meanwhile, and hung up on.
    told = [(a["provider"], a["error"], a.get("lost", False)) for a in (await here.turn()).attempts]
    assert told == [
        ("first", "overloaded", False),
        ("second", None, False),
        ("first", None, True),
    ]


async def test_one_that_fails_in_a_race_is_not_taken_for_the_one_that_answers(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first)
    first.always(Pause(0.8), answer("Late but good."))
    second.always(http_response(500, b""))
    assert (await here.say()).json["response"] == "Late but good."
    assert [error for _, _, error in await here.asked()] == [None, *["overloaded"] * 3]
    assert len(second.requests) == 3
    assert (await here.turn()).provider == "first"


async def test_in_a_race_one_that_fails_is_asked_again_while_the_other_hangs(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first)
    first.answer(Pause(0.3), http_response(503, b""))
    first.always(answer("At the second try."))
    second.always(Hold())
    assert (await here.say()).json["response"] == "At the second try."


@pytest.mark.parametrize("stream", [False, True])
async def test_the_rest_of_the_chain_is_asked_when_both_of_a_race_hang(
    chat: Open, first: FakeProvider, second: FakeProvider, stream: bool
) -> None:
    impatient = "timeouts: {first_token: 0.5}"
    ask = f"{CHAIN}, {{provider: first, model: third}}"
    here = await chat(ask, hedge=True, settings=impatient, other=impatient)
    await warmed(here, first, stream=stream)
    first.answer(Hold())
    second.always(Hold())
    first.always(SSE_HEAD, said("From the third."), END)
    assert b"From the third." in (await here.say(stream=stream)).body
    assert len(second.requests) == 1


async def test_one_that_hangs_in_races_is_left_alone(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True, settings="breaker: {requests: 24, share: 0.1}")
    await warmed(here, first)
    first.always(Hold())
    second.always(answer("From the second."))
    for _ in range(6):
        assert (await here.say()).json["response"] == "From the second."
    assert here.served.runtime.router.states()[("first", MODEL)] is BreakerState.OPEN
    assert len(first.requests) == 24


async def test_a_plain_answer_that_has_begun_has_what_is_left_of_the_turn(
    chat: Open, first: FakeProvider
) -> None:
    pieces = [step for word in ["slow", "but", "whole"] for step in (said(word), Pause(0.3))]
    first.always(SSE_HEAD, *pieces, END)
    here = await chat(CHAIN, settings="timeouts: {first_token: 0.4}")
    assert (await here.say()).json["response"] == "slowbutwhole"


async def test_a_tool_that_nobody_gave_is_no_answer(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    call = {"index": 0, "id": "x", "function": {"name": "f", "arguments": "{}"}}
    first.always(SSE_HEAD, sse({"choices": [{"delta": {"tool_calls": [call]}}]}), END)
    second.always(answer("From the second."))
    here = await chat(CHAIN)
    assert (await here.say()).json["response"] == "From the second."
    assert [error for _, _, error in await here.asked()] == [*["empty"] * 3, None]


async def test_a_tool_with_an_index_that_is_none_is_the_services_failure(
    chat: Open, first: FakeProvider, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"index": 9999, "id": "x", "function": {"name": "f", "arguments": "{}"}}
    first.always(SSE_HEAD, sse({"choices": [{"delta": {"tool_calls": [call]}}]}), END)
    here = await chat()
    assert (await here.say()).json["code"] == "provider_failed"
    assert [error for _, _, error in await here.asked()] == ["protocol"] * 3
    assert "raised" not in caplog.text


async def test_who_refused_in_a_race_is_not_asked_again_although_the_other_failed_later(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first)
    first.always(Pause(0.4), http_response(401, b""))
    second.always(Pause(0.6), http_response(503, b""))
    assert (await here.say()).status == 502
    assert len(first.requests) == 21


async def test_stopping_a_race_hangs_up_on_both_and_keeps_the_answer_stopped(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True)
    await warmed(here, first, stream=True)
    first.always(Hold())
    second.always(Hold())
    saying = asyncio.create_task(here.say(stream=True))
    await second.received()
    await here.stop()
    assert b'"abort"' in (await saying).body
    await first.requests[-1].closed_within(5)
    await second.requests[-1].closed_within(5)
    turn = await here.turn()
    assert turn.status is TurnStatus.STOPPED
    assert [attempt["error"] for attempt in turn.attempts] == [None, None]


async def test_a_race_that_hits_the_deadline_hangs_up_on_both_and_both_failed(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, hedge=True, settings="timeouts: {plain: 2}")
    await warmed(here, first)
    first.always(Hold())
    second.always(Hold())
    assert (await here.say()).json["code"] == "provider_timeout"
    await first.requests[-1].closed_within(5)
    await second.requests[-1].closed_within(5)
    assert [error for _, _, error in await here.asked()] == ["timeout", "timeout"]


async def test_without_hedging_nobody_else_is_asked_however_late_it_is(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN)
    await warmed(here, first)
    first.always(Pause(0.5), answer("Late."))
    assert (await here.say()).json["response"] == "Late."
    assert second.requests == []


# Prices

COUNTED = {"prompt_tokens": 1000, "completion_tokens": 100}


async def test_the_price_table_gives_the_cost_that_a_provider_does_not_tell(
    chat: Open, first: FakeProvider
) -> None:
    first.answer(answer(usage=COUNTED))
    first.answer(answer(usage={**COUNTED, "cost": 0.5}))
    first.answer(answer(model="other", usage=COUNTED))
    first.answer(answer(model="other", usage={"prompt_tokens": 1000}))
    prices = 'prices: [{match: "test/*", input: 2, output: 10}]'
    here = await chat(settings=prices)
    costs = [(await here.say()).json["usage"]["cost_usd"] for _ in range(4)]
    # 1,000 tokens at 2 and 100 at 10 USD a million; then what the provider says; then the price
    # of the model that was asked for; and unknown while a count is.
    assert costs == [pytest.approx(0.003), 0.5, pytest.approx(0.003), None]


async def test_the_cost_is_unknown_while_that_of_one_attempt_is(
    chat: Open, first: FakeProvider, second: FakeProvider
) -> None:
    here = await chat(CHAIN, settings="timeouts: {first_token: 0.2}")
    second.always(answer("From the second.", usage={**COUNTED, "cost": 0.5}))
    # What the first one did in its time is not known, what it refuses costs nothing.
    first.answer(Hold())
    assert (await here.say()).json["usage"]["cost_usd"] is None
    first.always(http_response(503, b""))
    assert (await here.say()).json["usage"]["cost_usd"] == 0.5


async def test_what_all_refused_cost_nothing(chat: Open, first: FakeProvider) -> None:
    here = await chat()
    first.always(http_response(503, b""))
    assert (await here.say()).status == 502
    assert (await here.turn()).usage == Usage(cost_usd=0.0)
    # One that broke off while a model may have worked is unknown.
    first.always(Reset())
    assert (await here.say()).status == 502
    assert (await here.turn()).usage == Usage()


async def test_without_a_price_the_cost_is_unknown_and_never_0(
    chat: Open, first: FakeProvider
) -> None:
    first.always(answer(usage=COUNTED))
    here = await chat(settings='prices: [{match: "others/*", input: 2, output: 10}]')
    assert (await here.say()).json["usage"]["cost_usd"] is None


def test_cached_tokens_have_their_own_price() -> None:
    prices = [Price("m", input=10, output=0, cached=1)]
    usage = Usage(input_tokens=1_000_000, output_tokens=5, cached_tokens=900_000)
    assert priced(usage, ["m"], prices).cost_usd == pytest.approx(1.9)
