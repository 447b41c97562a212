"""`chatd serve --reload`: the server anew whenever a file that it is made of changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import click

from chatd.cli.common import configured
from chatd.config import ConfigFile
from chatd.errors import ChatdError
from chatd.hookspecs import PROJECT

LOOK_SECONDS = 0.5
"""How often files are looked at. Looking costs a few milliseconds, so nothing better is needed."""

STOP_SECONDS = 5.0
"""How long a server may take to stop for its files."""

Snapshot = dict[Path, tuple[int, int]]


def serve_anew(config_path: Path | None, arguments: Sequence[str]) -> int:
    """Runs `chatd serve` with these arguments, again after each change, until SIGTERM or Ctrl-C.

    A server that does not start, or ends by itself, is started again at the next change.
    """
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    command = [sys.executable, "-m", "chatd", "serve", *arguments]
    while not asked.is_set():
        seen = snapshot(config_path)
        server = subprocess.Popen(command)
        told = False
        while not asked.wait(LOOK_SECONDS):
            if changed := _changed(seen, snapshot(config_path)):
                click.echo(f"  {changed} changed: the server starts again", err=True)
                break
            if server.poll() is not None and not told:
                told = True
                click.echo("  The server has ended; it starts again when a file changes", err=True)
        _stop(server)
    return 0


def snapshot(config_path: Path | None) -> Snapshot:
    """When each file that a server is made of was written, and how long it is."""
    found: Snapshot = {}
    for path in _files(config_path):
        try:
            stat = path.stat()
        except OSError:
            continue
        found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


def _changed(before: Snapshot, now: Snapshot) -> Path | None:
    return next((path for path in {**before, **now} if before.get(path) != now.get(path)), None)


def _files(config_path: Path | None) -> Iterable[Path]:
    """The configuration, `.env`, plugins of the folder, and the source of chatd and all plugins."""
    yield Path(".env")
    try:
        path = configured(config_path)
        yield path
        folder = ConfigFile.read(path).plugins.folder
    except ChatdError:
        folder = None  # broken for a moment; what it names is looked at when it is whole again
    if folder is not None:
        yield from folder.glob("*.py")
    for top in {PROJECT, *(e.module.partition(".")[0] for e in entry_points(group=PROJECT))}:
        yield from _source(top)


def _source(package: str) -> Iterable[Path]:
    spec = find_spec(package)
    if spec is None:
        return
    for place in spec.submodule_search_locations or ():
        for path in Path(place).rglob("*"):
            if path.suffix in (".py", ".json"):
                yield path
    if spec.submodule_search_locations is None and spec.origin:
        yield Path(spec.origin)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ends it in good order; turns that take long are not waited for."""
    if server.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        os.kill(server.pid, number)
        try:
            server.wait(STOP_SECONDS / 5 if number == signal.SIGTERM else None)
            return
        except subprocess.TimeoutExpired:
            continue
