"""What a turn costs as there is more of something: sessions, chatbots, open streams, history.

Every point is a server with a file of its own. All points of a series run at once and are measured in
turn, so that a busy moment falls on all of them. A turn's cost is the CPU of the server.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from bench import subjects, wording
from bench.fill import bot_key, fill, new_bots
from bench.load import run
from bench.streams import check_head
from bench.subjects import Mock, Subject


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often and long (in seconds) each point is."""

    sessions: Sequence[int] = (100, 1_000, 10_000, 100_000, 1_000_000)
    chatbots: Sequence[int] = (1, 10, 100, 1_000, 10_000)
    streams: Sequence[int] = (0, 100, 300, 1_000)
    history: Sequence[int] = (0, 20, 50, 100, 200, 400)
    rounds: int = 5
    seconds: float = 2


@dataclass
class Point:
    """One size: the server that has it, and the CPU milliseconds of a turn in each round."""

    size: int
    subject: Subject
    costs: list[float] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """The median."""
        return statistics.median(self.costs)


@dataclass
class Series:
    """The points of one thing that grows.

    :param flat: whether a turn's cost should not depend on it; else it should grow with it evenly.
    """

    name: str
    flat: bool
    points: list[Point] = field(default_factory=list)


def on(
    folder: Path, *, bots: Sequence[str] = (wording.BOT,), sessions: int, history: int
) -> Subject:
    """chatd on a SQLite file with so much in it.

    Plain turns are those of 64 sessions from all over the file, streams those of others.
    """
    folder.mkdir(parents=True)
    ids = fill(folder / "chatd.db", bots, sessions, history)
    subject = subjects.chatd("sqlite", folder, {"use": "sqlite", "path": "chatd.db"}, ())
    places = range(0, len(ids), len(ids) // wording.SESSIONS)[: wording.SESSIONS]
    # The n-th session is the chatbot's whose turn it was, see `fill`.
    chosen = [(ids[place], bots[place % len(bots)]) for place in places]
    subject.plain = [wording.chat(id, bot=bot, key=bot_key(bot, bots)) for id, bot in chosen]
    others = set(ids[: sessions if sessions < 10_000 else 0]) - {id for id, _ in chosen}
    subject.streamed = wording.chats(sorted(others), stream=True)
    return subject


def sessions(folder: Path, sizes: Sequence[int]) -> Series:
    """More and more sessions in the file, each with a turn; history is what is said meanwhile."""
    made = [Point(size, on(folder / f"s{size}", sessions=size, history=2)) for size in sizes]
    return Series("sessions", True, made)


def chatbots(folder: Path, sizes: Sequence[int]) -> Series:
    """More and more chatbots; up to 64 of them are talked to."""
    made = []
    for size in sizes:
        bots = [wording.BOT, *new_bots(size - 1)]
        many = max(size, wording.SESSIONS)
        made.append(Point(size, on(folder / f"b{size}", bots=bots, sessions=many, history=2)))
    return Series("chatbots", True, made)


def history(folder: Path, sizes: Sequence[int]) -> Series:
    """More and more messages of history, all of which the budget holds."""
    made = [
        Point(size, on(folder / f"h{size}", sessions=wording.SESSIONS, history=size))
        for size in sizes
    ]
    return Series("messages of history", False, made)


def open_streams(folder: Path, sizes: Sequence[int]) -> Series:
    """More and more streams that are open and nearly still, with a token every 5 s."""
    many = {size: size + wording.SESSIONS for size in sizes}
    made = [
        Point(size, on(folder / f"o{size}", sessions=many[size], history=wording.HISTORY))
        for size in sizes
    ]
    return Series("open streams", True, made)


def hold(stack: ExitStack, point: Point) -> None:
    """Opens the point's streams, which end with the stack; nothing reads on in them."""
    for request in point.subject.streamed[: point.size]:
        stream = socket.create_connection(("127.0.0.1", point.subject.port), timeout=60)
        stack.enter_context(closing(stream))
        stream.sendall(request)
        check_head(stream.recv(1 << 16))


def measure_one(
    series: Series, sizes: Sizes, mock: Mock, cores: tuple[frozenset[int], frozenset[int]]
) -> None:
    """Measures all points of a series, whose servers run for as long."""
    with ExitStack() as stack:
        for point in series.points:
            stack.callback(point.subject.close)
            point.subject.start(mock.url, cores[0])
            if series.name == "open streams":
                hold(stack, point)
        for number in range(sizes.rounds + 1):
            for point in series.points:
                cost = run(point.subject.job(sizes.seconds), cores[1]).cpu_each * 1e3
                # In the first round caches fill.
                point.costs += [cost] if number else []


def measure(
    folder: Path, sizes: Sizes, cores: tuple[frozenset[int], frozenset[int]]
) -> list[Series]:
    """Measures every series."""
    # What it tells of prompts would mend chatd's estimate of them, and so how much of it fits.
    options = ("--interval", "5", "--tokens", "1000", "--prompt-tokens", "0")
    mock = Mock(folder / "mock", *options)
    mock.start("", cores[1])
    makers: list[tuple[Callable[[Path, Sequence[int]], Series], Sequence[int]]] = [
        (sessions, sizes.sessions),
        (chatbots, sizes.chatbots),
        (open_streams, sizes.streams),
        (history, sizes.history),
    ]
    found = []
    try:
        for make, chosen in makers:
            series = make(folder, chosen)
            measure_one(series, sizes, mock, cores)
            found.append(series)
            for each in folder.glob("*/chatd.db*"):
                each.unlink()
    finally:
        mock.close()
    return found


def table(found: Sequence[Series]) -> list[list[str]]:
    """The costs of every point, and how they grow from the first to the last."""
    rows = [["CPU ms/turn with so many", "", "", "last to first"]]
    for series in found:
        sizes = "  ".join(f"{point.size:,}" for point in series.points)
        costs = "  ".join(f"{point.cost:.2f}" for point in series.points)
        growth = series.points[-1].cost / series.points[0].cost
        rows.append([series.name, sizes, costs, f"{growth:.2f}x"])
    return rows


def as_json(found: Sequence[Series]) -> dict[str, dict[int, list[float]]]:
    """CPU milliseconds of a turn by series and size, a value for each round."""
    return {each.name: {point.size: point.costs for point in each.points} for each in found}
