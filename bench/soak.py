"""Many turns of one server on SQLite: what it holds of memory and open files before and after.

`python -m bench.soak --turns 100000` takes some minutes, on loopback alone. Each of 64 connections talks
in a session of its own; every fifth turn is streamed. After a warm-up, memory and files are read between
parts, when nothing runs. It exits with 1 when memory grew by more than 5 MiB or files stayed open.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bench import growth, load, wording
from bench.processes import resident
from bench.subjects import Mock, Subject

MOST_FILES = wording.SESSIONS + 1
"""How many more files may be open than before the first turn: a connection to the model for each that is
talked to at once, which are kept, and what libuv has in reserve for when there are too many."""

MOST_MIB = 5.0
"""How much more memory there may be at the end."""

PARTS = 20
REST_SECONDS = 1.0
"""How long after the last answer it is looked at."""


@dataclass(frozen=True)
class Held:
    """What a server holds after so many turns."""

    turns: int
    mib: float
    files: int

    def __str__(self) -> str:
        return f"{self.turns:>9,} turns  {self.mib:7.2f} MiB  {self.files:4} open files"


def held(subject: Subject, turns: int) -> Held:
    """What it holds now, when what just ended is put away."""
    time.sleep(REST_SECONDS)
    pids = subject.pids()
    files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    return Held(turns, resident(pids), files)


def talk(subject: Subject, turns: int) -> int:
    """About so many turns, a fifth of them streamed; how many there were."""
    cores = frozenset(os.sched_getaffinity(0))
    done = 0
    for stream, least in ((False, turns - turns // 5), (True, turns // 5)):
        job = replace(subject.job(0, stream=stream), warm=0, least=least)
        found = load.run(job, cores)
        # What came after the end is no part of the rate, but was a turn.
        done += max(found.turns, least)
    return done


def soak(folder: Path, warm: int, turns: int, parts: int = PARTS) -> list[Held]:
    """What a server holds before its first turn, after the warm-up, and after each part of the turns."""
    mock = Mock(folder / "mock")
    subject = growth.on(folder / "chatd", sessions=4 * wording.SESSIONS, history=wording.HISTORY)
    try:
        mock.start("", None)
        subject.start(mock.url, None)
        found = [held(subject, 0)]
        talk(subject, warm)
        found.append(held(subject, 0))
        while found[-1].turns < turns:
            found.append(held(subject, found[-1].turns + talk(subject, turns // parts)))
            print(found[-1], flush=True)
        return found
    finally:
        subject.close()
        mock.close()


def faults(found: list[Held]) -> list[str]:
    """What grew, in words."""
    idle, first, last = found[0], found[1], found[-1]
    told = []
    if last.mib - first.mib > MOST_MIB:
        told.append(f"memory grew by {last.mib - first.mib:.2f} MiB")
    if (more := last.files - idle.files - MOST_FILES) > 0:
        told.append(f"{more} more files are open")
    return told


def main() -> None:
    """Reads the options, and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--turns", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=5_000, help="turns before the first look")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chatd-soak-") as folder:
        found = soak(Path(folder), options.warm_up, options.turns)
    print(f"after the warm-up: {found[1]}")
    if told := faults(found):
        sys.exit("; ".join(told))


if __name__ == "__main__":
    main()
