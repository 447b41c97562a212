"""What a run found, as a table, as Markdown and as JSON."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.targets import Samples, Verdict, spread, values_of

COLUMNS = (
    ("turns/s", "rate", ".0f", None),
    ("of limit", "rate", ".2f", "limit"),
    ("CPU ms/turn", "cpu", ".3f", None),
    ("of limit", "cpu", ".2f", "limit"),
    ("added p50 ms", "p50", ".2f", "mock"),
    ("added p99 ms", "p99", ".2f", "mock"),
    ("first token ms", "first", ".2f", "mock"),
    ("idle MiB", "idle", ".0f", None),
    ("load MiB", "memory", ".0f", None),
    ("start s", "cold", ".2f", None),
    ("streams: gap p99 ms", "gap", ".0f", None),
    ("core %", "stream_cpu", ".0f", None),
    ("load's core %", "load_cpu", ".0f", None),
    ("KiB each", "stream_memory", ".0f", None),
)
"""Heading, measure, format, and whose value it is compared with."""
ADDED = ("p50", "p99", "first")
"""Measures that are told as what is added to the mock's."""
NOTHING = "-"
"""What was not measured."""


def machine() -> dict[str, Any]:
    """The kind of machine: what figures depend on, and nothing that tells whose it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }


def cell(samples: Samples, subject: str, measure: str, form: str, other: str | None) -> str:
    """A figure of the table; a dash where it was not measured."""
    own = values_of(samples, subject, measure)
    base = values_of(samples, other, measure) if other else None
    if not own or (other and (not base or other == subject)):
        return NOTHING
    if base is None:
        return format(statistics.median(own), form)
    compared = [a - b if measure in ADDED else a / b for a, b in zip(own, base, strict=False)]
    return format(statistics.median(compared), form)


def rows(samples: Samples, titles: Mapping[str, str]) -> list[list[str]]:
    """The table, headings first, without columns that nothing was measured for."""
    found = [[cell(samples, name, *column[1:]) for column in COLUMNS] for name in titles]
    used = [place for place in range(len(COLUMNS)) if any(row[place] != NOTHING for row in found)]
    table = [["", *(COLUMNS[place][0] for place in used)]]
    for title, row in zip(titles.values(), found, strict=True):
        table.append([title, *(row[place] for place in used)])
    return table


def text(table: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table for a page."""
    ruled = [table[0], ["---", *["--:"] * (len(table[0]) - 1)], *table[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in ruled)


BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
"""Between these stands what `into_page` replaces."""


def into_page(page: str, tables: Sequence[Sequence[Sequence[str]]]) -> str:
    """The page with the figures of this run, and the kind of machine that it ran on."""
    kind = machine()
    told = (
        f"{kind['cpu']}, {kind['cores']} cores, {kind['memory_gib']:.0f} GiB of memory, "
        f"Linux {kind['kernel']}, Python {kind['python']}."
    )
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"the page has no {BEGIN} and {END}")
    figures = "\n\n".join([told, *(markdown(table) for table in tables)])
    return f"{before}{BEGIN}\n{figures}\n{END}{after}"


def judged(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The table of targets."""
    table = [["target", "bound", "measured", "noise", ""]]
    for each in verdicts:
        unit = each.target.unit
        word = "met" if each.met else "MISSED" if each.missed else "within the noise"
        measured = f"{each.value:.3g}{unit}" if math.isfinite(each.value) else "does not keep up"
        noise = f"±{each.noise:.2g}"
        table.append([each.target.title, each.target.bound, measured, noise, word])
    return table


def document(samples: Samples, verdicts: Sequence[Verdict], more: Mapping[str, Any]) -> Any:
    """All that was found, for other programs."""
    return {
        "machine": machine(),
        "medians": {
            subject: {measure: statistics.median(values) for measure, values in found.items()}
            for subject, found in samples.items()
        },
        "spreads": {
            subject: {measure: spread(values) for measure, values in found.items()}
            for subject, found in samples.items()
        },
        "rounds": samples,
        "targets": [
            {
                "title": each.target.title,
                "bound": each.target.bound,
                "value": each.value if math.isfinite(each.value) else None,
                "noise": each.noise,
                "met": each.met,
                "missed": each.missed,
            }
            for each in verdicts
        ],
        **more,
    }
