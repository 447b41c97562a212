"""Redis servers of a test's own: on free ports, in temporary folders."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from tests.postgres import free_port

PASSWORD = "a-canary/pass@word"


class RedisServer:
    """One server.

    :param arguments: as `redis-server` takes them.
    """

    def __init__(self, *arguments: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="chatd-redis-"))
        self.port = free_port()
        self.arguments = arguments
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Starts it, empty, and returns when it takes connections."""
        settings = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["redis-server", *settings, "--dir", str(self.folder), *self.arguments],
                stdout=log,
                stderr=log,
            )
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        told = (self.folder / "log").read_text()
        self.close()
        raise AssertionError(told)

    def ask(self, *command: str | int) -> object:
        """One command, on a connection of its own."""
        with redis.Redis(port=self.port, decode_responses=True) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """SIGKILL, and nothing is left of what it had."""
        self.process.kill()
        self.process.wait(10)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lets it stand still, connections open, until the end of the `with`."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends it, and removes its folder."""
        if self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def cluster() -> RedisServer:
    """A cluster of one node, which has all slots."""
    # Its nodes' port would be one of those that the system gives to clients.
    server = RedisServer("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    server.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    for _ in range(200):
        if "cluster_state:ok" in str(server.ask("CLUSTER", "INFO")):
            return server
        time.sleep(0.02)
    raise AssertionError(server.ask("CLUSTER", "INFO"))
