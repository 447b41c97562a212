"""What tests share: a server in this process, a server in one of its own, and configurations."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from chatd.config import LimitsConfig
from chatd.testing.served import KEY, Answer, Served, open_served

__all__ = ["KEY", "Answer", "Served", "open_served"]

ECHO_CONFIG = """
server:
  allowed_origins: ["https://site.example"]
storage: %(storage)s
providers:
  main: {use: echo, reply: "You said: {message}"}
models:
  - {match: "*", ask: [main]}
"""


def without_limits(config: str) -> str:
    """A configuration whose limits are `none`, one client being all that asks it."""
    head, _, limits = config.partition("\nlimits:\n")
    names = [field.name for field in dataclasses.fields(LimitsConfig) if "_per_" in field.name]
    return f"{head}\nlimits:\n" + "".join(f"  {name}: none\n" for name in names) + limits


class ServerProcess:
    """`chatd serve` as a process of its own, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> None:
        self.folder = folder
        self.stdout_path = folder / "stdout.log"
        with self.stdout_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chatd", "serve", "--port", "0", *arguments],
                cwd=folder,
                env={**clean_env(), **(env or {})},
                stdout=log if stdout is None else stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    @property
    def stderr(self) -> str:
        return "".join(self._lines)

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text()

    @property
    def url(self) -> str:
        """The address, once the server says that it serves."""
        for _ in range(1200):
            if found := re.search(r"chatd serves (\S+)", self.stderr):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.stderr}")

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._ended(60)

    def kill(self) -> None:
        """SIGKILL: nothing is finished."""
        self.process.kill()
        self._ended(10)

    def _ended(self, timeout: float) -> int:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server does not end: {self.stdout[-8000:]}") from None
        self._reader.join(timeout=5)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


def server_process(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> ServerProcess:
    """A server that is ended at the end of the `with` it is used in."""
    return ServerProcess(folder, *arguments, env=env)


def clean_env() -> dict[str, str]:
    """This environment without what would change a server's configuration."""
    ours = ("CHATD_", "SUPABASE_", "OPENROUTER_")
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(ours) and k not in ("PORT", "DYNO", "DATABASE_URL")
    }


def chatd_command(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs `chatd …` as an operator would."""
    return subprocess.run(
        [sys.executable, "-m", "chatd", *arguments],
        check=False,
        cwd=cwd,
        env={**clean_env(), **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
