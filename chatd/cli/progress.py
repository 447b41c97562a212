"""A bar on the terminal for what takes long; elsewhere nothing."""

from __future__ import annotations

import itertools
import sys
import time
from types import TracebackType
from typing import Self

import click

SHOWN_EVERY = 0.1
"""Seconds between two drawings."""


class Bar:
    """Shows on stderr how much is done, where that is a terminal.

    :param total: how much there is, where that is known; else it shows that something goes on.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self.shown = sys.stderr.isatty()
        self._bar = click.progressbar(
            itertools.repeat(None, total) if total is not None else itertools.repeat(None),
            length=total,
            label=label,
            file=sys.stderr,
            show_pos=True,
            hidden=not self.shown,
        )
        self._drawn = 0.0
        self._pending = 0
        self._done = 0

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def to(self, done: int) -> None:
        """So much is done so far, in all; less than before is passed over."""
        if done <= self._done:
            return
        self._pending += done - self._done
        self._done = done
        if self.shown and time.monotonic() - self._drawn > SHOWN_EVERY:
            self._drawn = time.monotonic()
            self._flush()

    def _flush(self) -> None:
        self._bar.update(self._pending)
        self._pending = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.shown:
            self._flush()
        self._bar.__exit__(kind, error, trace)
