"""The short form of the bench: chatd on SQLite beside a bare Tornado proxy, in one run."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chatd_plugins.sqlite import open_sqlite

from bench import fill, load, report, targets
from bench.mock import plain
from bench.subjects import Mock
from bench.targets import Target, no_samples
from bench.wording import BOT, PROMPT_MESSAGES, QUESTION, REPLY, chat, completion
from chatd.domain import Session
from chatd.storage import BegunTurn
from chatd.testing.storage import a_turn

ROOT = Path(__file__).parent.parent
HALF = Target("half of the limit", "sqlite", "rate", at_least=0.5, over="limit")


@pytest.fixture
def mock(tmp_path: Path) -> Iterator[Mock]:
    """The mock model, on a port of its own."""
    model = Mock(tmp_path / "mock")
    model.start("", None)
    yield model
    model.close()


def judged(target: Target, **rates: list[float]) -> targets.Verdict:
    samples = no_samples()
    for subject, values in rates.items():
        samples[subject]["rate"] = values
    verdict = target.judge(samples)
    assert verdict is not None
    return verdict


def test_every_answer_is_counted_and_its_text_is_checked(mock: Mock) -> None:
    cores = frozenset(os.sched_getaffinity(0))
    result = load.run(mock.job(0.2), cores)
    assert len(result.times) == result.turns > 0
    wrong = dataclasses.replace(mock.job(0.2), expect=b"What the mock does not say")
    with pytest.raises(SystemExit):
        load.run(wrong, cores)


def test_a_turn_with_another_history_than_the_bench_means_ends_it(tmp_path: Path) -> None:
    cores = frozenset(os.sched_getaffinity(0))
    model = Mock(tmp_path / "mock", "--messages", str(PROMPT_MESSAGES))
    model.start("", None)
    try:
        asked = dataclasses.replace(model.job(0.2), requests=[completion("key")])
        assert load.run(asked, cores).turns > 0
        shorter = completion("key").replace(b'{"role": "system"', b'{"none": "system"', 1)
        with pytest.raises(SystemExit):
            load.run(dataclasses.replace(asked, requests=[shorter]), cores)
    finally:
        model.close()


class HangsUp(socketserver.BaseRequestHandler):
    """Answers so many requests of a connection, reads another, and closes the connection."""

    answers = 1

    def handle(self) -> None:
        for _ in range(self.answers):
            if not self.request.recv(1 << 16):
                return
            self.request.sendall(plain(0))
        self.request.recv(1 << 16)


@contextmanager
def hanging_up(answers: int) -> Iterator[load.Job]:
    """A job for a server that hangs up after so many answers."""
    handler = type("Handler", (HangsUp,), {"answers": answers})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        requests = [chat("-")] * 2
        try:
            yield load.Job(server.server_address[1], requests, REPLY.encode(), 0.2)
        finally:
            server.shutdown()
            thread.join()


def test_a_request_that_meets_a_connection_being_closed_is_asked_again() -> None:
    with hanging_up(answers=3) as job:
        result = load.run(job, frozenset(os.sched_getaffinity(0)))
    assert len(result.times) == result.turns > 3 * len(job.requests)


def test_a_server_that_answers_nothing_ends_the_measuring() -> None:
    with hanging_up(answers=0) as job, pytest.raises(SystemExit):
        load.run(job, frozenset(os.sched_getaffinity(0)))


def test_first_tokens_come_before_the_end_of_a_stream(mock: Mock) -> None:
    result = load.run(mock.job(0.5, rate=50, stream=True), frozenset(os.sched_getaffinity(0)))
    assert len(result.firsts) == len(result.times) > 0
    assert all(first <= whole for first, whole in zip(result.firsts, result.times, strict=True))


@pytest.mark.alone
def test_a_turn_is_as_quick_as_it_is_to_be(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--short", "--json", str(written)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())
    assert [target["bound"] for target in found["targets"]] == ["≥ 0.6x", "≤ 1.786x"]
    assert len(found["rounds"]["sqlite"]["rate"]) >= 5


def test_a_target_is_missed_only_by_more_than_the_noise() -> None:
    limit = [100.0] * 5
    assert judged(HALF, sqlite=[50, 60, 50, 60, 50], limit=limit).met
    noisy = judged(HALF, sqlite=[30, 45, 48, 58, 60], limit=limit)
    assert (noisy.met, noisy.missed) == (False, False)
    worse = judged(HALF, sqlite=[40, 41, 41, 42, 43], limit=limit)
    assert (worse.met, worse.missed) == (False, True)


def test_rounds_are_compared_side_by_side() -> None:
    """A machine that is half as quick in one round says nothing of the ratio."""
    verdict = judged(HALF, sqlite=[60, 30, 60], limit=[100, 50, 100])
    assert (verdict.value, verdict.noise) == (pytest.approx(0.6), pytest.approx(0))


def test_figures_of_a_run_replace_those_of_the_page_and_nothing_else() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    once = report.into_page(page, [[["", "turns/s"], ["chatd on sqlite", "1234"]]])
    assert "| chatd on sqlite | 1234 |" in once
    again = report.into_page(once, [[["", "turns/s"], ["chatd on sqlite", "5678"]]])
    assert again == once.replace("1234", "5678")
    assert page.partition(report.BEGIN)[0] == again.partition(report.BEGIN)[0]
    assert page.partition(report.END)[2] == again.partition(report.END)[2]


async def test_sessions_that_are_filled_in_hold_what_was_said(tmp_path: Path) -> None:
    bots = [BOT, *fill.new_bots(1)]
    # In a thread, since it runs an event loop of its own.
    ids = await asyncio.to_thread(fill.fill, tmp_path / "chatd.db", bots, 3, 4)

    async def histories() -> list[list[str]]:
        storage = await open_sqlite({"path": str(tmp_path / "chatd.db")})
        try:
            found = []
            for place, id in enumerate(ids):
                begun = await storage.begin_turn(a_turn(Session(id, bots[place % 2])))
                assert isinstance(begun, BegunTurn)
                found.append([message.content for message in begun.history])
            return found
        finally:
            await storage.close()

    assert await histories() == [[QUESTION, REPLY] * 2] * 3
