"""What llmock, which breaks answers as model providers do, says of chatd as their client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from chatd.domain import TurnStatus
from tests.conftest import Serve
from tests.gateways import Llmock, llmock
from tests.support import KEY

CONFIG = """
storage: %(storage)s
providers:
  mock:
    use: openai_compatible
    base_url: "LLMOCK/v1"
    retries: {attempts: 3, base: 0.2}
    timeouts: {plain: 8, total: 8, first_token: 2, idle: 2}
    breaker: {requests: 1000}
models:
  - {match: "*", ask: [mock]}
"""
LONG = "Please tell me in a few sentences what a chatbot is good for."
JITTER = frozenset({"no_backoff"})
"""llmock takes two pauses for constant when the second is not longer. Full jitter draws each
between 0 and a bound, and only the bound doubles: it happens about every fourth time."""


@dataclass(frozen=True)
class Case:
    """What llmock does, what comes of the turn, and what llmock says of it.

    :param ends: how a turn ends.
    :param attempts: requests that the turn takes.
    :param findings: what must be held against chatd, and `may` what may be.
    :param calls: how many different requests llmock takes the attempts for.
    """

    does: tuple[dict[str, Any], ...]
    ends: TurnStatus
    attempts: int
    findings: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    calls: int = 1


def fail(status: int, times: int | None = 1, **more: Any) -> tuple[dict[str, Any], ...]:
    return ({"type": "fail", "status": status, "times": times, **more},)


def breaks(kind: str, after: int, times: int | None = 1) -> tuple[dict[str, Any], ...]:
    """A fault after so many chunks; the first one has no text in it, the second one has."""
    fault = {"type": "stream_fault", "kind": kind, "after_chunks": after, "times": times}
    return ({**fault, "stall_seconds": 5},)


PASSING = (408, 429, 500, 502, 503, 504, 529)
FINAL = (400, 401, 402, 403, 404, 413, 422)
COMPLETED, FAILED, BROKEN = TurnStatus.COMPLETED, TurnStatus.FAILED, TurnStatus.INTERRUPTED
TOO_LONG = {"code": "context_length_exceeded", "message": "maximum context length is 8 tokens"}
BOTH = {
    "nothing": Case((), COMPLETED, 1),
    **{f"{status}": Case(fail(status), COMPLETED, 2) for status in PASSING},
    **{f"{status}": Case(fail(status), FAILED, 1) for status in FINAL},
    # A conflict says nothing of when it passes, so it is told and not tried again.
    "409": Case(fail(409), FAILED, 1, frozenset({"gave_up"})),
    "429 twice": Case(fail(429, 2), COMPLETED, 3, may=JITTER),
    "429 that asks for a second": Case(fail(429, 2, retry_after=1), COMPLETED, 3),
    "503 that asks for a second": Case(fail(503, retry_after=1), COMPLETED, 2),
    # Longer than the turn may take: nobody waits, and the client is told when to come again.
    "429 that asks for a minute": Case(
        fail(429, retry_after=60), FAILED, 1, frozenset({"gave_up"})
    ),
    "an outage": Case(fail(503, None), FAILED, 3, may=JITTER),
    "a prompt too long": Case(fail(400, **TOO_LONG), FAILED, 1),
    "a delay": Case(({"type": "delay", "seconds": 0.3},), COMPLETED, 1),
    "an answer of one word": Case(({"type": "reply", "text": "Yes."},), COMPLETED, 1),
    "an empty answer": Case(({"type": "reply", "text": ""},), COMPLETED, 2, calls=2),
}
STREAMED = {
    "a slow first token": Case(({"type": "slow_first_token", "seconds": 0.3},), COMPLETED, 1),
    # Before the first word another attempt can mend it, and does.
    "a disconnect before any chunk": Case(breaks("disconnect", 0), COMPLETED, 2),
    "a disconnect before a word": Case(breaks("disconnect", 1), COMPLETED, 2),
    "a cut before a word": Case(breaks("truncate", 1), COMPLETED, 2),
    "a cut before any chunk": Case(breaks("truncate", 0), COMPLETED, 2),
    "a broken chunk before a word": Case(breaks("malformed", 1), COMPLETED, 2),
    "cuts without end": Case(
        breaks("truncate", 1, None), FAILED, 3, frozenset({"truncated_stream_accepted"}), JITTER
    ),
    # What took its time is not asked a second time.
    "a stall before a word": Case(breaks("stall", 1), FAILED, 1),
    # After it nobody may: the client has read it. llmock counts nothing but another attempt; what
    # chatd does with these is asserted below, an error to the client and a turn that is broken off.
    "a disconnect after words": Case(breaks("disconnect", 4), BROKEN, 1, frozenset({"gave_up"})),
    "a cut after words": Case(
        breaks("truncate", 4), BROKEN, 1, frozenset({"truncated_stream_accepted"})
    ),
    "a broken chunk after words": Case(
        breaks("malformed", 4), BROKEN, 1, frozenset({"malformed_chunk_ignored"})
    ),
    "a stall after words": Case(breaks("stall", 4), BROKEN, 1),
}


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llmock]:
    # What is sent at once counts as read to its end, whether or not it was.
    pace = ("--stream-chunk-delay-ms", "20")
    with llmock(tmp_path_factory.mktemp("llmock"), *pace) as running:
        yield running


async def judged(serve: Serve, mock: Llmock, case: Case, *, stream: bool) -> None:
    served = await serve(CONFIG.replace("LLMOCK", mock.url))
    bot = await served.add_bot()
    session = await served.session(bot)
    await mock.breaks(*case.does)
    answer = await served.chat(bot, session, LONG, stream=stream)
    page = await served.runtime.services.storage.list_messages(session, bot.id, limit=10)
    turn = await served.runtime.services.storage.get_turn(page.data[-1].turn_id or "", bot.id)
    assert turn is not None
    assert (turn.status, len(turn.attempts)) == (case.ends, case.attempts)
    assert len(await mock.requests()) == case.attempts
    told = b'"type":"error"' in answer.body if stream else answer.status >= 400
    assert told is (case.ends is not COMPLETED)
    assert bool(turn.reply) is (case.ends is not FAILED)
    verdict = await mock.verdict()
    found = {finding["code"] for finding in verdict["findings"]}
    assert case.findings <= found <= case.findings | case.may, verdict
    assert verdict["calls"] == case.calls


@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
async def test_a_plain_answer_is_asked_for_as_llmock_wants_it(
    serve: Serve, mock: Llmock, case: Case
) -> None:
    await judged(serve, mock, case, stream=False)


@pytest.mark.parametrize("case", {**BOTH, **STREAMED}.values(), ids={**BOTH, **STREAMED})
async def test_a_stream_is_asked_for_as_llmock_wants_it_or_ends_in_an_error_that_is_told(
    serve: Serve, mock: Llmock, case: Case
) -> None:
    await judged(serve, mock, case, stream=True)


@pytest.mark.parametrize("kind", ["malformed_arguments", "unknown_tool"])
async def test_a_broken_tool_call_is_handed_to_the_client_whose_tools_they_are(
    serve: Serve, mock: Llmock, kind: str
) -> None:
    served = await serve(CONFIG.replace("LLMOCK", mock.url))
    await served.add_bot()
    await mock.breaks({"type": "tool_fault", "kind": kind})
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    answer = await served.post(
        "/v1/chat/completions",
        {
            "model": "test/model",
            "messages": [{"role": "user", "content": "What is the weather?"}],
            "tools": [tool],
        },
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert answer.status == 200
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1
    verdict = await mock.verdict()
    assert verdict["passed"] and verdict["findings"] == []
