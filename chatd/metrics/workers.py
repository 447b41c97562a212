"""Numbers of several workers: each writes its own into a folder, and whoever is asked reads all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from chatd.metrics.families import Metrics

log = logging.getLogger(__name__)

WRITE_SECONDS = 1.0
"""How old the numbers of other workers are at most, in an answer; and what a crash may lose."""


class Place:
    """A worker's place among the others, with its file in their folder.

    What the one before counted in this place is taken over, so that sums never shrink; its gauges
    are gone with it.
    """

    def __init__(self, folder: Path, number: int, metrics: Metrics) -> None:
        self._folder = folder
        self._path = folder / f"{number}.json"
        self._number = number
        self._metrics = metrics
        self._parent = os.getppid()
        self._failed = False
        self._keeper: asyncio.Task[None] | None = None
        metrics.gather = self.snapshots
        with contextlib.suppress(OSError, orjson.JSONDecodeError):
            metrics.load(orjson.loads(self._path.read_bytes()))

    def open(self) -> None:
        """Writes the numbers from now on, every so often."""
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Ends that. Removes the folder when the parent, whose it is, is gone."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if os.getppid() != self._parent:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            self.write()

    async def _keep(self) -> None:
        while True:
            self.write()
            await asyncio.sleep(WRITE_SECONDS)

    def write(self) -> dict[str, Any]:
        """Writes the numbers as they are now, and returns them.

        They are whole there for whoever reads them. A folder that cannot be written to is logged
        once.
        """
        now = {
            "pid": os.getpid(),
            "number": self._number,
            **self._metrics.snapshot(),
        }
        new = self._path.with_suffix(".new")
        try:
            new.write_bytes(orjson.dumps(now))
            new.replace(self._path)
        except OSError as error:
            if not self._failed:
                log.error("the numbers of this worker cannot be written: %s", error.strerror)
            self._failed = True
        return now

    def snapshots(self) -> list[dict[str, Any]]:
        """The numbers of all workers. Its own are written first, so that the next one to be asked,
        whoever that is, knows no less."""
        return [self.write(), *self._others()]

    def _others(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._folder.glob("*.json")):
            if path == self._path:
                continue
            with contextlib.suppress(OSError, orjson.JSONDecodeError):
                yield _living(orjson.loads(path.read_bytes()))


def _living(snapshot: dict[str, Any]) -> dict[str, Any]:
    """A snapshot; without gauges when its process is gone."""
    try:
        os.kill(snapshot["pid"], 0)
    except OSError:
        return {**snapshot, "gauges": []}
    return snapshot
