"""The end of a process that was told to stop, also when something in it does not end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from traceback import walk_stack
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

EXIT_CODE = 1
"""Of a process that had to be ended."""

TELL_SECONDS = 2.0
"""How long saying what goes on may take: nobody may read what is written."""

MOST_TASKS = 10
MOST_FRAMES = 40
"""How much is told: so many tasks, and so much of the stack of each."""

KINDS = ("cr", "gi", "ag")
"""What the attributes of coroutines, generators and asynchronous generators begin with."""


class Ending:
    """Sees to it that this process ends in time, from a thread that nothing else holds up.

    The event loop waits for tasks, and Python for threads, however long they take; those of a
    plugin may never end. The log says what goes on then: files, lines and functions, no values.

    :param loop: whose tasks are told of. It runs in the thread that makes this.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._due = math.inf
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def within(self, seconds: float) -> None:
        """From now on the process has so many seconds left; a second call counts anew."""
        self._due = time.monotonic() + seconds
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="ending", daemon=True)
            self._thread.start()

    def _wait(self) -> None:
        while True:
            self._changed.clear()
            if (left := self._due - time.monotonic()) <= 0:
                break
            self._changed.wait(left)
        telling = threading.Thread(target=self._tell, daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)
        os._exit(EXIT_CODE)

    def _tell(self) -> None:
        tasks = list(asyncio.all_tasks(self._loop))
        frame = sys._current_frames().get(self._loop_thread)
        running = [_line(inner, line) for inner, line in walk_stack(frame)] if frame else []
        told = ["the event loop's thread:", *reversed(running[:MOST_FRAMES])]
        for task in tasks[:MOST_TASKS]:
            told += ["a task:", *_waiting(task)]
        log.error(
            "the process does not end by itself, and is ended; %s tasks go on\n%s",
            len(tasks),
            "\n".join(told),
        )
        logging.shutdown()


def _waiting(task: asyncio.Task[Any]) -> Iterator[str]:
    """Where a task waits, outermost first."""
    waiting: Any = task.get_coro()
    for _ in range(MOST_FRAMES):
        kind = next((kind for kind in KINDS if hasattr(waiting, f"{kind}_frame")), None)
        frame = getattr(waiting, f"{kind}_frame", None)
        if frame is None:
            return
        yield _line(frame, frame.f_lineno)
        waiting = getattr(waiting, f"{kind}_{'yieldfrom' if kind == 'gi' else 'await'}")


def _line(frame: FrameType, line: int) -> str:
    code = frame.f_code
    return f'  File "{code.co_filename}", line {line}, in {code.co_name}'
