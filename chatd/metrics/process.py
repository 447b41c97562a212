"""What the system says of this process."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable
from pathlib import Path

from chatd.metrics.values import Sample

READ_SECONDS = 10.0
"""How old it may be: counting thousands of open files takes milliseconds."""


class ProcessGauges:
    """Reads memory, CPU time and open files; on systems without `/proc` what there is else."""

    def __init__(self) -> None:
        self._started = time.time()
        self._read_at = float("-inf")
        self._samples: list[Sample] = []

    def __call__(self) -> Iterable[Sample]:
        if time.monotonic() - self._read_at > READ_SECONDS:
            self._samples = [("process_start_time_seconds", (), self._started), *_read()]
            self._read_at = time.monotonic()
        return self._samples


def _read() -> Iterable[Sample]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield "process_cpu_seconds_total", (), used.ru_utime + used.ru_stime
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        yield "process_resident_memory_bytes", (), pages * resource.getpagesize()
        yield "process_open_fds", (), sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        yield "process_resident_memory_bytes", (), used.ru_maxrss * 1024
