"""`make bench`: starts everything on loopback, and prints what it measured as one table."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import chart, failover, growth, plain, report, storage, streams, subjects, wording
from bench.load import ROOT
from bench.processes import split_cores
from bench.rounds import QUICK, SHORT, Plan
from bench.subjects import Mock, Subject
from bench.targets import Samples, no_samples, verdicts
from tests.postgres import Supabase

WORK = ROOT / "build" / "bench"
"""On the disk of the checkout: where temporary files are kept in memory, storing would cost nothing."""
PARTS = ("turns", "streams", "growth", "storage", "failover")
USUAL = PARTS[:3]
OPEN_FILES = 8192
"""What the mock needs for a thousand streams, and a server twice."""
MOST_SESSIONS = 1_000_000
PACE = ("--interval", "0.01")
"""How the mock streams. All at once, the time to the first token would hold the work on the others."""
QUICK_SIZES = growth.Sizes(
    sessions=(100, 10_000), chatbots=(1, 100), streams=(0, 100), history=(0, 20, 100), rounds=2
)


@dataclass
class Found:
    """What was measured, part by part."""

    samples: Samples = field(default_factory=no_samples)
    titles: dict[str, str] = field(
        default_factory=lambda: {
            "mock": "the mock model itself",
            "limit": "limit: bare Tornado proxy",
            "sqlite": "chatd on sqlite",
        }
    )
    grown: list[growth.Series] = field(default_factory=list)
    others: dict[str, list[list[str]]] = field(default_factory=dict)


def turns(samples: Samples, chosen: argparse.Namespace) -> list[Subject]:
    """The part `turns`: the subjects that were measured, the mock first."""
    plan = SHORT if chosen.short else QUICK if chosen.quick else Plan()
    with ExitStack() as stack:
        cores = split_cores()
        mock = Mock(WORK / "mock", *PACE, "--messages", str(wording.PROMPT_MESSAGES))
        stack.callback(mock.close)
        mock.start("", cores[1])
        measured = [subjects.limit(WORK / "limit"), plain.on_sqlite(WORK / "sqlite")]
        if not chosen.short:
            database = Supabase()
            stack.callback(database.close)
            measured += [*plain.on_postgresql(WORK, database), subjects.litellm(WORK / "litellm")]
        plain.measure(stack, measured, mock, samples, plan, cores)
        return [mock, *measured]


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=USUAL, help="parts, the first three else"
    )
    parser.add_argument(
        "--short", action="store_true", help="turns on SQLite and of the limit alone, in a minute"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes of what grows, and fewer rounds"
    )
    parser.add_argument(
        "--sessions", type=int, default=MOST_SESSIONS, help="how many growth has at most"
    )
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    parser.add_argument("--charts", type=Path, help="a folder for turns.svg and growth.svg")
    parser.add_argument("--page", type=Path, help="a page whose figures are replaced")
    chosen = parser.parse_args()
    chosen.only = ["turns"] if chosen.short else chosen.only
    return chosen


def show(tables: list[list[list[str]]], page: Path | None) -> None:
    """Prints the tables, and puts them into a page when that is asked for."""
    kept = [table for table in tables if len(table) > 1]
    print("\n" + "\n\n".join(report.text(table) for table in kept))
    if page:
        page.write_text(report.into_page(page.read_text(), kept))


def draw(folder: Path, found: Found) -> None:
    """Writes the charts of the parts that were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    if found.samples["limit"]["rate"]:
        (folder / "turns.svg").write_text(chart.bars(found.samples, found.titles))
    if found.grown:
        (folder / "growth.svg").write_text(chart.growth(found.grown))


def measure(chosen: argparse.Namespace) -> Found:
    """Measures the parts that were asked for."""
    found = Found()
    if "turns" in chosen.only:
        found.titles = {each.name: each.title for each in turns(found.samples, chosen)}
    if "streams" in chosen.only:
        plan = streams.Streams(rounds=1) if chosen.quick else streams.Streams()
        streams.measure(WORK / "streams", plan, found.samples, split_cores())
    if "growth" in chosen.only:
        sizes = QUICK_SIZES if chosen.quick else growth.Sizes()
        sizes = replace(sizes, sessions=[n for n in sizes.sessions if n <= chosen.sessions])
        found.grown = growth.measure(WORK / "growth", sizes, split_cores())
    for part, run in (("storage", storage.measure), ("failover", failover.measure)):
        if part in chosen.only:
            found.others[part] = run(WORK / part)
    return found


def main() -> None:
    """Measures what was asked for, and exits with 1 when a target is missed."""
    chosen = options()
    shutil.rmtree(WORK, ignore_errors=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(OPEN_FILES, hard)), hard))
    found = measure(chosen)
    judged = verdicts(found.samples, short=chosen.short)
    tables = [report.rows(found.samples, found.titles)] if found.samples else []
    tables += [report.judged(judged), growth.table(found.grown), *found.others.values()]
    show(tables, chosen.page)
    if chosen.json:
        more = {"growth": growth.as_json(found.grown), **found.others}
        text = json.dumps(report.document(found.samples, judged, more), indent=1)
        chosen.json.write_text(text + "\n")
    if chosen.charts:
        draw(chosen.charts, found)
    sys.exit(any(verdict.missed for verdict in judged))


if __name__ == "__main__":
    main()
