"""Hundreds of clients that are slow on purpose, while one that is not is answered as ever."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support import ServerProcess, server_process
from tests.test_process import call

pytestmark = pytest.mark.alone

CONFIG = """
server:
  header_timeout: 2
  body_timeout: 2
  unread_seconds: 2
  max_connections_per_address: 1000
storage: {use: sqlite}
providers: {main: {use: echo}}
models: [{match: "*", ask: [main]}]
"""
ATTACKS = {
    "slow headers": ["-H"],
    "slow body": ["-B", "-t", "POST", "-s", "8192"],
    "slow read": ["-X", "-w", "10", "-y", "20", "-n", "5", "-z", "1", "-k", "1"],
}
SECONDS = 8
"""How long each attack goes on; slow ones are dropped within three."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that waits 2 seconds where others wait 15."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "chatd.yaml").write_text(CONFIG)
    with server_process(folder) as running:
        assert running.url
        yield running


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_500_slow_clients_are_dropped_and_a_quick_one_is_not_slowed(
    server: ServerProcess, attack: list[str]
) -> None:
    path = "/docs/assets/swagger-ui.css" if "-X" in attack else "/api/chat"
    program = shutil.which("slowhttptest") or "slowhttptest"
    common = ["-c", "500", "-r", "250", "-i", "1", "-l", str(SECONDS), "-p", "2"]
    url = f"http://127.0.0.1:{urlsplit(server.url).port}{path}"
    started = time.monotonic()
    with subprocess.Popen(
        [program, *attack, *common, "-u", url], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as slow:
        took: list[float] = []
        opened: list[int] = []
        files = Path(f"/proc/{server.process.pid}/fd")
        while slow.poll() is None:
            began = time.monotonic()
            assert call("GET", f"{server.url}/health")[0] == 200
            took.append(time.monotonic() - began)
            opened.append(sum(1 for _ in files.iterdir()))
            time.sleep(0.02)
    took.sort()
    p99 = took[int(len(took) * 0.99)]
    print(
        f"p99 {p99 * 1000:.1f} ms of {len(took)}, open files {opened[0]} {max(opened)} {opened[-1]}"
    )
    assert len(took) > 50 and max(opened) > 200
    # They wait for 2 s; half a second is a busy machine's.
    assert p99 < 0.5
    # They are dropped although the other side has not hung up: it ends early when it sees the last go.
    assert time.monotonic() - started < SECONDS or opened[-1] < max(opened) / 2
    until = time.monotonic() + 5
    while sum(1 for _ in files.iterdir()) >= 50:
        assert time.monotonic() < until
        time.sleep(0.1)
