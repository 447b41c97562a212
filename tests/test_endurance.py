"""A server that goes on for long: what it holds does not grow with what it did."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.soak import faults, soak


@pytest.mark.alone
def test_thousands_of_turns_leave_neither_memory_nor_open_files_behind(tmp_path: Path) -> None:
    # `python -m bench.soak` does the same for 100,000 turns.
    found = soak(tmp_path, warm=1_000, turns=3_000, parts=3)
    assert faults(found) == []
