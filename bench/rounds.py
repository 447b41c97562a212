"""Plain turns and first tokens: every subject in turn, round after round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.load import run
from bench.processes import resident
from bench.subjects import Mock, Subject
from bench.targets import Samples

TIMED_RATE = 100
"""Turns a second at which latency is measured."""
STREAMED_RATE = 10
"""Streams that begin in a second, for the time to the first token."""
MOCK_TIMES = 10
"""How many times as quick as anything measured the mock has to be."""


@dataclass(frozen=True)
class Plan:
    """How often and how long, in seconds, each thing is measured.

    :param again: how often plain turns are measured once more, while what CI holds is missed: a
        neighbour that was busy for a moment may have been the reason.
    """

    rounds: int = 7
    seconds: float = 4
    timed_rounds: int = 3
    timed_seconds: float = 10
    streamed_rounds: int = 3
    streamed_seconds: float = 5
    starts: int = 5
    again: int = 0


SHORT = Plan(7, 1.5, timed_rounds=1, timed_seconds=3, streamed_rounds=0, starts=1, again=2)
QUICK = Plan(3, 2, timed_rounds=1, timed_seconds=5, streamed_rounds=1, streamed_seconds=5, starts=1)
"""Shows that every subject works, and about how quick it is."""


def percentile(values: Sequence[float], percent: int) -> float:
    """What so many of 100 are within."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Rounds:
    """Measures running subjects, and keeps what each round shows."""

    def __init__(
        self, mock: Mock, subjects: Sequence[Subject], samples: Samples, load: frozenset[int]
    ) -> None:
        self._mock = mock
        self._subjects = subjects
        self._samples = samples
        self._load = load

    def warm_up(self) -> None:
        """Lets every subject answer for a while, and checks the mock against the quickest."""
        self.check_mock(max(run(each.job(1), self._load).rate for each in self._subjects))

    def check_mock(self, quickest: float) -> None:
        """Ends the run when the mock's core could not answer ten times as often as that."""
        result = run(self._mock.job(1), self._load)
        self._samples["mock"]["rate"].append(result.rate)
        self._samples["mock"]["cpu"].append(result.cpu_each * 1e3)
        able = 1 / result.cpu_each
        if able < MOCK_TIMES * quickest:
            raise SystemExit(
                f"The mock could answer {able:.0f} requests a second, which is not {MOCK_TIMES} "
                f"times the {quickest:.0f} of the quickest subject: the figures would be its own."
            )

    def idle(self) -> None:
        """Reads the memory of servers that were asked nothing yet."""
        for subject in self._subjects:
            self._samples[subject.name]["idle"].append(resident(subject.pids()))

    def saturate(self, plan: Plan) -> None:
        """Turns a second, CPU of each and memory, with every connection asking without a pause."""
        for _ in range(plan.rounds):
            for subject in self._subjects:
                result = run(subject.job(plan.seconds), self._load)
                found = self._samples[subject.name]
                found["rate"].append(result.rate)
                found["cpu"].append(result.cpu_each * 1e3)
                found["memory"].append(result.memory)
        self.check_mock(max(max(self._samples[each.name]["rate"]) for each in self._subjects))

    def timed(self, plan: Plan) -> None:
        """Milliseconds that a turn takes, of those that can keep up with the rate."""
        quick = [each for each in self._subjects if self._keeps_up(each)]
        for _ in range(plan.timed_rounds):
            for subject in (self._mock, *quick):
                times = run(subject.job(plan.timed_seconds, rate=TIMED_RATE), self._load).times
                for percent in (50, 99):
                    value = percentile(times, percent) * 1e3
                    self._samples[subject.name][f"p{percent}"].append(value)

    def _keeps_up(self, subject: Subject) -> bool:
        return statistics.median(self._samples[subject.name]["rate"]) > 1.5 * TIMED_RATE

    def first_tokens(self, plan: Plan) -> None:
        """Milliseconds to the first token of a stream, at a rate that every subject keeps up with."""
        for _ in range(plan.streamed_rounds):
            for subject in (self._mock, *self._subjects):
                job = subject.job(plan.streamed_seconds, rate=STREAMED_RATE, stream=True)
                value = percentile(run(job, self._load).firsts, 50) * 1e3
                self._samples[subject.name]["first"].append(value)


def cold_starts(
    subjects: Sequence[Subject], samples: Samples, mock: Mock, cores: frozenset[int], times: int
) -> None:
    """Seconds from the start of a process to its first 200; each is started and ended in turn.

    What starts slowly is started less often.
    """
    for number in range(times):
        for subject in subjects:
            if number and samples[subject.name]["cold"][0] > 5 and number >= 2:
                continue
            subject.close()
            subject.start(mock.url, cores)
            samples[subject.name]["cold"].append(subject.cold_start)
            subject.close()
            time.sleep(0.1)
