"""Watches the event loop: how late it is, and which plugin keeps it from everything else."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from traceback import walk_stack
from types import FrameType

log = logging.getLogger(__name__)

BEATS = 4
"""How often the loop shows that it lives in the time that it may be blocked for."""

MOST_FRAMES = 40
"""How much of a stack is told; the innermost ones."""

REPORT_SECONDS = 10.0
"""Blockages that follow sooner than this after one that was told are only counted."""

PluginOf = Callable[[str], str | None]


class LoopWatch:
    """Tells who blocks the event loop for longer than `seconds`, once for each time.

    A thread looks whether the loop's heartbeat is late, and then at the stack of the loop's
    thread. Files, lines and functions are told, and no values: those may be secret.

    :param seconds: 0 tells nobody; the lag is observed all the same.
    :param plugin_of: the plugin whose code a module is, by the module's name.
    """

    def __init__(self, seconds: float, plugin_of: PluginOf) -> None:
        self.seconds = seconds
        self.plugin_of = plugin_of
        self.observers: list[Callable[[float], None]] = []
        """Each is called on the event loop with its lag in seconds, some 16 times a second."""
        self.lag = 0.0
        """By how many seconds the last heartbeat was late."""
        self._beat = 0.0
        self._looked: float | None = None
        self._told: float | None = None
        self._told_at = -REPORT_SECONDS
        self._untold = 0
        self._thread_id = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _pause(self) -> float:
        return (self.seconds or 0.25) / BEATS

    def start(self) -> None:
        """Watches the running event loop until `stop`. Called once."""
        self._thread_id = threading.get_ident()
        self._beat = time.monotonic()
        self._heartbeat(asyncio.get_running_loop(), self._beat)
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it. A second call does nothing."""
        self._done.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _heartbeat(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = time.monotonic()
        self.lag = max(0.0, now - due)
        if self.seconds and self.lag > self.seconds and self._looked != self._beat:
            self._tell(f"the event loop was blocked for {self.lag:.2f} s; by whom was not seen", "")
        elif self._told == self._beat:
            log.warning("the event loop goes on after %.2f s", now - self._beat)
        self._beat = now
        for observe in self.observers:
            observe(self.lag)
        pause = self._pause
        self._timer = loop.call_later(pause, self._heartbeat, loop, now + pause)

    def _watch(self) -> None:
        while not self._done.wait(self._pause):
            beat = self._beat
            late = time.monotonic() - beat - self._pause
            if self.seconds and late > self.seconds and self._looked != beat:
                self._look(beat, late)

    def _look(self, beat: float, late: float) -> None:
        """Tells who is running on the loop's thread now."""
        frame = sys._current_frames().get(self._thread_id)
        if frame is None or self._beat != beat:
            return  # it goes on
        self._looked = beat
        plugin, stack = self._seen(frame)
        who = f'plugin "{plugin}" blocks' if plugin else "something blocks"
        if self._tell(
            f"{who} the event loop, for {late:.2f} s so far: nothing else is served", stack
        ):
            self._told = beat

    def _seen(self, frame: FrameType) -> tuple[str | None, str]:
        """The innermost plugin of a stack, and the stack, outermost first."""
        plugin: str | None = None
        lines: list[str] = []
        for inner, line in walk_stack(frame):
            plugin = plugin or self.plugin_of(inner.f_globals.get("__name__", ""))
            if len(lines) < MOST_FRAMES:
                code = inner.f_code
                lines.append(f'  File "{code.co_filename}", line {line}, in {code.co_name}')
        return plugin, "\n".join(reversed(lines))

    def _tell(self, text: str, stack: str) -> bool:
        """Logs it, unless another was told of just now; whether it did."""
        now = time.monotonic()
        if now - self._told_at < REPORT_SECONDS:
            self._untold += 1
            return False
        more = f" ({self._untold} times since the last that was told)" if self._untold else ""
        self._told_at, self._untold = now, 0
        log.error("%s", f"{text}{more}" + (f"\n{stack}" if stack else ""))
        return True
