"""Charts of what a run found, as SVG that a page shows in light and dark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from bench.growth import Series
from bench.targets import Samples, spread

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 34, 34
STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#57606a}.title{font-weight:600}"
    ".axis{stroke:#8c959f;stroke-width:1}.line{fill:none;stroke:#0969da;stroke-width:2}"
    ".mark{fill:#0969da}.other{fill:#8c959f}"
    "@media(prefers-color-scheme:dark){text{fill:#c9d1d9}.line{stroke:#58a6ff}.mark{fill:#58a6ff}}"
    "</style>"
)


def svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """A whole document."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' width="{width:.0f}" height="{height:.0f}" role="img"><title>{escape(title)}</title>'
    )
    return "\n".join([head, STYLE, *parts, "</svg>\n"])


def label(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    """Text at a place."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of an axis."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="axis"/>'


def growth(found: Sequence[Series]) -> str:
    """A small chart for each series, two in a row."""
    parts = []
    for number, series in enumerate(found):
        x, y = number % 2 * WIDTH, number // 2 * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{panel(series)}</g>')
    height = math.ceil(len(found) / 2) * HEIGHT
    return svg(2 * WIDTH, height, parts, "CPU milliseconds per turn as things grow")


def panel(series: Series) -> str:
    """One series: cost from zero upwards, sizes evenly apart or as their logarithm."""
    sizes = [point.size for point in series.points]
    top = 1.25 * max(point.cost for point in series.points)
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    scaled = [_scaled(size, sizes) for size in sizes]
    places = [
        (LEFT + share * across, HEIGHT - BOTTOM - point.cost / top * up)
        for share, point in zip(scaled, series.points, strict=True)
    ]
    base = HEIGHT - BOTTOM
    parts = [
        label(LEFT, 18, f"CPU ms per turn, by {series.name}", "start", "title"),
        line(LEFT, base, WIDTH - RIGHT, base),
        line(LEFT, TOP, LEFT, base),
        label(LEFT - 6, base + 4, "0", "end"),
        label(LEFT - 6, TOP + 8, f"{top:.1f}", "end"),
    ]
    parts += [label(x, base + 18, _short(size)) for (x, _), size in zip(places, sizes, strict=True)]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{joined}" class="line"/>')
    for (x, y), point in zip(places, series.points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="mark"/>')
        parts.append(label(x, y - 8, f"{point.cost:.2f}"))
    return "".join(parts)


def _scaled(size: int, sizes: Sequence[int]) -> float:
    """Where a size stands, from 0 to 1; logarithmic when none is 0."""
    low, high = sizes[0], sizes[-1]
    if high == low:
        return 0
    if low > 0:
        return math.log(size / low) / math.log(high / low)
    return size / high


def _short(size: int) -> str:
    for unit, word in ((1_000_000, "M"), (1_000, "k")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{word}"
    return str(size)


def bars(samples: Samples, titles: dict[str, str]) -> str:
    """Turns a second of each subject, in parts of the limit's."""
    names = [name for name in titles if name != "mock" and samples[name]["rate"]]
    limit = samples["limit"]["rate"]
    parts = [label(10, 18, "Turns a second, to the bare Tornado proxy", "start", "title")]
    for number, name in enumerate(names):
        ratios = [a / b for a, b in zip(samples[name]["rate"], limit, strict=False)]
        ratio, y = statistics.median(ratios), 34 + number * 26
        kind = "mark" if name in ("sqlite", "supabase", "postgres") else "other"
        length = max(1.0, 380 * ratio)
        parts.append(label(190, y + 14, titles[name], "end"))
        parts.append(
            f'<rect x="198" y="{y}" width="{length:.1f}" height="18" rx="2" class="{kind}"/>'
        )
        noise = f" ±{spread(ratios):.2f}" if name != "limit" else ""
        parts.append(label(206 + length, y + 14, f"{ratio:.2f}{noise}", "start"))
    return svg(2 * WIDTH, 44 + 26 * len(names), parts, "Turns a second, to the bare Tornado proxy")
