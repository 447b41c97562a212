"""How a serving process is set up to be quick."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine
from typing import Any

GC_THRESHOLDS = (20_000, 20, 20)
"""When Python looks for cycles (`gc.set_threshold`): 700 new objects, its default, are less than
the turns have that run at one time, which were looked through again and again."""


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` in an event loop: uvloop's where that is installed, else Python's own."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(work)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 (an extra)
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def settle() -> None:
    """Called once all is loaded: what is there now stays, so nobody looks through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    # No format here names a thread, a process or a task.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
