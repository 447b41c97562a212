"""`make bench`: starts everything on loopback, and prints what it measured as one table."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from bench import plain, report, subjects
from bench.load import ROOT
from bench.processes import split_cores
from bench.rounds import SHORT, Plan
from bench.subjects import Mock
from bench.targets import no_samples, verdicts
from tests.postgres import Supabase

WORK = ROOT / "build" / "bench"
"""On the disk of the checkout: where temporary files are kept in memory, storing would cost nothing."""


def main() -> None:
    """Reads the options, measures, and exits with 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="chatd on SQLite and the limit alone")
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    samples, cores = no_samples(), split_cores()
    with ExitStack() as stack:
        mock = Mock(WORK / "mock")
        stack.callback(mock.close)
        mock.start("", cores[1])
        chosen = [subjects.limit(WORK / "limit"), plain.on_sqlite(WORK / "sqlite")]
        if not options.short:
            database = Supabase()
            stack.callback(database.close)
            chosen += [*plain.on_postgresql(WORK, database), subjects.litellm(WORK / "litellm")]
        plan = SHORT if options.short else Plan()
        plain.measure(stack, chosen, mock, samples, plan, cores)
    titles = {each.name: each.title for each in (mock, *chosen)}
    print(report.text(report.rows(samples, titles)))
    found = verdicts(samples, short=options.short)
    print()
    print(report.text(report.judged(found)))
    if options.json:
        options.json.write_text(json.dumps(report.document(samples, found, {}), indent=1))
    sys.exit(any(verdict.missed for verdict in found))


if __name__ == "__main__":
    main()
